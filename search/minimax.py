"""The allocation whose worst task is best: minimise the largest of several sums of losses.

    minimise   max_t levels_t(choices)        levels_t: a task's relative increase times its weight
    such that  bytes and every further cost are within their limits

An epigraph variable makes it linear: minimise z where every task's sum is at most z. Its relaxation
gives each task a price, and prices that sum to one make a bound which rests on no solver's
tolerances: no allocation's largest sum is below the least sum at these prices,

    min max_t levels_t  >=  min sum_t price_t levels_t  >=  L(u)     (`relaxation.lagrangian`).

The allocation of least loss at these prices, found by the exact knapsack, is a first answer;
choices whose reduced cost exceeds its distance to the bound are in no better one, and HiGHS
searches the rest. At last bytes that the worst task cannot use go to the others: exchanges lower
the sum of all tasks without raising the largest.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_array, hstack

from quantlib.search.branch import ATTEMPTS, ROW_SCALE, Outcome, minimise
from quantlib.search.improve import exchange_near, improved
from quantlib.search.quiet import no_stdout
from quantlib.search.relaxation import Table, lagrangian, linear_bound

BALANCED_GAP = 1e-3
"""Stop when the largest increase is proven within this of the least possible: what is predicted of
a task is known to a percent, and each task makes one more item split in the relaxation."""
_PRICED_GAP = 1e-3
"""Of the first answer, which is only to be beaten."""
_EQUAL = 1e-9
"""Relative tolerance within which two largest increases are the same: sums of floats."""


def least_largest(
    table: Table,
    scales: np.ndarray,
    capacity: np.ndarray,
    relative_gap: float,
    time_limit: float,
) -> Outcome:
    """The picks whose largest level is least, within `capacity` of the table's first constraints.

    table: its last constraints are the losses of the tasks, as many as `scales` [tasks].
    capacity: what is left of the others above their base costs [constraints - tasks].
    Losses of the outcome's bounds are levels, the table's base included.
    """
    deadline = time.monotonic() + time_limit
    tasks = _Tasks(scales, len(capacity))
    fitting = table.fitting(np.concatenate([capacity, np.full(len(scales), np.inf)]))
    prices = tasks.prices(fitting, capacity) if fitting is not None else None
    if fitting is None or prices is None:
        return Outcome(None, np.inf, np.inf, True)
    priced = tasks.priced(fitting, prices)
    bound = lagrangian(priced, capacity, prices.constraints)
    lower = bound.value + priced.base_loss
    first = minimise(priced, capacity, _PRICED_GAP, time_limit / 4)
    if first.picks is None:
        return Outcome(None, lower, lower, first.finished)
    best = fitting.rows(first.picks)
    lower = max(lower, first.proven + priced.base_loss)
    proven, finished = lower, True
    value = tasks.largest(fitting, best)
    if not _near(value, lower, relative_gap):
        # a better allocation with this row exists only if the bound and its reduced cost allow it;
        # beyond rounding, so that no choice is lost to it, and what `best` takes stays
        distance = value - (bound.value + priced.base_loss)
        keep = bound.reduced <= distance * (1 + 1e-9) + 1e-12 * value
        keep[best] = True
        best, proven, finished = _searched(
            fitting, tasks, capacity, keep, best, lower, relative_gap, deadline
        )
        finished = finished or _near(tasks.largest(fitting, best), proven, relative_gap)
    best = _least_sum(fitting, tasks, capacity, best)
    return Outcome(fitting.choice[best], lower, proven, finished)


class _Prices(NamedTuple):
    """Multipliers of the relaxation: of the tasks [tasks], summing to 1, and of the constraints."""

    tasks: np.ndarray
    constraints: np.ndarray


class _Tasks(NamedTuple):
    """Where a table keeps its tasks: their factors, after so many other constraints."""

    scales: np.ndarray
    others: int

    def levels(self, table: Table) -> np.ndarray:
        """[tasks, rows] above each item's least."""
        return self.scales[:, None] * table.cost[self.others :]

    def base(self, table: Table) -> np.ndarray:
        """[tasks] Sums of the least of every item."""
        return np.asarray(self.scales * table.base_cost[self.others :])

    def largest(self, table: Table, rows: np.ndarray) -> float:
        """The largest level of `rows`, one per item."""
        return float((self.base(table) + self.levels(table)[:, rows].sum(axis=1)).max())

    def priced(self, table: Table, prices: _Prices) -> Table:
        """The table without tasks, whose loss is their levels at these prices."""
        return replace(
            table,
            loss=prices.tasks @ self.levels(table),
            cost=table.cost[: self.others],
            base_loss=float(prices.tasks @ self.base(table)),
            base_cost=table.base_cost[: self.others],
        )

    def prices(self, table: Table, capacity: np.ndarray) -> _Prices | None:
        """Those of the linear relaxation, None when it has no solution."""
        levels, base = self.levels(table), self.base(table)
        unit = float(levels.max() + base.max()) or 1.0
        units = np.where(capacity > 0, capacity, 1.0)
        result = linprog(
            _epigraph_cost(table),
            A_ub=_epigraph_rows(table.cost[: self.others] / units[:, None], levels / unit),
            b_ub=np.concatenate([capacity / units, -base / unit]),
            A_eq=_one_each(table),
            b_eq=np.ones(table.items),
            bounds=(0, None),
            method="highs",
        )
        if result.status == 2:
            return None
        equal = np.full(len(base), 1 / len(base))
        if result.status != 0:
            return _Prices(equal, np.zeros(len(capacity)))
        multipliers = np.maximum(0.0, -result.ineqlin.marginals)
        total = float(multipliers[self.others :].sum())
        if total <= 0:
            return _Prices(equal, np.zeros(len(capacity)))
        multipliers /= total
        constraints = multipliers[: self.others] * unit / units
        return _Prices(multipliers[self.others :], constraints)


def _searched(
    table: Table,
    tasks: _Tasks,
    capacity: np.ndarray,
    keep: np.ndarray,
    best: np.ndarray,
    lower: float,
    relative_gap: float,
    deadline: float,
) -> tuple[np.ndarray, float, bool]:
    """(better rows, proven bound, whether time sufficed), by HiGHS over the rows to `keep`.

    When an answer does not fit after all, the capacity is tightened by the overshoot and HiGHS is
    asked again; the proven bound stays that of the first, untightened answer.
    """
    value, proven, asked = tasks.largest(table, best), lower, capacity
    origin = np.flatnonzero(keep)
    core, unit = table.select(keep), value or 1.0
    for attempt in range(ATTEMPTS):
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            return best, proven, False
        result = _epigraph(core, tasks, asked, unit, relative_gap, seconds)
        if attempt == 0 and result.mip_dual_bound is not None:
            proven = max(proven, min(value, float(result.mip_dual_bound) * unit))
        if result.x is None:
            return best, proven, result.status == 2
        rows = origin[core.least(-result.x[:-1])]
        over = table.cost[: tasks.others, rows].sum(axis=1) - capacity
        if (over <= 0).all():
            if tasks.largest(table, rows) < value:
                best = rows
            return best, proven, result.status == 0
        asked = asked - np.maximum(0.0, over)
    return best, proven, False


def _least_sum(table: Table, tasks: _Tasks, capacity: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Rows with no larger a largest level than `best` and a smaller sum of all tasks, if exchanges
    find any. Not proven: the tolerance on the largest is so tight that proofs would take minutes.
    """
    levels = tasks.levels(table)
    summed = replace(table, loss=levels.sum(axis=0), base_loss=float(tasks.base(table).sum()))
    value = tasks.largest(table, best) * (1 + _EQUAL)
    allowed = np.concatenate([capacity, (value - tasks.base(table)) / tasks.scales])
    bound = linear_bound(summed, allowed)
    if bound is None:  # by rounding: `best` is an allocation within these limits
        return best
    found = [best, exchange_near(summed, allowed, best, bound.reduced)]
    other = improved(summed, allowed, bound)
    found += [] if other is None else [other]
    return min(found, key=lambda rows: float(summed.loss[rows].sum()))


def _near(value: float, lower: float, relative_gap: float) -> bool:
    return value - lower <= relative_gap * abs(value)


# -- the epigraph form: one variable for every row of the table, and z ----------------------------


def _epigraph_cost(table: Table) -> np.ndarray:
    return np.append(np.zeros(len(table.loss)), 1.0)


def _epigraph_rows(cost: np.ndarray, levels: np.ndarray) -> csr_array:
    """[constraints + tasks, rows + 1]: costs, and levels less z."""
    z = np.concatenate([np.zeros(len(cost)), -np.ones(len(levels))])
    return csr_array(hstack([csr_array(np.vstack([cost, levels])), csr_array(z[:, None])]))


def _one_each(table: Table) -> csr_array:
    """[items, rows + 1] Which rows belong to which item."""
    rows = len(table.loss)
    return csr_array((np.ones(rows), (table.item, np.arange(rows))), shape=(table.items, rows + 1))


def _epigraph(
    core: Table, tasks: _Tasks, capacity: np.ndarray, unit: float, gap: float, seconds: float
) -> OptimizeResult:
    """HiGHS on the core; levels in `unit`s, every other constraint scaled as in `branch`."""
    scale = np.maximum(1.0, np.abs(capacity)) / ROW_SCALE
    rows = _epigraph_rows(core.cost[: tasks.others] / scale[:, None], tasks.levels(core) / unit)
    upper = np.concatenate([capacity / scale, -tasks.base(core) / unit])
    count = len(core.loss)
    with no_stdout():
        return milp(
            _epigraph_cost(core),
            integrality=np.append(np.ones(count), 0.0),
            bounds=Bounds(0, np.append(np.ones(count), np.inf)),
            constraints=[
                LinearConstraint(_one_each(core), 1, 1),
                LinearConstraint(rows, -np.inf, upper),
            ],
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )
