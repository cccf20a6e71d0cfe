"""Probes: a few plans whose KL is really measured, so that a predicted loss becomes a prediction of KL with an interval.

The sum of predicted losses leaves out cross terms between weights; how much that matters is a property of the model, and
a handful of measured plans shows it (`search.calibrate`). Probes are the solver's own plans at budgets spread
evenly, in bits, from near the smallest possible size to where losses vanish: the plans people ask for lie between them.
"""

from __future__ import annotations

from quantlib.checkpoint.provenance import digest
from quantlib.checkpoint.workdir import WorkDir
from quantlib.pipeline.dense import DenseTrial
from quantlib.pipeline.run import Run
from quantlib.search.calibrate import Calibration
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.solve import solve

KIND = "probe"
PROBE_RANGE = (0.06, 0.80)
"""Budgets of the probes as fractions of the way from the smallest plan to the best one. Below, losses grow too fast to
describe plans anyone wants; above, they are lost in the noise."""


def probe(run: Run, table: Sensitivity, problem: Problem) -> Sensitivity:
    """The table with its calibration, measuring what is not yet in the work directory."""
    if run.recipe.probes < 3:
        return table
    plans = probe_plans(problem, run.recipe.probes)
    keys = [_key(run, table, plan) for plan in plans]
    missing = [i for i, key in enumerate(keys) if not run.work.has(key)]
    if missing:
        with run.stage("probe", len(missing)) as progress:
            trial = DenseTrial(run)
            for index in missing:
                result = trial.measure(plans[index])
                assert result.kl is not None
                values = {"kl": result.kl.value, "error": result.kl.standard_error or 0.0}
                run.work.commit(keys[index], KIND, {}, values)
                progress.tick(f"KL {result.kl.value:.3f}")
    points = []
    for plan, key in zip(plans, keys, strict=True):
        values = run.work.unit(key).values
        predicted = sum(table.entry(name, scheme).loss[table.tasks[0]] for name, scheme in plan.items())
        points.append((predicted, values["kl"], values["error"]))
    return table.with_calibration(Calibration.fit(points))


def probe_plans(problem: Problem, count: int) -> list[dict[str, str]]:
    """`count` different plans, weight -> scheme, at budgets spread over PROBE_RANGE."""
    low, high = problem.bytes(problem.smallest()), problem.bytes(problem.best())
    first, last = PROBE_RANGE
    plans: list[dict[str, str]] = []
    for index in range(count):
        share = first + (last - first) * index / max(1, count - 1)
        plan = problem.schemes(solve(problem, int(low + share * (high - low))).picks)
        if plan not in plans:
            plans.append(plan)
    return plans


def _key(run: Run, table: Sensitivity, plan: dict[str, str]) -> str:
    windows = digest(run.probe_windows.flatten().tolist())
    return WorkDir.key(KIND, plan=plan, bank=table.provenance["bank"], windows=windows)
