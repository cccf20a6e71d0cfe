"""Size against loss: the same problem solved for many budgets.

Preparing a problem (dominated choices, arrays) is shared by all points, and a point a
ten-thousandth above its optimum looks the same in a plot, so most points need no branch and bound
at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from quantlib.errors import SearchError
from quantlib.search.calibrate import Calibration
from quantlib.search.problem import Picks, Problem
from quantlib.search.solve import Solver

FRONT_GAP = 1e-4
"""Relative gap at which a point of a front counts as optimal."""


@dataclass(frozen=True)
class Point:
    """One allocation of a front.

    budget, bytes: bytes allowed and used. loss: predicted sum. gap: to the LP bound, relative.
    kl, kl_low, kl_high: calibrated KL with its 95 % interval, None without a calibration.
    """

    budget: int
    bytes: int
    loss: float
    gap: float
    picks: Picks
    kl: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None


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
    smallest = solver.smallest_size()
    wanted = sorted(set(budgets)) if budgets is not None else spread_budgets(problem)
    front: list[Point] = []
    for budget in wanted:
        if smallest is None or budget < smallest:
            continue
        solution = solver.solve(budget, relative_gap=FRONT_GAP)
        if front and not solution.loss < front[-1].loss:
            continue
        kl = calibration.predict(max(0.0, solution.loss)) if calibration is not None else ()
        front.append(
            Point(budget, solution.bytes, solution.loss, solution.gap, solution.picks, *kl)
        )
    if not front:
        least = (
            "does not exist within the limits" if smallest is None else f"has {smallest:,} bytes"
        )
        raise SearchError(f"no budget of the front is possible: the smallest checkpoint {least}")
    return front
