"""From what the stages leave behind (model map, plan, sensitivity, evaluation) to `ReportData`.

This is the only module of the report that knows the other stages' types. Everything is looked up by
the weight's name; what a stage did not produce is left out of the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from quantlib.evaluation.language import LanguageResult
from quantlib.models.modelmap import ModelMap
from quantlib.report import words
from quantlib.report.data import (
    ComponentRow,
    FrontPoint,
    MeasuredPoint,
    ProbePoint,
    ReportData,
    SensitivityMap,
    WeightRow,
)
from quantlib.search.pareto import Point
from quantlib.search.plan import Plan
from quantlib.search.sensitivity import UNITS, Sensitivity


def collect(
    modelmap: ModelMap,
    plan: Plan,
    *,
    title: str,
    created: str = "",
    sensitivity: Sensitivity | None = None,
    front: Iterable[Point] = (),
    evaluation: LanguageResult | None = None,
    measured: Iterable[MeasuredPoint] = (),
    others: Iterable[MeasuredPoint] = (),
    timings: Mapping[str, float] | None = None,
    provenance: Mapping[str, str] | None = None,
    bytes_before: int | None = None,
    bytes_after: int | None = None,
) -> ReportData:
    """The report of one plan for one model.

    evaluation: of the finished model; with a KL it becomes this model's measured point.
    measured: further plans of ours that were measured. others: what other methods reach.
    timings: stage -> seconds. provenance: name -> hash or version, added to the plan's own.
    bytes_before, bytes_after: sizes of the weight files; by default what the map and plan count.
    """
    after = plan.bytes if bytes_after is None else bytes_after
    own = []
    if evaluation is not None and evaluation.kl is not None:
        kl = evaluation.kl
        own.append(MeasuredPoint("this model", after, kl.value, kl.standard_error, chosen=True))
    probes = sensitivity.calibration.probes if sensitivity and sensitivity.calibration else ()
    return ReportData(
        title=title,
        created=created,
        bytes_before=modelmap.nbytes if bytes_before is None else bytes_before,
        bytes_after=after,
        parameters=modelmap.parameters,
        budget="" if plan.budget is None else words.size(plan.budget),
        budget_bytes=plan.budget,
        unit=UNITS.get(plan.task, plan.task),
        predicted=_predicted(plan),
        predicted_sum=plan.loss,
        evaluation=None if evaluation is None else evaluation.to_json(),
        components=_components(modelmap, plan),
        weights=_weights(modelmap, plan, sensitivity),
        sensitivity=_sensitivity_map(plan, sensitivity),
        front=_front(front),
        measured=(*own, *measured),
        others=tuple(others),
        probes=tuple(ProbePoint(*probe) for probe in probes),
        timings=tuple((timings or {}).items()),
        facts=_facts(modelmap, plan),
        provenance=tuple({"model": plan.model, **plan.provenance, **(provenance or {})}.items()),
    )


def _weights(
    modelmap: ModelMap, plan: Plan, sensitivity: Sensitivity | None
) -> tuple[WeightRow, ...]:
    rows = []
    for weight in modelmap.weights:
        assigned = plan.weights[weight.name]
        error = None
        if sensitivity is not None and assigned.scheme in sensitivity.rows.get(weight.name, {}):
            error = sensitivity.entry(weight.name, assigned.scheme).error.get(plan.task)
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


def _components(modelmap: ModelMap, plan: Plan) -> tuple[ComponentRow, ...]:
    """Quantized weights at the plan's bytes, kept tensors at the source's."""
    after: Counter[str] = Counter()
    for weight in modelmap.weights:
        after[weight.component] += plan.weights[weight.name].bytes
    for kept in modelmap.kept:
        after[kept.component] += kept.nbytes
    rows = modelmap.components()
    return tuple(ComponentRow(row.name, row.bytes, after[row.name]) for row in rows)


def _sensitivity_map(plan: Plan, sensitivity: Sensitivity | None) -> SensitivityMap | None:
    """In the scheme measured for most weights; of several such, the one the plan uses most."""
    if sensitivity is None:
        return None
    known = Counter(scheme for row in sensitivity.rows.values() for scheme in row)
    used = Counter(row.scheme for row in plan.weights.values())
    scheme = max(known, key=lambda name: (known[name], used[name]))
    loss = {
        weight: row[scheme].loss[plan.task]
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
    names = ("kl", "kl_low", "kl_high")
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
