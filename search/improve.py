"""From a nearly feasible allocation to a good one: make it fit, spend what is left, exchange.

None of this proves anything. It gives branch and bound an allocation to beat, and the nearer that
one is to the bound, the fewer choices are left open to search.
"""

from __future__ import annotations

import numpy as np

from quantlib.search.relaxation import Bound, Table, lagrangian
from quantlib.search.swaps import NONE, best_swap

NEAR = 300
"""Rows that exchanges under several constraints look at, those nearest to the bound: beyond, they
are in no good allocation, and all pairs of these take a millisecond."""
NUDGE = 0.03
"""How far, relatively, each constraint's price is moved for further starts."""


def improved(table: Table, capacity: np.ndarray, bound: Bound) -> np.ndarray | None:
    """A good feasible allocation near the relaxation's, or None when none was found.

    One constraint: from the bound's prices. Several: also from prices around them, because what
    suits one constraint overspends another, and repairing that costs more than in one dimension.
    """
    if len(capacity) == 1:
        rows = repair(table, capacity, table.least(bound.reduced))
        return None if rows is None else exchange(table, capacity, rows)
    best: np.ndarray | None = None
    nudges = np.eye(len(capacity)) * NUDGE
    for factors in (np.ones(len(capacity)), *(1 + nudges), *(1 - nudges)):
        priced = lagrangian(table, capacity, bound.multipliers * factors)
        rows = repair(table, capacity, table.least(priced.reduced))
        if rows is None:
            continue
        rows = exchange_near(table, capacity, rows, bound.reduced)
        if best is None or table.loss[rows].sum() < table.loss[best].sum():
            best = rows
    return best


def repair(table: Table, capacity: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
    """Make `rows` (one per item) feasible by the changes that cost least loss per excess removed.

    Returns None when it gets stuck, which with several constraints does not prove infeasibility.
    """
    rows = rows.copy()
    units = np.where(capacity > 0, capacity, 1.0)[:, None]
    used = table.cost[:, rows].sum(axis=1)
    for _ in range(10 * table.items + 10):
        over = np.maximum(0.0, used - capacity)
        if not over.any():
            return rows
        change = table.cost - table.cost[:, rows[table.item]]
        left = np.maximum(0.0, used[:, None] + change - capacity[:, None])
        removed = ((over[:, None] - left) / units).sum(axis=0)
        price = table.loss - table.loss[rows[table.item]]
        score = np.full(len(price), np.inf)
        np.divide(price, removed, out=score, where=removed > 0)
        best = int(score.argmin())
        if not np.isfinite(score[best]):
            return None
        rows[table.item[best]] = best
        used = table.cost[:, rows].sum(axis=1)
    return None


def fill(table: Table, capacity: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Spend what `rows` leave: again and again the change that lowers the loss most and fits."""
    rows = rows.copy()
    while True:
        used = table.cost[:, rows].sum(axis=1)
        current = rows[table.item]
        fits = (used[:, None] + table.cost - table.cost[:, current] <= capacity[:, None]).all(
            axis=0
        )
        gain = np.where(fits, table.loss[current] - table.loss, 0.0)
        best = int(gain.argmax())
        if gain[best] <= 0:
            return rows
        rows[table.item[best]] = best


def exchange(table: Table, capacity: np.ndarray, rows: np.ndarray, rounds: int = 200) -> np.ndarray:
    """Fill, then apply the best exchange of two items (`swaps.py`) while one lowers the loss.

    For one constraint: exchanges look at bytes only.
    """
    rows = fill(table, capacity, rows)
    for _ in range(rounds):
        used = table.cost[:, rows].sum(axis=1)
        current = rows[table.item]
        change = table.cost[0] - table.cost[0, current]
        swap = best_swap(
            table.item, table.loss - table.loss[current], change, float(capacity[0] - used[0])
        )
        if swap is None:
            break
        swapped = rows.copy()
        for row in (swap.first, swap.second):
            if row != NONE:
                swapped[table.item[row]] = row
        if (
            not table.feasible(swapped, capacity)
            or not table.loss[swapped].sum() < table.loss[rows].sum()
        ):
            break
        rows = swapped
    return fill(table, capacity, rows)


def exchange_near(
    table: Table, capacity: np.ndarray, rows: np.ndarray, reduced: np.ndarray, rounds: int = 100
) -> np.ndarray:
    """The same under several constraints, among the NEAR rows of least `reduced` cost.

    No order of the changes serves two constraints at once, so all pairs are looked at.
    """
    rows = fill(table, capacity, rows)
    near = np.sort(np.argsort(reduced, kind="stable")[:NEAR])
    apart = table.item[near][:, None] != table.item[near][None, :]
    for _ in range(rounds):
        current = rows[table.item[near]]
        loss = table.loss[near] - table.loss[current]
        change = table.cost[:, near] - table.cost[:, current]
        slack = capacity - table.cost[:, rows].sum(axis=1)
        gain = np.where(apart, loss[:, None] + loss[None, :], 0.0)
        for freed, left in zip(change, slack, strict=True):
            gain[freed[:, None] + freed[None, :] > left] = 0.0
        first, second = divmod(int(gain.argmin()), len(near))
        swapped = rows.copy()
        for position in (first, second):
            swapped[table.item[near[position]]] = near[position]
        if (
            not gain[first, second] < 0
            or not table.feasible(swapped, capacity)
            or not table.loss[swapped].sum() < table.loss[rows].sum()
        ):
            break
        rows = swapped
    return fill(table, capacity, rows)
