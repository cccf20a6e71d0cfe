"""Who gets which bits: the multiple-choice knapsack, solved to a certificate.

    minimise   sum_i loss_i(choice_i)
    such that  fixed bytes + sum_i bytes_i(choice_i) <= budget, and every further cost within its limit

Peers fill greedily or stop at the first layer that overshoots; here the optimum is found by branch and bound (HiGHS, through
`scipy.optimize.milp`) on the core that the linear relaxation leaves open, and the answer comes with its distance to the
relaxation's bound. The solver is not trusted with arithmetic: losses span eight decades and files 1e11 bytes, so its answer is
recounted in whole numbers, its tolerances can never put a plan over budget, and the bound is our own (`relaxation.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array, vstack

from quantlib.errors import SearchError
from quantlib.search.budget import format_size
from quantlib.search.problem import COST_TOLERANCE, Item, Picks, Problem
from quantlib.search.quiet import no_stdout
from quantlib.search.relaxation import Bound, Table, exchange, fill, linear_bound, repair

RELATIVE_GAP = 1e-5
"""Stop when the loss is proven within this of the optimum: a thousandth of what a sensitivity is known to."""
TIME_LIMIT = 30.0
"""Seconds after which the best allocation found is returned with the gap it has by then."""


@dataclass(frozen=True)
class Solution:
    """An allocation and what is known about it.

    picks:      index of the choice of every item.
    bytes:      size of the whole checkpoint, fixed bytes included; never above `budget`.
    loss:       sum of the predicted losses.
    costs:      sums of the further costs that have limits.
    lp_bound:   no allocation within the budget, not even a fractional one, loses less than this.
    gap:        (loss - lp_bound) / |loss|: what is certainly not lost to the search.
    proven_gap: the same against the best bound known after branch and bound.
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
    """A problem prepared once and solved for as many budgets as one likes (a Pareto front, a second `--size`)."""

    def __init__(self, problem: Problem, limits: Mapping[str, float] | None = None) -> None:
        """`limits`: further cost -> the most its sum may be. Raises SearchError when a choice lacks such a cost."""
        if not problem.items:
            raise SearchError("there is no weight to choose a scheme for")
        self.problem = problem
        self.limits = dict(limits or {})
        if not all(math.isfinite(limit) and limit >= 0 for limit in self.limits.values()):
            raise SearchError(f"limits must be finite and not negative, and they are {self.limits}")
        self.table = Table.of(problem, tuple(self.limits))

    def solve(
        self, budget: int, *, relative_gap: float = RELATIVE_GAP, time_limit: float = TIME_LIMIT
    ) -> Solution:
        """The allocation of least loss within `budget` bytes. Raises SearchError when there is none."""
        start = time.monotonic()
        capacity = self._capacity(budget)
        table = self.table.fitting(capacity)
        bound = linear_bound(table, capacity) if table is not None else None
        best = _Incumbent(self.table.base_loss, relative_gap)
        if table is None or bound is None:
            raise SearchError(self._impossible(budget))
        proven, finished = _search(table, capacity, bound, best, start + time_limit)
        if best.picks is None:
            raise SearchError(self._impossible(budget))
        rows = fill(table, capacity, table.rows(best.picks))
        picks = tuple(int(pick) for pick in table.choice[rows])
        return self._certified(picks, budget, (bound.value, proven), finished, time.monotonic() - start)

    def smallest_size(self) -> int | None:
        """Bytes of the smallest checkpoint within the limits, or None when the limits alone are impossible."""
        if not self.limits:
            return self.problem.bytes(self.problem.smallest())
        by_size = [
            replace(item, choices=tuple(replace(choice, loss=float(choice.bytes)) for choice in item.choices))
            for item in self.problem.items
        ]
        solver = Solver(replace(self.problem, items=tuple(by_size)), self.limits)
        capacity = solver._capacity(self.problem.bytes(tuple(_largest(item) for item in self.problem.items)))
        table = solver.table.fitting(capacity)
        bound = linear_bound(table, capacity) if table is not None else None
        best = _Incumbent(solver.table.base_loss, RELATIVE_GAP)
        if table is not None and bound is not None:
            _search(table, capacity, bound, best, time.monotonic() + TIME_LIMIT)
        return None if best.picks is None else self.problem.bytes(tuple(int(pick) for pick in best.picks))

    def _capacity(self, budget: int) -> np.ndarray:
        """What is left above every item's smallest cost; the limits with half of the tolerance of `Problem.fits`."""
        limits = [limit * (1 + COST_TOLERANCE / 2) for limit in self.limits.values()]
        return np.array([budget - self.problem.fixed_bytes, *limits], dtype=np.float64) - self.table.base_cost

    def _certified(
        self, picks: Picks, budget: int, bounds: tuple[float, float], finished: bool, seconds: float
    ) -> Solution:
        """The solution recounted from the problem itself, in whole numbers where bytes are concerned."""
        if not self.problem.fits(picks, budget, self.limits):
            raise SearchError("the solver returned an allocation above the budget: a bug of quantlib, please report it")
        loss = self.problem.loss(picks)
        lp_bound, proven = (min(loss, self.table.base_loss + bound) for bound in bounds)
        proven = max(lp_bound, proven)
        size = abs(loss) or 1.0
        return Solution(
            picks,
            self.problem.bytes(picks),
            loss,
            budget,
            lp_bound,
            (loss - lp_bound) / size,
            (loss - proven) / size,
            finished,
            seconds,
            {name: self.problem.cost(name, picks) for name in self.limits},
        )

    def _impossible(self, budget: int) -> str:
        """Why there is no solution: the smallest possible size, and what makes it that large."""
        problem, smallest = self.problem, self.smallest_size()
        if smallest is None:
            return f"no allocation is within the limits {self.limits}, whatever the size: raise them"
        if smallest <= budget:
            return f"no allocation of at most {budget:,} bytes within the limits {self.limits} was found in time"
        reasons = [f"{problem.fixed_bytes:,} bytes are fixed (what stays in 16 bits, headers)"]
        reasons += [f"{rule} adds {extra:,}" for rule, extra in problem.rule_bytes.items()]
        reasons += [f"{name} is limited to {limit:g}" for name, limit in self.limits.items()]
        return (
            f"a budget of {budget:,} bytes ({format_size(budget)}) is impossible: the smallest possible checkpoint has "
            f"{smallest:,} bytes ({format_size(smallest)}); of these, {'; '.join(reasons)}"
        )


def solve(
    problem: Problem,
    budget: int,
    limits: Mapping[str, float] | None = None,
    *,
    relative_gap: float = RELATIVE_GAP,
    time_limit: float = TIME_LIMIT,
) -> Solution:
    """The allocation of least loss within `budget` bytes and `limits` on further costs. Raises SearchError if none."""
    return Solver(problem, limits).solve(budget, relative_gap=relative_gap, time_limit=time_limit)


class _Incumbent:
    """The best feasible allocation so far: `picks` (None before the first) and its `loss` above base."""

    def __init__(self, base_loss: float, relative_gap: float) -> None:
        self.picks: np.ndarray | None = None
        self.loss = math.inf
        self._base_loss, self._relative_gap = base_loss, relative_gap

    def offer(self, table: Table, rows: np.ndarray | None) -> None:
        """Take `rows` of `table`, a feasible allocation, if they lose less."""
        if rows is not None and table.loss[rows].sum() < self.loss:
            self.picks, self.loss = table.choice[rows], float(table.loss[rows].sum())

    @property
    def tolerance(self) -> float:
        """How far above a bound the loss may be and count as optimal."""
        return self._relative_gap * abs(self._base_loss + self.loss) if self.picks is not None else 0.0

    def beats(self, bound: float) -> bool:
        """Whether nothing worth having is left where no allocation loses less than `bound`."""
        return self.loss - bound <= self.tolerance


def _heuristic(table: Table, capacity: np.ndarray, bound: Bound) -> np.ndarray | None:
    """A good feasible allocation: everybody's best choice at the bound's prices, made to fit, improved by exchanges."""
    rows = repair(table, capacity, table.least(bound.reduced))
    return None if rows is None else exchange(table, capacity, rows)


def _search(
    table: Table, capacity: np.ndarray, bound: Bound, best: _Incumbent, deadline: float
) -> tuple[float, bool]:
    """Improve `best` to the optimum; returns a proven bound and whether time sufficed.

    One branch per open choice of the largest item, then HiGHS on each branch's core. A language model's embedding may be a
    fifth of it, and one such item, split between two choices in the relaxation, is nearly all of the gap; with it
    fixed the relaxation is tight, most branches are cut off by their bound, and the cores of the others are small.
    """
    best.offer(table, _heuristic(table, capacity, bound))
    if best.beats(bound.value):
        return bound.value, True
    largest = table.item == int(np.maximum.reduceat(table.cost[0], table.starts).argmax())
    branches = []
    proven = math.inf
    for row in np.flatnonzero(largest):
        floor = bound.value + float(bound.reduced[row])
        if best.beats(floor):
            proven = min(proven, floor)
            continue
        branch = table.select(~largest | (np.arange(len(largest)) == row)).fitting(capacity)
        limit = linear_bound(branch, capacity) if branch is not None else None
        if branch is not None and limit is not None:
            branches.append((branch, limit))
    branches.sort(key=lambda pair: pair[1].value)
    for branch, limit in branches:
        if not best.beats(limit.value):
            best.offer(branch, _heuristic(branch, capacity, limit))
    finished = True
    for branch, limit in branches:
        floor, done = limit.value, True
        if not best.beats(floor):
            floor, done = _branch_and_bound(branch, capacity, limit, best, deadline)
        proven, finished = min(proven, floor), finished and done
    return proven, finished


def _branch_and_bound(
    table: Table, capacity: np.ndarray, bound: Bound, best: _Incumbent, deadline: float
) -> tuple[float, bool]:
    """Improve `best` by HiGHS over the choices that the bound leaves open; returns a proven bound and whether time sufficed.

    Should HiGHS's tolerances let something through that does not fit, the capacity is tightened by the overshoot and it is
    asked again; the bound stays that of the first, untightened answer.
    """
    distance = best.loss - bound.value
    core, unit, gap = table, float(table.loss.max()) or 1.0, 1e-9
    if math.isfinite(distance):
        core = table.select(bound.reduced <= distance * (1 + 1e-9) + 1e-12 * float(table.loss.max()))
        unit = max(distance, 1e-12 * best.loss)
        gap = best.tolerance / max(best.loss, unit)
    proven, asked = bound.value, capacity
    for attempt in range(5):
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            return proven, False
        result = _milp(core, asked, unit, gap, seconds)
        if attempt == 0 and result.mip_dual_bound is not None and math.isfinite(result.mip_dual_bound):
            proven = max(proven, float(result.mip_dual_bound) * unit)
        if result.x is None:
            return (math.inf, True) if result.status == 2 and attempt == 0 else (proven, result.status != 1)
        rows = core.least(-result.x)
        over = core.cost[:, rows].sum(axis=1) - capacity
        if (over <= 0).all():
            best.offer(core, rows)
            return proven, result.status == 0
        asked = asked - np.maximum(0.0, over)
    return proven, False


def _milp(core: Table, capacity: np.ndarray, unit: float, gap: float, seconds: float) -> OptimizeResult:
    """HiGHS on the core: losses in `unit`s, each cost row scaled so that its right-hand side is at most 1e6.

    HiGHS allows a row 1e-6 of excess: at that scale less than one byte of a file of 1e11.
    """
    rows = len(core.loss)
    matrix, upper = [], []
    for cost, most in zip(core.cost, capacity, strict=True):
        scale = max(1.0, abs(most)) / 1e6
        matrix.append(csr_array(cost[None, :] / scale))
        upper.append(most / scale)
    choose = csr_array((np.ones(rows), (core.item, np.arange(rows))), shape=(core.items, rows))
    with no_stdout():
        return milp(
            core.loss / unit,
            integrality=np.ones(rows),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(choose, 1, 1),
                LinearConstraint(vstack(matrix), -np.inf, np.array(upper)),
            ],
            # the core has been reduced further than a presolve would
            options={"mip_rel_gap": gap, "time_limit": seconds, "presolve": False},
        )
