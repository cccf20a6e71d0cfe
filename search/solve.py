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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from quantlib.errors import SearchError
from quantlib.search.branch import minimise
from quantlib.search.budget import format_size
from quantlib.search.problem import COST_TOLERANCE, Picks, Problem
from quantlib.search.relaxation import Table

RELATIVE_GAP = 1e-5
"""Stop when the loss is proven within this of the optimum: sensitivities are known to a percent."""
TIME_LIMIT = 30.0
"""Seconds until the best found so far is returned with its gap. Far above what is needed, because
an answer that depends on the clock cannot be reproduced."""


@dataclass(frozen=True)
class Solution:
    """An allocation and what is known about it.

    picks:      index of the choice of every item.
    bytes:      size of the whole checkpoint, fixed bytes included; never above `budget`.
    loss:       sum of the predicted losses.
    costs:      sums of the further costs that have limits.
    lp_bound:   no allocation within the budget, not even a fractional one, loses less than this.
    gap:        (loss - lp_bound) / |loss|: no search could do better by more than this.
    proven_gap: the same against the best bound known after branch and bound, which is tighter.
    optimal:    proven within the requested gap; False when time ran out first.
    """

    picks: Picks
    bytes: int
    loss: float
    budget: int
    lp_bound: float
    gap: float
    proven_gap: float
    optimal: bool
    seconds: float
    costs: Mapping[str, float] = field(default_factory=dict)


class Solver:
    """A problem prepared once and solved for any number of budgets (a front, a second `--size`)."""

    def __init__(self, problem: Problem, limits: Mapping[str, float] | None = None) -> None:
        """`limits`: further cost -> the most its sum may be.

        Raises SearchError for a problem without items and for a choice without such a cost.
        """
        if not problem.items:
            raise SearchError("there is no weight to choose a scheme for")
        self.problem = problem
        self.limits = dict(limits or {})
        if not all(math.isfinite(limit) and limit >= 0 for limit in self.limits.values()):
            raise SearchError(f"limits must be finite and not negative, and they are {self.limits}")
        self._table = Table.of(problem, tuple(self.limits))

    def solve(
        self, budget: int, *, relative_gap: float = RELATIVE_GAP, time_limit: float = TIME_LIMIT
    ) -> Solution:
        """The allocation of least loss within `budget` bytes. SearchError when there is none."""
        start = time.monotonic()
        capacity = self._capacity(self._table, budget)
        outcome = minimise(self._table, capacity, relative_gap, time_limit)
        if outcome.picks is None:
            raise SearchError(self._impossible(budget))
        picks = tuple(int(pick) for pick in outcome.picks)
        if not self.problem.fits(picks, budget, self.limits):
            raise SearchError(
                "the solver's answer does not fit: a bug of quantlib, please report it"
            )
        loss = self.problem.loss(picks)
        lp_bound = min(loss, self._table.base_loss + outcome.lp_bound)
        proven = min(loss, max(lp_bound, self._table.base_loss + outcome.proven))
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
            costs={name: self.problem.cost(name, picks) for name in self.limits},
        )

    def smallest_size(self) -> int | None:
        """Bytes of the smallest checkpoint within the limits, None when there is none at all."""
        if not self.limits:
            return self.problem.bytes(self.problem.smallest())
        table = Table.of(_by_size(self.problem), tuple(self.limits))
        unlimited = self.problem.fixed_bytes + sum(
            max(choice.bytes for choice in item.choices) for item in self.problem.items
        )
        picks = minimise(table, self._capacity(table, unlimited), RELATIVE_GAP, TIME_LIMIT).picks
        return None if picks is None else self.problem.bytes(tuple(int(pick) for pick in picks))

    def _capacity(self, table: Table, budget: int) -> np.ndarray:
        """What is left above every item's smallest cost [constraints].

        Limits get half of the tolerance that `Problem.fits` grants them, so that sums in another
        order still pass there.
        """
        limits = [limit * (1 + COST_TOLERANCE / 2) for limit in self.limits.values()]
        return np.array([budget - self.problem.fixed_bytes, *limits], float) - table.base_cost

    def _impossible(self, budget: int) -> str:
        """Why there is no solution: the smallest possible size, and what makes it that large."""
        smallest = self.smallest_size()
        if smallest is None:
            return f"no allocation is within the limits {self.limits} at any size: raise them"
        if smallest <= budget:
            return (
                f"no allocation of at most {budget:,} bytes within the limits {self.limits} was "
                "found in time: allow more time, or more bytes"
            )
        fixed = self.problem.fixed_bytes
        reasons = [f"{fixed:,} bytes are fixed (what stays in 16 bits, headers)"]
        reasons += [f"{rule} adds {extra:,}" for rule, extra in self.problem.rule_bytes.items()]
        reasons += [f"{name} is limited to {limit:g}" for name, limit in self.limits.items()]
        return (
            f"a budget of {budget:,} bytes ({format_size(budget)}) is impossible: the smallest "
            f"possible checkpoint has {smallest:,} bytes ({format_size(smallest)}); of these, "
            + "; ".join(reasons)
        )


def _by_size(problem: Problem) -> Problem:
    """The same problem with bytes for losses."""
    items = []
    for item in problem.items:
        choices = tuple(replace(choice, loss=float(choice.bytes)) for choice in item.choices)
        items.append(replace(item, choices=choices))
    return replace(problem, items=tuple(items))


def solve(
    problem: Problem,
    budget: int,
    limits: Mapping[str, float] | None = None,
    *,
    relative_gap: float = RELATIVE_GAP,
    time_limit: float = TIME_LIMIT,
) -> Solution:
    """The allocation of least loss within `budget` bytes and `limits` on further costs.

    Raises SearchError when there is none; it says the smallest possible size and what makes it so.
    """
    return Solver(problem, limits).solve(budget, relative_gap=relative_gap, time_limit=time_limit)
