"""Probes: a few plans whose losses are really measured, so that a predicted loss becomes a
prediction with an interval: of KL, or of the divergence in every task.

The sum of predicted losses leaves out cross terms between weights; how much that matters is a
property of the model, and a handful of measured plans shows it (`search.calibrate`). Probes are the
solver's own plans at budgets spread evenly, in bits, from near the smallest possible size to where
losses vanish: the plans people ask for lie between them.

Of a model of several parts, losses of some parts are predicted further off than those of others. A
few more plans, each of which rounds one part, say how far; the table's losses are multiplied by
what they say (`search.factors`) before probes are drawn from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from quantlib.checkpoint.disk import atomic_write_json
from quantlib.checkpoint.provenance import digest
from quantlib.errors import SearchError
from quantlib.evaluation.estimate import Estimate
from quantlib.models.modelmap import ModelMap
from quantlib.pipeline.dense import Trials, measured_kl
from quantlib.pipeline.plan import TASK, Budget, allocation_problem
from quantlib.pipeline.run import Run
from quantlib.pipeline.task_trials import TaskTrials
from quantlib.search.calibrate import Calibration
from quantlib.search.factors import Trial, fit_factors, part_of, plans_alone
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.solve import Solver

PROBE_RANGE = (0.06, 0.80)
"""Budgets of the probes as fractions of the way from the smallest plan to the best one. Below,
losses grow too fast to describe plans anyone wants; above, they are lost in the noise."""
FACTORS_FILE = "factors.json"
"""Task -> part (`search.factors`) -> what the losses of its weights were multiplied with."""
LEAST_SHARE = 0.02
"""Components with a smaller share of the parameters that are quantized are not tried alone: it is
cheap to give them their best."""


def probe(run: Run, table: Sensitivity, problem: Problem) -> Sensitivity:
    """The table with its calibration, measuring what is not yet in the work directory; of a model
    of several parts, with corrected losses.

    Where no line can be fitted (too few candidates for three different plans) the table has none,
    and the run says so.
    """
    if not run.recipe.probes:
        return table
    if run.workload is None:
        return _calibrated(run, table, _KlTrials(run), probe_plans(problem, run.recipe.probes))
    trials = TaskTrials(run)
    table = _corrected(run, table, trials, plans_alone(problem, large_components(run.model_map)))
    problem = allocation_problem(run.model_map, table, Budget())
    return _calibrated(run, table, trials, probe_plans(problem, run.recipe.probes))


def large_components(model_map: ModelMap) -> dict[str, str]:
    """Weight -> component, of components that hold LEAST_SHARE of the quantized parameters."""
    sizes: dict[str, int] = {}
    for weight in model_map.weights:
        sizes[weight.component] = sizes.get(weight.component, 0) + weight.parameters
    least = LEAST_SHARE * sum(sizes.values())
    return {w.name: w.component for w in model_map.weights if sizes[w.component] >= least}


def _corrected(
    run: Run, table: Sensitivity, trials: TaskTrials, plans: Sequence[Mapping[str, str]]
) -> Sensitivity:
    """The table with the losses of every part multiplied by its factor, task by task."""
    component_of = {weight.name: weight.component for weight in run.model_map.weights}
    if len(set(component_of.values())) < 2:
        return table
    measured = _measured(run, trials, plans)
    factors = {
        task: fit_factors(
            [
                Trial(_sums(table, plan, task, component_of), e.value, e.standard_error or 0.0)
                for plan, e in zip(plans, (found[task] for found in measured), strict=True)
            ]
        )
        for task in run.tasks
    }
    atomic_write_json(run.work.path / FACTORS_FILE, factors)
    for task, found in factors.items():
        if found:
            said = "; ".join(f"{name} {factor:.2f}" for name, factor in found.items())
            run.progress.say(f"predicted losses of {task} are multiplied by parts: {said}")
    corrected = table.corrected(
        lambda weight, scheme, task: factors[task].get(part_of(component_of[weight], scheme), 1.0)
    )
    return replace(corrected, provenance={**table.provenance, "factors": digest(factors)})


def _sums(
    table: Sensitivity, plan: Mapping[str, str], task: str, component_of: Mapping[str, str]
) -> dict[str, float]:
    """Part -> sum of the predicted losses of its weights in a plan."""
    found: dict[str, float] = {}
    for name, scheme in plan.items():
        part = part_of(component_of[name], scheme)
        found[part] = found.get(part, 0.0) + table.entry(name, scheme).loss[task]
    return found


def _measured(
    run: Run, trials: TaskTrials | _KlTrials, plans: Sequence[Mapping[str, str]]
) -> list[dict[str, Estimate]]:
    """What was measured of each plan, now or before."""
    missing = [plan for plan in plans if not trials.has(plan)]
    with run.stage("probe", len(missing)) as progress:
        for plan in missing:
            found = trials.measure(plan)
            progress.tick(", ".join(f"{_named(task)} {e.value:.3g}" for task, e in found.items()))
    return [trials.measure(plan) for plan in plans]


def _calibrated(
    run: Run,
    table: Sensitivity,
    trials: TaskTrials | _KlTrials,
    plans: Sequence[Mapping[str, str]],
) -> Sensitivity:
    """The table with a line through measured plans for every task that has one."""
    measured = _measured(run, trials, plans)
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
    """Up to `count` different plans, weight -> scheme, at budgets spread over PROBE_RANGE; nothing
    in them stays as it is."""
    problem = problem.rounding()
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
