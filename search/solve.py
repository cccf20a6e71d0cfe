"""Who gets which bits: the multiple-choice knapsack, solved to a certificate.

    minimise   sum_i loss_i(choice_i)
    such that  fixed bytes + sum_i bytes_i(choice_i) <= budget, and every further cost in its limit

Peers fill greedily or stop at the first layer that overshoots; here the optimum is found by branch
and bound (`branch.py`, with HiGHS) on the core that the linear relaxation leaves open
(`relaxation.py`), and the answer comes with its distance to the relaxation's bound. The solver is
not trusted with arithmetic: losses span eight decades and files 1e11 bytes, so its answer is
recounted in whole numbers, its tolerances never put a plan over budget, and the LP bound is ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from quantlib.errors import SearchError
from quantlib.search.branch import Outcome, minimise
from quantlib.search.infeasible import Extremes, why_impossible
from quantlib.search.minimax import BALANCED_GAP, least_largest
from quantlib.search.problem import COST_TOLERANCE, Choice, Picks, Problem
from quantlib.search.relaxation import Table
from quantlib.search.tasks import task_cost

RELATIVE_GAP = 1e-5
"""Stop when the loss is proven within this of the optimum: sensitivities are known to a percent."""
SEVERAL_GAP = 1e-4
"""The same under several constraints: between 1e-4 and 1e-5 lie seconds of proof, because as many
items are split in the relaxation as there are constraints, and times are known to a percent too."""
TIME_LIMIT = 30.0
"""Seconds until the best found so far is returned with its gap. Far above what is needed, because
an answer that depends on the clock cannot be reproduced."""


@dataclass(frozen=True)
class Solution:
    """An allocation and what is known about it.

    picks:      index of the choice of every item.
    bytes:      size of the whole checkpoint, fixed bytes included; never above `budget` (None: any
                size was allowed).
    loss:       what was minimised (`Problem.value`): the sum of the predicted losses, or the
                largest relative increase of a task.
    costs:      sums of the further costs that have limits, their fixed parts included.
    lp_bound:   no allocation within the budget, not even a fractional one, loses less than this.
    gap:        (loss - lp_bound) / |loss|: no search could do better by more than this.
    proven_gap: the same against the best bound known after branch and bound, which is tighter.
    optimal:    proven within the requested gap; False when time ran out first.
    """

    picks: Picks
    bytes: int
    loss: float
    budget: int | None
    lp_bound: float
    gap: float
    proven_gap: float
    optimal: bool
    seconds: float
    costs: Mapping[str, float] = field(default_factory=dict)


class Solver:
    """A problem prepared once and solved for any number of budgets (a front, a second `--size`)."""

    def __init__(self, problem: Problem, limits: Mapping[str, float] | None = None) -> None:
        """`limits`: further cost -> the most its sum may be, fixed part included.

        Raises SearchError for a problem without items and for a choice without such a cost.
        """
        if not problem.items:
            raise SearchError("there is no weight to choose a scheme for")
        self.problem = problem
        self.limits = dict(limits or {})
        if not all(math.isfinite(limit) and limit >= 0 for limit in self.limits.values()):
            raise SearchError(f"limits must be finite and not negative, and they are {self.limits}")
        tasks = tuple(map(task_cost, problem.balanced))
        self._table = Table.of(problem, (*self.limits, *tasks))
        self._largest = problem.fixed_bytes + sum(
            max(choice.bytes for choice in item.choices) for item in problem.items
        )

    def solve(
        self,
        budget: int | None,
        *,
        limits: Mapping[str, float] | None = None,
        relative_gap: float | None = None,
        time_limit: float = TIME_LIMIT,
    ) -> Solution:
        """The allocation of least loss within `budget` bytes (None: any) and the limits.

        limits: others than the solver's own, on the same costs. relative_gap: RELATIVE_GAP or
        SEVERAL_GAP unless said. Raises SearchError when there is no such allocation.
        """
        start = time.monotonic()
        limits = self.limits if limits is None else {name: limits[name] for name in self.limits}
        if relative_gap is None:
            relative_gap = self._usual_gap(budget, limits)
        outcome = self._outcome(budget, limits, relative_gap, time_limit)
        if outcome.picks is None:
            raise SearchError(
                why_impossible(self.problem, budget, limits, self._extremes(budget, limits))
            )
        picks = tuple(int(pick) for pick in outcome.picks)
        if not self.problem.fits(picks, self._largest if budget is None else budget, limits):
            raise SearchError(
                "the solver's answer does not fit: a bug of quantlib, please report it"
            )
        loss = self.problem.value(picks)
        base = 0.0 if self.problem.balanced else self._table.base_loss
        lp_bound = min(loss, base + outcome.lp_bound)
        proven = min(loss, max(lp_bound, base + outcome.proven))
        return Solution(
            picks,
            self.problem.bytes(picks),
            loss,
            budget,
            lp_bound,
            gap=(loss - lp_bound) / (abs(loss) or 1.0),
            proven_gap=(loss - proven) / (abs(loss) or 1.0),
            optimal=outcome.finished,
            seconds=time.monotonic() - start,
            costs={name: self.problem.cost(name, picks) for name in limits},
        )

    def _usual_gap(self, budget: int | None, limits: Mapping[str, float]) -> float:
        if self.problem.balanced:
            return BALANCED_GAP
        return SEVERAL_GAP if limits and budget is not None else RELATIVE_GAP

    def _outcome(
        self,
        budget: int | None,
        limits: Mapping[str, float],
        relative_gap: float,
        time_limit: float,
    ) -> Outcome:
        """Bounds are losses above the table's base; where tasks are balanced, whole levels."""
        capacity = self._capacity(self._table, budget, limits)
        if not self.problem.balanced:
            return minimise(self._table, capacity, relative_gap, time_limit)
        scales = np.array([self.problem.scales[task] for task in self.problem.balanced])
        return least_largest(self._table, scales, capacity, relative_gap, time_limit)

    def smallest_size(self) -> int | None:
        """Bytes of the smallest checkpoint within the limits, None when there is none at all."""
        if not self.limits:
            return self.problem.bytes(self.problem.smallest())
        picks = self._least(lambda choice: float(choice.bytes), None, self.limits)
        return None if picks is None else self.problem.bytes(picks)

    def _extremes(self, budget: int | None, limits: Mapping[str, float]) -> Extremes:
        """What can be said when there is no solution."""

        def smallest() -> int | None:
            picks = self._least(lambda choice: float(choice.bytes), None, limits)
            return None if picks is None else self.problem.bytes(picks)

        def least(name: str) -> float | None:
            others = {other: limits[other] if other != name else math.inf for other in limits}
            picks = self._least(lambda choice: choice.costs[name], budget, others)
            return None if picks is None else self.problem.cost(name, picks)

        return Extremes(smallest, least)

    def _least(
        self, value: Callable[[Choice], float], budget: int | None, limits: Mapping[str, float]
    ) -> Picks | None:
        """The allocation of least `value` within the budgets, None when there is none."""
        items = []
        for item in self.problem.items:
            choices = tuple(replace(choice, loss=value(choice)) for choice in item.choices)
            items.append(replace(item, choices=choices))
        bounded = [name for name, limit in limits.items() if math.isfinite(limit)]
        table = Table.of(replace(self.problem, items=tuple(items)), bounded)
        capacity = self._capacity(table, budget, {name: limits[name] for name in bounded})
        picks = minimise(table, capacity, RELATIVE_GAP, TIME_LIMIT).picks
        return None if picks is None else tuple(int(pick) for pick in picks)

    def _capacity(
        self, table: Table, budget: int | None, limits: Mapping[str, float]
    ) -> np.ndarray:
        """What is left above the fixed costs and every item's smallest cost [constraints].

        Limits get half of the tolerance that `Problem.fits` grants them, so that sums in another
        order still pass there.
        """
        fixed = self.problem.fixed_costs
        left = [
            limit * (1 + COST_TOLERANCE / 2) - fixed.get(name, 0.0)
            for name, limit in limits.items()
        ]
        size = (self._largest if budget is None else budget) - self.problem.fixed_bytes
        return np.array([size, *left], float) - table.base_cost[: 1 + len(left)]


def solve(
    problem: Problem,
    budget: int | None,
    limits: Mapping[str, float] | None = None,
    *,
    relative_gap: float | None = None,
    time_limit: float = TIME_LIMIT,
) -> Solution:
    """The allocation of least loss within `budget` bytes (None: any) and `limits` on further costs.

    Raises SearchError when there is none; it says what would be possible and what it is made of.
    """
    return Solver(problem, limits).solve(budget, relative_gap=relative_gap, time_limit=time_limit)
