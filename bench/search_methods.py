"""The searches that `bench.search` compares: each finds a plan within a budget of bytes, and says
what that took of a processor.

Calibration is not counted: every score but `weights` needs its statistics. What is counted:
rounding every weight in every scheme (`table_minutes`: every tenth group is timed and stands for
ten), the trials of random search, the statistics of the layers, and the solver.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantlib.bench.plans_measured import Measured, Measuring, Subject
from quantlib.errors import SearchError
from quantlib.pipeline.calibrate import group_statistics
from quantlib.pipeline.layers import layers_of
from quantlib.pipeline.measure import ordered_weight
from quantlib.pipeline.parts import group_parts, summed_group
from quantlib.pipeline.plan import Budget, allocation_problem
from quantlib.pipeline.run import Run
from quantlib.rounding import RoundingOptions, round_group
from quantlib.search.baselines import heuristic_first_last, uniform
from quantlib.search.expressions import Expression
from quantlib.search.problem import Problem
from quantlib.search.proxies import COLUMNS, KNOWN, Layers, rescored
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.solve import solve

SAMPLED = 10
"""Every so many groups one is timed."""
KIND = "timing of rounding"


@dataclass(frozen=True)
class Found:
    """What a search found. minutes: of one core, calibration not counted. note: what a reader has
    to know of it."""

    method: str
    schemes: Mapping[str, str]
    bytes: int
    minutes: float
    note: str = ""


@dataclass
class Context:
    """A model, its table, and formulas by name."""

    subject: Subject
    run: Run
    table: Sensitivity
    formulas: Mapping[str, Expression]

    def __post_init__(self) -> None:
        self.problem = allocation_problem(self.run.model_map, self.table, Budget())
        self.measuring = Measuring(self.subject, self.run, self.table)
        started = time.process_time()
        self.layers: Layers = layers_of(self.run)
        self.layer_minutes = (time.process_time() - started) / 60
        self.table_minutes = table_minutes(self.run)


def searches(context: Context, budget: int, random_plans: int | None) -> Iterator[Found]:
    """Every search's plan at a budget. random_plans: of random search; None for as many as fit into
    the time of the exact search on measured errors."""
    problem = context.problem
    for name, rule in (("uniform", uniform), ("first and last", heuristic_first_last)):
        picks = rule(problem, budget)
        note = "one format, and the next one as far as bytes go" if name == "uniform" else ""
        yield Found(name, problem.schemes(picks), problem.bytes(picks), 0.0, note)
    yield _random(context, budget, random_plans)
    minutes, schemes, size = _exact(problem, budget)
    yield Found("exact, measured", schemes, size, context.table_minutes + minutes)
    for name, formula in {**_known(), **context.formulas}.items():
        table = rescored(context.table, context.layers, formula)
        scored = allocation_problem(context.run.model_map, table, Budget())
        minutes, schemes, size = _exact(scored, budget)
        yield Found(f"exact, {name}", schemes, size, context.layer_minutes + minutes, formula.text)


def _known() -> dict[str, Expression]:
    return {name: Expression.parse(text, COLUMNS) for name, text in KNOWN.items()}


def _exact(problem: Problem, budget: int) -> tuple[float, dict[str, str], int]:
    """(minutes, schemes, bytes) of the solver's plan."""
    started = time.process_time()
    picks = solve(problem, budget).picks
    return (time.process_time() - started) / 60, problem.schemes(picks), problem.bytes(picks)


def _random(context: Context, budget: int, wanted: int | None) -> Found:
    """The best of random plans on the short measure, as many as asked for or as time allows."""
    plans = [context.measuring.random(budget, 0)]
    while len(plans) < wanted if wanted else _spent(plans) < context.table_minutes:
        plans.append(context.measuring.random(budget, len(plans)))
    best = min(plans, key=lambda plan: plan.loss)
    schemes = dict(zip(context.table.rows, best.schemes, strict=True))
    size = context.problem.bytes(context.problem.picks(schemes))
    return Found("random", schemes, size, _spent(plans), f"best of {len(plans)}")


def _spent(plans: Sequence[Measured]) -> float:
    return sum(plan.seconds for plan in plans) / 60


def table_minutes(run: Run) -> float:
    """Minutes of one core that rounding all groups in all candidate schemes takes: every SAMPLED-th
    is timed, once per work directory, and the sum scaled by elements times columns."""
    groups = [group for group in run.model_map.groups if group.kind in ("linear", "conv")]
    key = run.work.key(KIND, bank=run.rounding_hash, every=SAMPLED)
    if not run.work.has(key):
        sampled, seconds = groups[:: max(1, min(SAMPLED, len(groups) // 3))], 0.0
        for group in sampled:
            members = {name: ordered_weight(run, name) for name in group.members}
            columns = run.model_map.weight(group.members[0]).in_features
            candidates = run.candidates[group.members[0]]
            layouts = list(dict.fromkeys(scheme.segments(columns) for scheme in candidates))
            statistics = (
                group_statistics(run, group.name)
                if run.workload is None
                else summed_group(run, group_parts(run, group.name))
            )
            options = RoundingOptions(run.damping, run.recipe.passes)
            started = time.process_time()
            round_group(members, statistics.matrices[0].hessian, layouts, options)
            seconds += time.process_time() - started
        scale = _work(run, None) / _work(run, {group.name for group in sampled})
        run.work.commit(key, KIND, {}, {"minutes": seconds * scale / 60})
    minutes = float(run.work.unit(key).values["minutes"])
    if not minutes > 0:
        raise SearchError("timing the rounding of sampled groups gave nothing: run it again")
    return minutes


def _work(run: Run, groups: set[str] | None) -> float:
    """Elements times columns of the weights of some groups, or of all: rounding's arithmetic."""
    weights = run.model_map.weights
    chosen = [w for w in weights if groups is None or w.group in groups]
    return float(sum(w.parameters * w.in_features for w in chosen))
