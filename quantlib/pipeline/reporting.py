"""The report of a run: what the work directory knows, put into `report.ReportData`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from quantlib.checkpoint.provenance import versions
from quantlib.evaluation.language import LanguageResult
from quantlib.formats.scheme import Scheme
from quantlib.pipeline import bytecount
from quantlib.pipeline.apply import Refinement
from quantlib.pipeline.run import Run
from quantlib.report.data import (
    ComponentRow,
    FrontPoint,
    MeasuredPoint,
    ProbePoint,
    ReportData,
    SensitivityMap,
    WeightRow,
)
from quantlib.report.render import write_report
from quantlib.search.budget import format_size
from quantlib.search.pareto import pareto_front
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Sensitivity

REPORT_FILE = "report.html"


def write_run_report(
    run: Run,
    table: Sensitivity,
    problem: Problem,
    plan: Plan,
    refinement: Refinement | None,
    path: str | Path | None = None,
) -> Path:
    """Write the report of a plan (to `report.html` in the work directory by default); returns its path."""
    data = report_data(run, table, problem, plan, refinement.shipped if refinement else None)
    return write_report(data, path or run.work.path / REPORT_FILE)


def report_data(
    run: Run, table: Sensitivity, problem: Problem, plan: Plan, evaluation: LanguageResult | None
) -> ReportData:
    """Everything the report shows. `evaluation` is of the shipped checkpoint, when it was measured."""
    calibration = table.calibration
    predicted = calibration.predict(plan.loss) if calibration else None
    probes = calibration.probes if calibration else ()
    front = [
        FrontPoint(p.bytes, p.kl if p.kl is not None else p.loss, p.kl_low, p.kl_high)
        for p in pareto_front(problem, calibration=calibration)
    ]
    measured = []
    if evaluation is not None and evaluation.kl is not None:
        kl = evaluation.kl
        measured.append(MeasuredPoint("this checkpoint", plan.bytes, kl.value, kl.standard_error, chosen=True))
    return ReportData(
        title=str(run.source.path.name),
        bytes_before=run.source.file_bytes,
        bytes_after=plan.bytes,
        parameters=run.model_map.parameters,
        budget=format_size(plan.budget) if plan.budget else "",
        budget_bytes=plan.budget,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        predicted=(predicted.kl, predicted.low, predicted.high) if predicted else None,
        predicted_sum=plan.loss,
        evaluation=evaluation.to_json() if evaluation else None,
        components=_components(run, plan),
        weights=_weights(run, table, plan),
        sensitivity=_sensitivity_map(table),
        front=tuple(front),
        measured=tuple(measured),
        probes=tuple(ProbePoint(p.predicted, p.measured, p.error) for p in probes),
        timings=tuple(run.seconds.items()),
        facts=_facts(run, plan),
        provenance=tuple((name, value) for name, value in plan.provenance.items()),
    )


def _components(run: Run, plan: Plan) -> tuple[ComponentRow, ...]:
    after: dict[str, int] = {}
    for weight in run.model_map.weights:
        after[weight.component] = after.get(weight.component, 0) + plan.weights[weight.name].bytes
    for row in run.model_map.kept:
        after[row.component] = after.get(row.component, 0) + row.nbytes
    return tuple(ComponentRow(c.name, c.bytes, after[c.name]) for c in run.model_map.components())


def _weights(run: Run, table: Sensitivity, plan: Plan) -> tuple[WeightRow, ...]:
    rows = []
    for weight in run.model_map.weights:
        chosen = plan.weights[weight.name]
        error = table.entry(weight.name, chosen.scheme).error[plan.task]
        payload = bytecount.payload(weight, Scheme.parse(chosen.scheme))
        rows.append(
            WeightRow(
                weight.name,
                weight.component,
                weight.block,
                weight.kind,
                weight.shape,
                chosen.scheme,
                8 * payload / weight.parameters,
                weight.nbytes,
                payload,
                chosen.loss,
                error,
            )
        )
    return tuple(rows)


def _sensitivity_map(table: Sensitivity) -> SensitivityMap:
    """Losses of every weight in the middle one of the candidates they all share."""
    shared = [s for s in next(iter(table.rows.values())) if all(s in row for row in table.rows.values())]
    scheme = shared[len(shared) // 2] if shared else next(iter(next(iter(table.rows.values()))))
    task = table.tasks[0]
    return SensitivityMap(scheme, {name: row[scheme].loss[task] for name, row in table.rows.items() if scheme in row})


def _facts(run: Run, plan: Plan) -> tuple[tuple[str, str], ...]:
    recipe = run.recipe
    facts = {
        "preset": recipe.preset,
        "calibration": f"{recipe.windows} windows of {recipe.seqlen} tokens, seed {recipe.seed}",
        "scores": "Fisher-weighted" if recipe.gradients else "block-local (no gradients)",
        "candidates": ", ".join(recipe.schemes),
        "engine": plan.engine,
        "gap to the LP bound": f"{plan.predicted.get('lp_gap', 0.0):.2%}",
        "rules": ", ".join(plan.rules) or "none",
    }
    facts |= {f"{name} version": value for name, value in versions().items()}
    return tuple(facts.items())
