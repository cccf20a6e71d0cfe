"""What a report shows, as plain values.

`ReportData` holds nothing but numbers, strings, lists and dicts, so it can be filled from the files
of a work directory, kept as JSON beside the page it made, and rendered again. Every part but the
title and the sizes is optional: a report of a run that measured nothing is shorter, not broken.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from quantlib.errors import DataError

Row = TypeVar("Row")


@dataclass(frozen=True)
class WeightRow:
    """One quantized weight, in model order.

    block: name of the repeated block it is in ("model.layers.3"), None outside blocks.
    kind: linear, embedding, head or experts.
    bits: true bits per weight: codes, scales and zero points.
    loss, error: predicted loss of this weight in this scheme, and its standard error.
    """

    name: str
    component: str
    block: str | None
    kind: str
    shape: tuple[int, ...]
    scheme: str
    bits: float
    bytes_before: int
    bytes_after: int
    loss: float | None = None
    error: float | None = None

    @property
    def parameters(self) -> int:
        """How many numbers the weight holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ComponentRow:
    """Bytes of one component with everything counted: quantized weights and kept tensors.

    schemes: scheme -> parameters in it. losses: task -> what its weights are predicted to lose: in
    nats for KL, relative to the full-precision loss where there are several tasks.
    """

    name: str
    before: int
    after: int
    parameters: int = 0
    schemes: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class KeptRow:
    """Tensors of a component that are left as they are, and why: `count` of them, whose names
    differ in numbers only."""

    component: str
    name: str
    count: int
    bytes: int
    dtype: str
    reason: str


@dataclass(frozen=True)
class ShareRow:
    """How much one stream, or one kind of token, decides how a component is rounded.

    by:             "stream" or "modality". name: of it.
    tokens, weight: fractions of the component's calibration data: of its tokens before weighting,
                    and of the weight that they have in its Hessians. Of the rows of one component
                    and one `by`, each adds up to one. See `quantlib.pipeline.shares`.
    """

    component: str
    by: str
    name: str
    tokens: float
    weight: float


@dataclass(frozen=True)
class TaskRow:
    """One of several tasks.

    unit:      of all its losses. baseline: loss of the full-precision model.
    weight:    how much its relative increase counted.
    predicted: increase of its loss, calibrated where `low` and `high`, a 95 % interval, are known.
    measured:  what an evaluation found, with its standard error.
    """

    name: str
    unit: str
    weight: float
    baseline: float | None
    predicted: float
    low: float | None = None
    high: float | None = None
    measured: float | None = None
    error: float | None = None

    @property
    def increase(self) -> float | None:
        """Predicted, relative to the full-precision model."""
        return self.predicted / self.baseline if self.baseline else None


@dataclass(frozen=True)
class SensitivityMap:
    """Predicted loss of each weight, all in one scheme: what the solver saw before it chose."""

    scheme: str
    loss: dict[str, float]


@dataclass(frozen=True)
class FrontPoint:
    """One point of the Pareto front: whole-file bytes, expected loss, ends of its 95 % interval."""

    bytes: int
    loss: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MeasuredPoint:
    """A plan that was really measured; `error` is a standard error. `chosen` marks this model."""

    label: str
    bytes: int
    loss: float
    error: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class ProbePoint:
    """A plan measured to calibrate predictions, beside its sum of predicted losses."""

    predicted: float
    measured: float
    error: float = 0.0


@dataclass(frozen=True)
class LatencyRow:
    """A latency that the plan limits, in milliseconds: `cost` is its name, `what` the same in words
    ("a decoded token with 256 tokens of context"). `measured` is of the finished checkpoint."""

    cost: str
    what: str
    limit: float
    predicted: float | None = None
    measured: float | None = None


@dataclass(frozen=True)
class LatencyPoint:
    """The best allocation at some latency: milliseconds, bytes, expected loss and its interval."""

    cost: str
    ms: float
    bytes: int
    loss: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TradeOff:
    """A size and a latency that one may have at a loss of `level`."""

    cost: str
    level: float
    bytes: int
    ms: float


@dataclass(frozen=True)
class ReportData:
    """Everything one report shows.

    title: name of the model. created: when, as text; the caller's clock, so rendering stays pure.
    bytes_before, bytes_after: size of the weight files.
    parameters: numbers in the model, tied ones counted once.
    budget: in the user's words ("82.8 MB"); budget_bytes: the same in bytes when it is one.
    unit: of every loss; nats per token for KL.
    predicted: (expected loss, low, high), the plan's prediction with its 95 % interval.
    predicted_sum: the plan's plain sum of losses, its place on the calibration's axis.
    evaluation: `LanguageResult.to_json()`, None when nothing was measured. suite: what `quantlib
    eval --suite multimodal --json` printed. tasks: where there are several, what is known of each;
    balance: how they were weighed ("sum", "minmax"). kept: what is left as it is. shares: whose
    calibration data decides how a component is rounded, of models with several streams.
    front: the Pareto front. measured: measured plans of ours. others: what other methods reach.
    probes: measured plans that the predictions were calibrated with.
    latencies: what the plan limits. latency_front: least loss by latency. trade_offs: sizes and
    latencies at equal loss. machine: what the times are of.
    timings: (stage, seconds) in the order of the run. facts, provenance: (name, value) rows.
    """

    title: str
    bytes_before: int
    bytes_after: int
    parameters: int
    budget: str = ""
    budget_bytes: int | None = None
    created: str = ""
    unit: str = "nats per token"
    predicted: tuple[float, float, float] | None = None
    predicted_sum: float | None = None
    evaluation: dict[str, Any] | None = None
    suite: dict[str, Any] | None = None
    tasks: tuple[TaskRow, ...] = ()
    balance: str = ""
    components: tuple[ComponentRow, ...] = ()
    kept: tuple[KeptRow, ...] = ()
    shares: tuple[ShareRow, ...] = ()
    weights: tuple[WeightRow, ...] = ()
    sensitivity: SensitivityMap | None = None
    front: tuple[FrontPoint, ...] = ()
    measured: tuple[MeasuredPoint, ...] = ()
    others: tuple[MeasuredPoint, ...] = ()
    probes: tuple[ProbePoint, ...] = ()
    latencies: tuple[LatencyRow, ...] = ()
    latency_front: tuple[LatencyPoint, ...] = ()
    trade_offs: tuple[TradeOff, ...] = ()
    machine: str = ""
    timings: tuple[tuple[str, float], ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    provenance: tuple[tuple[str, str], ...] = ()

    @property
    def bits(self) -> float:
        """True bits per parameter of the whole model: the file's bits over all of its numbers."""
        return 8 * self.bytes_after / self.parameters

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` is the inverse."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> ReportData:
        """Raises DataError when `data` is not what `to_json` gives."""
        unknown = set(data) - {item.name for item in fields(ReportData)}
        if unknown:
            raise DataError(
                f"report data has unknown fields: {', '.join(sorted(unknown))}; write the report "
                "again"
            )
        values = dict(data)
        try:
            for name, row_class in _ROWS.items():
                values[name] = tuple(_row(row_class, row) for row in data.get(name, ()))
            if data.get("sensitivity") is not None:
                values["sensitivity"] = SensitivityMap(**data["sensitivity"])
            if data.get("predicted") is not None:
                values["predicted"] = tuple(data["predicted"])
            for name in ("timings", "facts", "provenance"):
                values[name] = tuple((str(key), value) for key, value in data.get(name, ()))
            return ReportData(**values)
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"report data is damaged ({error}); write the report again") from error


_ROWS: dict[str, type[Any]] = {
    "tasks": TaskRow,
    "components": ComponentRow,
    "kept": KeptRow,
    "shares": ShareRow,
    "weights": WeightRow,
    "front": FrontPoint,
    "measured": MeasuredPoint,
    "others": MeasuredPoint,
    "probes": ProbePoint,
    "latencies": LatencyRow,
    "latency_front": LatencyPoint,
    "trade_offs": TradeOff,
}


def _row(row_class: type[Row], values: dict[str, Any]) -> Row:
    """A row from its JSON object; JSON has no tuples, so lists become them."""
    return row_class(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
    )
