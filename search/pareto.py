"""Size against loss, latency against loss: the same problem solved for many budgets. And size
against latency, at equal loss.

Preparing a problem (dominated choices, arrays) is shared by all points, and a point a
ten-thousandth above its optimum looks the same in a plot, so most points need no branch and bound
at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from quantlib.errors import SearchError
from quantlib.search.branch import minimise
from quantlib.search.calibrate import Calibration
from quantlib.search.problem import Item, Picks, Problem
from quantlib.search.relaxation import Table
from quantlib.search.solve import TIME_LIMIT, Solver

FRONT_GAP = 1e-4
"""Relative gap at which a point of a front counts as optimal."""
BALANCED_FRONT_GAP = 5e-3
"""The same where the largest of several tasks' losses is minimised, which takes longer to prove."""
NANO = 1e6
"""Steps of a millisecond in which a front over latency counts."""
DIRECTIONS = 7
"""Points on a line of equal loss, from all for size to all for latency."""
LINE_GAP = 3e-3
"""Relative gap at which they count as optimal."""


@dataclass(frozen=True)
class Point:
    """One allocation of a front.

    budget, bytes: bytes allowed and used. loss: predicted sum. gap: to the LP bound, relative.
    kl, kl_low, kl_high: calibrated KL with its 95 % interval, None without a calibration.
    costs: further costs, those that limit the front or that it is over.
    """

    budget: int
    bytes: int
    loss: float
    gap: float
    picks: Picks
    kl: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    costs: Mapping[str, float] = field(default_factory=dict)


class Place(NamedTuple):
    """Where a line of equal loss passes: bytes of a checkpoint, and a further cost."""

    bytes: int
    cost: float


def spread_budgets(problem: Problem, points: int = 24) -> list[int]:
    """Budgets from the smallest possible size to the largest useful one, evenly spaced in ratio."""
    low, high = problem.bytes(problem.smallest()), problem.bytes(problem.best())
    if low <= 0 or points < 2:
        return [high]
    inner = [round(float(size)) for size in np.geomspace(low, max(low, high), points)]
    return sorted({low, high, *(size for size in inner if low < size < high)})


def pareto_front(
    problem: Problem,
    budgets: Iterable[int] | None = None,
    *,
    calibration: Calibration | None = None,
    limits: Mapping[str, float] | None = None,
) -> list[Point]:
    """The best allocation for every budget, smallest first, each better than the one before.

    Budgets default to `spread_budgets`. A budget that is impossible, or that buys nothing over a
    smaller one, is left out; SearchError when that leaves nothing.
    """
    solver = Solver(problem, limits)
    gap = BALANCED_FRONT_GAP if problem.balanced else FRONT_GAP
    smallest = solver.smallest_size()
    wanted = sorted(set(budgets)) if budgets is not None else spread_budgets(problem)
    front: list[Point] = []
    for budget in wanted:
        if smallest is None or budget < smallest:
            continue
        solution = solver.solve(budget, relative_gap=gap)
        if front and not solution.loss < front[-1].loss:
            continue
        kl = calibration.predict(max(0.0, solution.loss)) if calibration is not None else ()
        found = Point(budget, solution.bytes, solution.loss, solution.gap, solution.picks, *kl)
        front.append(replace(found, costs=solution.costs))
    if not front:
        least = (
            "does not exist within the limits" if smallest is None else f"has {smallest:,} bytes"
        )
        raise SearchError(f"no budget of the front is possible: the smallest checkpoint {least}")
    return front


def cost_front(
    problem: Problem, name: str, points: int = 16, *, calibration: Calibration | None = None
) -> list[Point]:
    """The best allocation for every value of a further cost in milliseconds, at any size.

    From the least possible to what the best allocation takes, spread evenly in ratio; each point
    has its cost in `costs`. This is a front with the cost in place of bytes.
    """
    timed = _in_place_of_bytes(problem, name)
    front = pareto_front(timed, spread_budgets(timed, points), calibration=calibration)
    return [
        replace(
            point, bytes=problem.bytes(point.picks), costs={name: problem.cost(name, point.picks)}
        )
        for point in front
    ]


def _in_place_of_bytes(problem: Problem, name: str) -> Problem:
    """The problem with a cost, in NANO parts of it, where its bytes were."""

    def item_of(item: Item) -> Item:
        choices = tuple(
            replace(choice, bytes=round(NANO * choice.costs[name]), parts=())
            for choice in item.choices
        )
        return Item(item.name, (item.name,), choices, item.block)

    fixed = round(NANO * problem.fixed_costs.get(name, 0.0))
    return Problem(tuple(item_of(item) for item in problem.items), fixed)


def equal_loss(problem: Problem, name: str, loss: float) -> list[Place]:
    """Sizes and costs between which one may choose at this loss, smallest size first.

    Each minimises a weighted sum of both, within LINE_GAP, under the loss as its budget. Empty when
    no allocation loses so little.
    """
    table = Table.of(problem, (name,))
    allowed = np.array([loss - table.base_loss])
    if allowed[0] < 0:
        return []
    spans = table.cost.max(axis=1)
    units = np.where(spans > 0, spans, 1.0)[:, None]
    found = set()
    for share in np.linspace(0.0, 1.0, DIRECTIONS):
        # a little of the other one too, so that it is not wasted where it costs nothing
        weights = np.array([1.0 - share, share]) * 0.998 + 0.001
        swapped = _loss_for_cost(table, weights @ (table.cost / units))
        picks = minimise(swapped, allowed, LINE_GAP, TIME_LIMIT).picks
        if picks is not None:
            chosen = tuple(int(pick) for pick in picks)
            found.add(Place(problem.bytes(chosen), problem.cost(name, chosen)))
    return _undominated(sorted(found))


def _loss_for_cost(table: Table, price: np.ndarray) -> Table:
    """The table with `price` [rows] to minimise and the loss as the one constraint."""
    least = np.minimum.reduceat(price, table.starts)
    above = price - least[table.item]
    zero = np.zeros(1)
    return replace(
        table, loss=above, cost=table.loss[None, :], base_loss=float(least.sum()), base_cost=zero
    )


def _undominated(places: Sequence[Place]) -> list[Place]:
    """Of places by size, those with less cost than every smaller one."""
    kept: list[Place] = []
    for place in places:
        if not kept or place.cost < kept[-1].cost:
            kept.append(place)
    return kept
