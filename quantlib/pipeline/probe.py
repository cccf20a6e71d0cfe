"""Probes: a few plans whose KL is really measured, so that a predicted loss becomes a prediction of
KL with an interval.

The sum of predicted losses leaves out cross terms between weights; how much that matters is a
property of the model, and a handful of measured plans shows it (`search.calibrate`). Probes are the
solver's own plans at budgets spread evenly, in bits, from near the smallest possible size to where
losses vanish: the plans people ask for lie between them.
"""

from __future__ import annotations

from quantlib.errors import SearchError
from quantlib.pipeline.dense import Trials, measured_kl
from quantlib.pipeline.run import Run
from quantlib.search.calibrate import Calibration
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.solve import Solver

PROBE_RANGE = (0.06, 0.80)
"""Budgets of the probes as fractions of the way from the smallest plan to the best one. Below,
losses grow too fast to describe plans anyone wants; above, they are lost in the noise."""


def probe(run: Run, table: Sensitivity, problem: Problem) -> Sensitivity:
    """The table with its calibration, measuring what is not yet in the work directory.

    Where no line can be fitted (too few candidates for three different plans) the table stays as it
    is, and the run says so.
    """
    if not run.recipe.probes:
        return table
    trials = Trials(run)
    plans = probe_plans(problem, run.recipe.probes)
    missing = [plan for plan in plans if not trials.has(plan)]
    with run.stage("probe", len(missing)) as progress:
        for plan in missing:
            progress.tick(f"KL {measured_kl(trials.measure(plan)).value:.3g}")
    points = []
    for plan in plans:
        kl = measured_kl(trials.measure(plan))
        predicted = sum(
            table.entry(name, scheme).loss[problem.task] for name, scheme in plan.items()
        )
        points.append((predicted, kl.value, kl.standard_error or 0.0))
    # A plan that loses nothing that could be measured says nothing about the ones that do.
    try:
        calibration = Calibration.fit([point for point in points if min(point[:2]) > 0])
    except SearchError as error:
        run.progress.say(f"predicted losses have no interval: {error}")
        return table
    return table.with_calibration(calibration)


def probe_plans(problem: Problem, count: int) -> list[dict[str, str]]:
    """Up to `count` different plans, weight -> scheme, at budgets spread over PROBE_RANGE."""
    solver = Solver(problem)
    low, high = problem.bytes(problem.smallest()), problem.bytes(problem.best())
    first, last = PROBE_RANGE
    plans: list[dict[str, str]] = []
    for index in range(count):
        share = first + (last - first) * index / max(1, count - 1)
        plan = problem.schemes(solver.solve(int(low + share * (high - low))).picks)
        if plan not in plans:
            plans.append(plan)
    return plans
