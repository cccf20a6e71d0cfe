"""Branch and bound on the table of choices: from the relaxation's bound to a proven optimum.

First a good allocation is found without any search: everybody's best choice at the bound's prices,
made to fit, then improved by exchanges. Often it is already proven. If not, there is one branch per
open choice of the *largest* item: a language model's embedding may be a fifth of it, and one such
item, split between two choices in the relaxation, is nearly all of the gap. With it fixed the
relaxation is tight, most branches are cut off by their bound, and what HiGHS gets of the others is
a core of a few hundred choices.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array, vstack

from quantlib.search.improve import fill, improved
from quantlib.search.quiet import no_stdout
from quantlib.search.relaxation import Bound, Table, linear_bound

ATTEMPTS = 5
"""How often HiGHS is asked again when its tolerances let something through that does not fit."""
ROW_SCALE = 1e6
"""Right-hand side of a scaled constraint. HiGHS allows 1e-6 of excess: 0.1 byte of a file of
1e11."""


class Outcome(NamedTuple):
    """What is known about the least loss that fits.

    picks:    the choice of every item [items], or None when nothing that fits was found.
    lp_bound: bound of the linear relaxation, in loss above the table's base.
    proven:   the best bound after the search, likewise.
    finished: whether the search came to its end; False when it ran out of time.
    """

    picks: np.ndarray | None
    lp_bound: float
    proven: float
    finished: bool


def minimise(table: Table, capacity: np.ndarray, relative_gap: float, time_limit: float) -> Outcome:
    """The picks of least loss within `capacity` [constraints], what is left above the base costs.

    Stops when the loss is proven within `relative_gap` of the optimum, or after `time_limit` s.
    """
    deadline = time.monotonic() + time_limit
    fitting = table.fitting(capacity)
    bound = linear_bound(fitting, capacity) if fitting is not None else None
    if fitting is None or bound is None:
        return Outcome(None, math.inf, math.inf, True)
    best = _Incumbent(table.base_loss, relative_gap)
    best.offer(fitting, improved(fitting, capacity, bound))
    proven, finished = bound.value, True
    if not best.beats(bound.value):
        proven, finished = _branches(fitting, capacity, bound, best, deadline)
    if best.picks is None:
        return Outcome(None, bound.value, proven, finished)
    rows = fill(fitting, capacity, fitting.rows(best.picks))
    return Outcome(fitting.choice[rows], bound.value, proven, finished)


class _Incumbent:
    """The best feasible allocation so far: `picks` (None before the first), `loss` above base."""

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
        known = self.picks is not None
        return self._relative_gap * abs(self._base_loss + self.loss) if known else 0.0

    def beats(self, bound: float) -> bool:
        """Whether there is nothing to gain where no allocation loses less than `bound`."""
        return self.loss - bound <= self.tolerance


def _branches(
    table: Table, capacity: np.ndarray, bound: Bound, best: _Incumbent, deadline: float
) -> tuple[float, bool]:
    """Improve `best` branch by branch; returns a proven bound and whether time sufficed."""
    largest = table.item == int(np.maximum.reduceat(table.cost[0], table.starts).argmax())
    branches: list[tuple[Table, Bound]] = []
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
            best.offer(branch, improved(branch, capacity, limit))
    finished = True
    for branch, limit in branches:
        floor, done = limit.value, True
        if not best.beats(floor):
            floor, done = _core(branch, capacity, limit, best, deadline)
        proven, finished = min(proven, floor), finished and done
    return proven, finished


def _core(
    table: Table, capacity: np.ndarray, bound: Bound, best: _Incumbent, deadline: float
) -> tuple[float, bool]:
    """Improve `best` by HiGHS over the choices that `bound` leaves open; returns as `_branches`.

    When an answer does not fit after all, the capacity is tightened by the overshoot and HiGHS is
    asked again; the proven bound stays that of the first, untightened answer.
    """
    distance = best.loss - bound.value
    core, unit, gap = table, float(table.loss.max()) or 1.0, 0.0
    if math.isfinite(distance):
        # beyond rounding, so that no choice is lost to it
        margin = 1e-9 * distance + 1e-12 * float(table.loss.max())
        core = table.select(bound.reduced <= distance + margin)
        unit = max(distance, 1e-12 * best.loss)
        gap = best.tolerance / max(best.loss, unit)
    proven, asked = bound.value, capacity
    for attempt in range(ATTEMPTS):
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            return proven, False
        result = _milp(core, asked, unit, gap, seconds)
        if attempt == 0 and result.mip_dual_bound is not None:
            proven = max(proven, float(result.mip_dual_bound) * unit)
        if result.x is None:
            infeasible = result.status == 2 and attempt == 0
            return (math.inf if infeasible else proven), result.status == 2
        rows = core.least(-result.x)
        over = core.cost[:, rows].sum(axis=1) - capacity
        if (over <= 0).all():
            best.offer(core, rows)
            return proven, result.status == 0
        asked = asked - np.maximum(0.0, over)
    return proven, False


def _milp(
    core: Table, capacity: np.ndarray, unit: float, gap: float, seconds: float
) -> OptimizeResult:
    """HiGHS on the core, with losses in `unit`s and every constraint scaled to ROW_SCALE."""
    rows = len(core.loss)
    scale = np.maximum(1.0, np.abs(capacity)) / ROW_SCALE
    choose = csr_array((np.ones(rows), (core.item, np.arange(rows))), shape=(core.items, rows))
    limits = vstack([csr_array(cost[None, :]) for cost in core.cost / scale[:, None]])
    with no_stdout():
        return milp(
            core.loss / unit,
            integrality=np.ones(rows),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(choose, 1, 1),
                LinearConstraint(limits, -np.inf, capacity / scale),
            ],
            # the core has already been reduced further than a presolve would
            options={"mip_rel_gap": gap, "time_limit": seconds, "presolve": False},
        )
