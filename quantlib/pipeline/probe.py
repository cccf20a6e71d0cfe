"""Probes: a few plans whose losses are really measured, so that a predicted loss becomes a
prediction with an interval: of KL, or of the divergence in every task.

The sum of predicted losses leaves out cross terms between weights; how much that matters is a
property of the model, and a handful of measured plans shows it (`search.calibrate`). Probes are the
solver's own plans at budgets spread evenly, in bits, from near the smallest possible size to where
losses vanish: the plans people ask for lie between them.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantlib.errors import SearchError
from quantlib.evaluation.estimate import Estimate
from quantlib.pipeline.dense import Trials, measured_kl
from quantlib.pipeline.plan import TASK
from quantlib.pipeline.run import Run
from quantlib.pipeline.task_trials import TaskTrials
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
    trials = _KlTrials(run) if run.workload is None else TaskTrials(run)
    plans = probe_plans(problem, run.recipe.probes)
    missing = [plan for plan in plans if not trials.has(plan)]
    with run.stage("probe", len(missing)) as progress:
        for plan in missing:
            found = trials.measure(plan)
            progress.tick(", ".join(f"{_named(task)} {e.value:.3g}" for task, e in found.items()))
    measured = [trials.measure(plan) for plan in plans]
    calibrations = {}
    for task in run.tasks:
        points = [
            (_predicted(table, plan, task), found[task].value, found[task].standard_error or 0.0)
            for plan, found in zip(plans, measured, strict=True)
        ]
        # A plan that loses nothing that could be measured says nothing about the ones that do.
        try:
            calibrations[task] = Calibration.fit([p for p in points if min(p[:2]) > 0])
        except SearchError as error:
            run.progress.say(f"predicted losses of {_named(task)} have no interval: {error}")
    return table.with_calibrations(calibrations)


class _KlTrials:
    """`task_trials.TaskTrials` of a language model: its one task is KL on held-back windows."""

    def __init__(self, run: Run) -> None:
        self._trials = Trials(run)

    def has(self, plan: Mapping[str, str]) -> bool:
        return self._trials.has(plan)

    def measure(self, plan: Mapping[str, str]) -> dict[str, Estimate]:
        return {TASK: measured_kl(self._trials.measure(plan))}


def _named(task: str) -> str:
    return "KL" if task == TASK else task


def _predicted(table: Sensitivity, plan: Mapping[str, str], task: str) -> float:
    return sum(table.entry(name, scheme).loss[task] for name, scheme in plan.items())


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
