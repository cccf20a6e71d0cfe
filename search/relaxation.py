"""What is known about an allocation without searching: which choices never matter, and a bound.

A multiple-choice knapsack is mostly decided by its linear relaxation: with m constraints at most m
items are fractional in an optimal vertex (Sinha and Zoltners, Oper. Res. 27, 1979). So we solve the
LP, and from its multipliers compute the Lagrangian bound

    L(u) = sum_i min_j (loss_ij + u . cost_ij) - u . capacity

ourselves: it is a lower bound for *any* u >= 0, so the certificate does not rest on a solver's
tolerances. A choice whose reduced cost exceeds the distance between L and a known feasible loss is
in no better solution and is dropped. What is left is a core of a few choices per item, and that is
what `branch.py` searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

from quantlib.errors import SearchError
from quantlib.search.problem import Choice, Problem


def undominated(choices: Sequence[Choice], limited: Sequence[str] = ()) -> list[int]:
    """Indices of the choices that no other one matches or beats in bytes, loss and `limited` costs.

    This keeps choices off the convex hull, which an optimum of the integer problem may need.
    """
    keys = [
        (choice.bytes, choice.loss, *(choice.costs[name] for name in limited)) for choice in choices
    ]
    order = sorted(range(len(keys)), key=lambda index: (keys[index], index))
    kept: list[int] = []
    for index in order:
        if not any(
            all(a <= b for a, b in zip(keys[other], keys[index], strict=True)) for other in kept
        ):
            kept.append(index)
    return sorted(kept)


@dataclass(frozen=True)
class Table:
    """Undominated choices of a problem as arrays: row r is choice `choice[r]` of item `item[r]`.

    Rows are sorted by item; `starts[i]` is item i's first row. `loss` [rows] and `cost`
    [constraints, rows] are what the row has above its item's own smallest; the sums of those
    smallest are `base_loss` and `base_cost`. Constraint 0 is bytes (whole numbers, exact in
    float64), the others are further costs.
    """

    item: np.ndarray
    choice: np.ndarray
    starts: np.ndarray
    loss: np.ndarray
    cost: np.ndarray
    base_loss: float
    base_cost: np.ndarray

    @staticmethod
    def of(problem: Problem, limited: Sequence[str] = ()) -> Table:
        """The table for constraints on bytes and on each of the costs in `limited`."""
        for item in problem.items:
            for name in limited:
                if not all(name in choice.costs for choice in item.choices):
                    raise SearchError(
                        f"{item.name} lacks a {name!r} cost in some scheme: measure it or drop its "
                        "limit"
                    )
        rows = [
            (index, pick, item.choices[pick])
            for index, item in enumerate(problem.items)
            for pick in undominated(item.choices, limited)
        ]
        owner = np.array([index for index, _, _ in rows], dtype=np.int64)
        loss = np.array([choice.loss for _, _, choice in rows])
        cost = np.array(
            [[choice.bytes, *(choice.costs[name] for name in limited)] for _, _, choice in rows],
            dtype=np.float64,
        ).T.reshape(1 + len(limited), len(rows))
        starts = np.searchsorted(owner, np.arange(len(problem.items)))
        least_loss = np.minimum.reduceat(loss, starts)
        least_cost = np.minimum.reduceat(cost, starts, axis=1)
        return Table(
            owner,
            np.array([pick for _, pick, _ in rows], dtype=np.int64),
            starts,
            loss - least_loss[owner],
            cost - least_cost[:, owner],
            float(least_loss.sum()),
            least_cost.sum(axis=1),
        )

    @property
    def items(self) -> int:
        return len(self.starts)

    def fitting(self, capacity: np.ndarray) -> Table | None:
        """The rows that fit with all other items at their smallest; None if an item has none."""
        keep = np.all(self.cost <= capacity[:, None], axis=0)
        return self.select(keep) if len(np.unique(self.item[keep])) == self.items else None

    def rows(self, picks: np.ndarray) -> np.ndarray:
        """The rows of `picks` (choices by item), one per item; they must be in the table."""
        return np.flatnonzero(self.choice == picks[self.item])

    def select(self, keep: np.ndarray) -> Table:
        """The rows where `keep` is true; every item must keep one."""
        owner = self.item[keep]
        return Table(
            owner,
            self.choice[keep],
            np.searchsorted(owner, np.arange(self.items)),
            self.loss[keep],
            self.cost[:, keep],
            self.base_loss,
            self.base_cost,
        )

    def feasible(self, rows: np.ndarray, capacity: np.ndarray) -> bool:
        """Whether `rows`, one per item, fit together."""
        return bool((self.cost[:, rows].sum(axis=1) <= capacity).all())

    def least(self, value: np.ndarray) -> np.ndarray:
        """[items] For each item its row with the least `value`, the first of several."""
        order = np.lexsort((np.arange(len(value)), value, self.item))
        return order[self.starts]


@dataclass(frozen=True)
class Bound:
    """A lower bound on the loss above base.

    multipliers: prices of the constraints it was computed with [constraints].
    reduced:     what choosing a row adds to the bound [rows], 0 for the best of each item.
    """

    value: float
    multipliers: np.ndarray
    reduced: np.ndarray


def lagrangian(table: Table, capacity: np.ndarray, multipliers: np.ndarray) -> Bound:
    """L(u) for `multipliers` u >= 0 and the `capacity` left above the base costs."""
    priced = table.loss + multipliers @ table.cost
    least = np.minimum.reduceat(priced, table.starts)
    return Bound(
        float(least.sum() - multipliers @ capacity), multipliers, priced - least[table.item]
    )


def linear_bound(table: Table, capacity: np.ndarray) -> Bound | None:
    """The bound of the linear relaxation, or None when even that is infeasible."""
    return (
        _bound_of_one(table, capacity) if len(capacity) == 1 else _bound_of_several(table, capacity)
    )


def _bound_of_one(table: Table, capacity: np.ndarray) -> Bound | None:
    """One constraint: L(u) is concave and made of straight pieces, so follow its chords to the top.

    Every price u gives an allocation, and that a line of L; the next price is where the last line
    that rises and the last one that does not meet. No price is visited twice, about ten are, and
    each costs one pass over the table.
    """

    def line(rows: np.ndarray) -> tuple[float, float]:
        return float(table.loss[rows].sum()), float(table.cost[0, rows].sum() - capacity[0])

    loss, over = line(table.least(table.loss))
    cheap_loss, cheap_over = line(table.least(table.cost[0]))
    if cheap_over > 0:
        return None
    price = 0.0
    for _ in range(len(table.loss)):
        if over <= 0:
            break
        price = (cheap_loss - loss) / (over - cheap_over)
        top = loss + price * over
        bound = lagrangian(table, capacity, np.array([price]))
        if bound.value >= top - 1e-12 * (abs(top) + table.loss.max()):
            return bound
        here = line(table.least(bound.reduced))
        if here[1] > 0:
            loss, over = here
        else:
            cheap_loss, cheap_over = here
    return lagrangian(table, capacity, np.array([price]))


def _bound_of_several(table: Table, capacity: np.ndarray) -> Bound | None:
    """Several constraints: HiGHS, scaled to order one; its multipliers are evaluated by us."""
    rows = len(table.loss)
    loss_unit = float(table.loss.max()) or 1.0
    units = np.where(capacity > 0, capacity, 1.0)
    result = linprog(
        table.loss / loss_unit,
        A_ub=csr_array(table.cost / units[:, None]),
        b_ub=capacity / units,
        A_eq=csr_array((np.ones(rows), (table.item, np.arange(rows))), shape=(table.items, rows)),
        b_eq=np.ones(table.items),
        bounds=(0, None),
        method="highs",
    )
    if result.status == 2:
        return None
    if result.status != 0:
        return lagrangian(table, capacity, np.zeros(len(capacity)))
    multipliers = np.maximum(0.0, -result.ineqlin.marginals) * loss_unit / units
    return lagrangian(table, capacity, multipliers)
