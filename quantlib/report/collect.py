"""From what the stages leave behind (model map, plan, sensitivity, evaluation) to `ReportData`.

This is the only module of the report that knows the other stages' types. Everything is looked up by
the weight's name; what a stage did not produce is left out of the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantlib.evaluation.language import LanguageResult
from quantlib.models.modelmap import ModelMap
from quantlib.report import words
from quantlib.report.data import (
    FrontPoint,
    LatencyPoint,
    LatencyRow,
    MeasuredPoint,
    ProbePoint,
    ReportData,
    SensitivityMap,
    TradeOff,
    WeightRow,
)
from quantlib.report.task_rows import component_rows, kept_rows, minimised, scales_of, task_rows
from quantlib.search.calibrate import Calibration
from quantlib.search.latency import LatencyCosts, is_latency, phase_text
from quantlib.search.left import keeping_left
from quantlib.search.pareto import Point, cost_front, equal_loss
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Sensitivity, unit_of
from quantlib.search.tasks import COMBINED

LEVELS = (0.5, 1.0, 2.0, 4.0)
"""Losses, as multiples of the plan's own, at which sizes and latencies are compared."""


@dataclass(frozen=True)
class LatencyParts:
    """The parts of a report that are about time."""

    rows: tuple[LatencyRow, ...] = ()
    front: tuple[LatencyPoint, ...] = ()
    trade_offs: tuple[TradeOff, ...] = ()
    machine: str = ""

    @staticmethod
    def of(
        plan: Plan,
        problem: Problem,
        costs: LatencyCosts | None,
        measured: Mapping[str, float],
        calibration: Calibration | None = None,
    ) -> LatencyParts:
        """Of the latencies that a plan limits.

        problem, costs: with prices of them; without, only the plan's own numbers are shown.
        measured: cost -> milliseconds of the finished checkpoint.
        """
        limited = {cost: limit for cost, limit in plan.limits.items() if is_latency(cost)}
        known = [cost for cost in limited if costs is not None and cost in costs.fixed]
        rows = tuple(
            LatencyRow(
                cost, phase_text(cost), limit, _expected(plan, costs, cost), measured.get(cost)
            )
            for cost, limit in limited.items()
        )
        front = tuple(
            LatencyPoint(cost, p.costs[cost], p.bytes, p.loss)
            if p.kl is None
            else LatencyPoint(cost, p.costs[cost], p.bytes, p.kl, p.kl_low, p.kl_high)
            for cost in known
            for p in cost_front(problem, cost, calibration=calibration)
        )
        losses = [multiple * plan.loss for multiple in LEVELS if plan.loss > 0]
        trade_offs = tuple(
            TradeOff(cost, calibration.predict(loss).value if calibration else loss, *place)
            for cost in known
            for loss in losses
            for place in equal_loss(problem, cost, loss)
        )
        return LatencyParts(rows, front, trade_offs, plan.provenance.get("machine", ""))


def _expected(plan: Plan, costs: LatencyCosts | None, cost: str) -> float | None:
    """What the plan is predicted to take: as it is now, else as the search promised."""
    now = None if costs is None else costs.predict(cost, plan.schemes)
    return plan.predicted.get(cost) if now is None else now


def collect(
    modelmap: ModelMap,
    plan: Plan,
    *,
    title: str,
    created: str = "",
    sensitivity: Sensitivity | None = None,
    front: Iterable[Point] = (),
    evaluation: LanguageResult | None = None,
    suite: Mapping[str, Any] | None = None,
    measured: Iterable[MeasuredPoint] = (),
    others: Iterable[MeasuredPoint] = (),
    latency: LatencyParts | None = None,
    timings: Mapping[str, float] | None = None,
    provenance: Mapping[str, str] | None = None,
    bytes_before: int | None = None,
    bytes_after: int | None = None,
) -> ReportData:
    """The report of one plan for one model.

    evaluation: of the finished model; where KL is what was minimised it becomes this model's
    measured point. suite: the JSON of its evaluation in both directions (`evaluation.suite`).
    measured: further plans of ours that were measured. others: what other methods reach.
    latency: what is known of the latencies that the plan limits.
    timings: stage -> seconds. provenance: name -> hash or version, added to the plan's own.
    bytes_before, bytes_after: sizes of the weight files; by default what the map and plan count.
    """
    after = plan.bytes if bytes_after is None else bytes_after
    own = []
    if evaluation is not None and evaluation.kl is not None and plan.task != COMBINED:
        kl = evaluation.kl
        own.append(MeasuredPoint("this model", after, kl.value, kl.standard_error, chosen=True))
    probes = sensitivity.calibration.probes if sensitivity and sensitivity.calibration else ()
    latency = latency or LatencyParts()
    return ReportData(
        title=title,
        created=created,
        bytes_before=modelmap.nbytes if bytes_before is None else bytes_before,
        bytes_after=after,
        parameters=modelmap.parameters,
        budget="" if plan.budget is None else words.size(plan.budget),
        budget_bytes=plan.budget,
        unit=unit_of(plan.task),
        predicted=_predicted(plan),
        predicted_sum=minimised(plan, sensitivity),
        evaluation=None if evaluation is None else evaluation.to_json(),
        suite=None if suite is None else dict(suite),
        tasks=task_rows(plan, sensitivity, suite or {}),
        balance=plan.objective.balance if plan.task == COMBINED else "",
        components=component_rows(modelmap, plan, sensitivity),
        kept=kept_rows(keeping_left(modelmap, plan)),
        weights=_weights(modelmap, plan, sensitivity),
        sensitivity=_sensitivity_map(plan, sensitivity),
        front=_front(front),
        measured=(*own, *measured),
        others=tuple(others),
        probes=tuple(ProbePoint(*probe) for probe in probes),
        latencies=latency.rows,
        latency_front=latency.front,
        trade_offs=latency.trade_offs,
        machine=latency.machine,
        timings=tuple((timings or {}).items()),
        facts=_facts(keeping_left(modelmap, plan), plan),
        provenance=tuple({"model": plan.model, **plan.provenance, **(provenance or {})}.items()),
    )


def _weights(
    modelmap: ModelMap, plan: Plan, sensitivity: Sensitivity | None
) -> tuple[WeightRow, ...]:
    rows = []
    scales = scales_of(plan, sensitivity)
    for weight in modelmap.weights:
        assigned = plan.weights[weight.name]
        error = None
        if sensitivity is not None and assigned.scheme in sensitivity.rows.get(weight.name, {}):
            entry = sensitivity.entry(weight.name, assigned.scheme)
            error = entry.priced(plan.task, scales)[1]
        rows.append(
            WeightRow(
                name=weight.name,
                component=weight.component,
                block=weight.block,
                kind=weight.kind,
                shape=weight.shape,
                scheme=assigned.scheme,
                bits=8 * assigned.bytes / weight.parameters,
                bytes_before=weight.nbytes,
                bytes_after=assigned.bytes,
                loss=assigned.loss,
                error=error,
            )
        )
    return tuple(rows)


def _sensitivity_map(plan: Plan, sensitivity: Sensitivity | None) -> SensitivityMap | None:
    """In the scheme measured for most weights; of several such, the one the plan uses most."""
    if sensitivity is None:
        return None
    scales = scales_of(plan, sensitivity)
    known = Counter(scheme for row in sensitivity.rows.values() for scheme in row)
    used = Counter(row.scheme for row in plan.weights.values())
    scheme = max(known, key=lambda name: (known[name], used[name]))
    loss = {
        weight: row[scheme].priced(plan.task, scales)[0]
        for weight, row in sensitivity.rows.items()
        if scheme in row
    }
    return SensitivityMap(scheme, loss)


def _front(points: Iterable[Point]) -> tuple[FrontPoint, ...]:
    """Calibrated KL with its interval where there is a calibration, plain sums elsewhere."""
    return tuple(
        FrontPoint(point.bytes, point.loss)
        if point.kl is None
        else FrontPoint(point.bytes, point.kl, point.kl_low, point.kl_high)
        for point in points
    )


def _predicted(plan: Plan) -> tuple[float, float, float] | None:
    names = (plan.task, f"{plan.task}_low", f"{plan.task}_high")
    if not all(name in plan.predicted for name in names):
        return None
    middle, low, high = (plan.predicted[name] for name in names)
    return middle, low, high


def _facts(modelmap: ModelMap, plan: Plan) -> tuple[tuple[str, str], ...]:
    facts: list[tuple[str, str]] = [
        ("architecture", modelmap.architecture),
        ("parameters", words.millions(modelmap.parameters)),
        ("quantized", words.count(len(modelmap.weights), "weight")),
        ("kept", words.count(len(modelmap.kept), "tensor")),
        ("planned for", plan.engine),
    ]
    if plan.rules:
        facts.append(("constraints", ", ".join(plan.rules)))
    if "lp_gap" in plan.predicted:
        facts.append(("gap to the LP bound", f"{100 * plan.predicted['lp_gap']:.3g} %"))
    return tuple(facts)
