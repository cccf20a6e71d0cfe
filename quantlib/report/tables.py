"""The tables of a page as text: components, what is left as it is, tasks, and measured figures.

Pure functions from `ReportData` to columns and cells; the template draws them.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlib.errors import DataError
from quantlib.evaluation.estimate import Estimate
from quantlib.models.listing import together
from quantlib.report import words
from quantlib.report.data import ComponentRow, KeptRow, ReportData, TaskRow

_PNG = b"\x89PNG\r\n\x1a\n"
_SCHEMES = 2
"""Schemes of a component that are named; the others are counted."""


@dataclass(frozen=True)
class TextTable:
    """Columns and rows of text; `words` says which columns are no numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """One prompt and what was drawn of it, as `data:` addresses; `before` is "" where unknown."""

    prompt: str
    before: str
    after: str


def components(data: ReportData) -> TextTable | None:
    """Before and after, part by part, and what each is predicted to cost every task."""
    if not data.components:
        return None
    tasks = list(dict.fromkeys(task for row in data.components for task in row.losses))
    total = sum(row.after for row in data.components)
    rows = [_component(row, total, tasks, bool(data.tasks)) for row in data.components]
    columns = ["component", "parameters", "before", "after", "share", "bits"]
    columns += [*(f"{_named(task)} lost" for task in tasks), "schemes"]
    note = "Everything counted: codes, scales, zero points, and what is left in 16 or 32 bits."
    if data.tasks:
        note += " Predicted losses are relative to the full-precision model's."
    return TextTable(tuple(columns), tuple(rows), (0, len(columns) - 1), note)


def _component(
    row: ComponentRow, total: int, tasks: Sequence[str], relative: bool
) -> tuple[str, ...]:
    sized = (row.before, row.after) if row.parameters else ()
    bits = [f"{8 * size / row.parameters:.2f}" for size in sized]
    losses = [_loss(row.losses.get(task), relative) for task in tasks]
    sizes = words.size(row.before), words.size(row.after)
    parameters = f"{row.parameters:,}" if row.parameters else ""
    share = f"{100 * row.after / total:.1f} %"
    return row.name, parameters, *sizes, share, " → ".join(bits), *losses, _schemes(row)


def _schemes(row: ComponentRow) -> str:
    """`w4g64 71 %, w8g64 29 %`; the most used ones."""
    everything = sum(row.schemes.values())
    if not everything:
        return "left as it is"
    shares = [f"{name} {100 * n / everything:.0f} %" for name, n in row.schemes.items()]
    more = len(shares) - _SCHEMES
    return ", ".join([*shares[:_SCHEMES], *([f"{more} more"] if more > 0 else [])])


def _loss(value: float | None, relative: bool) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.3g} %" if relative else words.number(value)


def kept(data: ReportData) -> TextTable | None:
    """Everything that is left as it is, by name, with its reason."""
    if not data.kept:
        return None
    groups: dict[tuple[str, str, str], list[KeptRow]] = {}
    for row in data.kept:
        groups.setdefault((row.component, row.reason, row.dtype), []).append(row)
    rows = [
        (
            component,
            reason,
            dtype,
            f"{sum(row.count for row in group):,}",
            words.size(sum(row.bytes for row in group)),
            together([row.name for row in group]),
        )
        for (component, reason, dtype), group in groups.items()
    ]
    total = words.size(sum(row.bytes for row in data.kept))
    note = f"{total} in all. * stands for the numbers of blocks or experts."
    columns = "left as it is", "why", "stored as", "tensors", "bytes", "names"
    return TextTable(columns, tuple(rows), (0, 1, 2, 5), note)


def shares(data: ReportData) -> TextTable | None:
    """Whose calibration data decides how each component is rounded; what reads one kind of data
    alone has nothing to share out."""
    counts = Counter((row.component, row.by) for row in data.shares)
    rows = tuple(
        (row.component, row.by, row.name, _percent(row.tokens), _percent(row.weight))
        for row in data.shares
        if counts[row.component, row.by] > 1
    )
    if not rows:
        return None
    columns = ("component", "by", "whose data", "of the tokens", "of the weight")
    note = (
        "Whose data decides how a part is rounded: shares of its calibration tokens, and of the "
        "weight that these have in what rounding errors are judged by, mean over its matrices."
    )
    return TextTable(columns, rows, (0, 1, 2), note)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def tasks(data: ReportData) -> TextTable | None:
    """What each task loses: in full precision, by prediction, by measurement."""
    if not data.tasks:
        return None
    columns = "task", "unit", "weight", "full precision", "predicted to lose", "95 % interval"
    rows = tuple(_task(row) for row in data.tasks)
    what = "largest" if data.balance == "minmax" else "sum"
    note = f"The search minimised the {what} of the relative increases, each by its weight."
    return TextTable((*columns, "increase", "measured to lose"), rows, (0, 1), note)


def _task(row: TaskRow) -> tuple[str, ...]:
    interval = ""
    if row.low is not None and row.high is not None:
        interval = f"{words.number(row.low)} to {words.number(row.high)}"
    measured = "" if row.measured is None else words.number(row.measured)
    measured += f" ± {words.number(row.error)}" if measured and row.error else ""
    return (
        row.name,
        row.unit,
        f"{row.weight:g}",
        "" if row.baseline is None else words.number(row.baseline),
        words.number(row.predicted),
        interval,
        "" if row.increase is None else f"{100 * row.increase:+.3g} %",
        measured,
    )


def figures(suite: Mapping[str, Any] | None) -> TextTable | None:
    """What an evaluation in both directions measured (`evaluation.suite.SuiteResult`).

    Raises DataError when it is something else.
    """
    if suite is None:
        return None
    try:
        rows = tuple(_figure(figure) for figure in suite["figures"])
        used = ", ".join(f"{count} of kind {kind}" for kind, count in suite["records"].items())
        sentences = [str(sentence) for sentence in suite["skipped"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(error) from error
    note = f"Records: {used}. ± is one standard error; changes are taken record by record."
    if sentences:
        note += f" Not measured: {'; '.join(sentences)}."
    return TextTable(("task", "figure", "before", "after", "change"), rows, (0, 1), note)


def _figure(figure: Mapping[str, Any]) -> tuple[str, ...]:
    values = [
        "" if figure[key] is None else str(Estimate.from_json(figure[key]))
        for key in ("reference", "model", "change")
    ]
    if values[2] and not values[2].startswith("-"):
        values[2] = f"+{values[2]}"
    return str(figure["task"]), str(figure["name"]), *values


def pairs(suite: Mapping[str, Any] | None) -> list[Pair]:
    """Pictures before and after. Raises DataError for one that is no PNG in base64."""
    try:
        return [
            Pair(str(one["prompt"]), _address(one["before"]), _address(one["after"]))
            for one in (suite or {}).get("images", ())
        ]
    except (KeyError, TypeError) as error:
        raise _damaged(error) from error


def _address(picture: str | None) -> str:
    if picture is None:
        return ""
    try:
        known = base64.b64decode(picture, validate=True).startswith(_PNG)
    except binascii.Error as error:
        raise _damaged(error) from error
    if not known:
        raise _damaged(ValueError("a picture is no PNG file"))
    return f"data:image/png;base64,{picture}"


def _named(task: str) -> str:
    return "KL" if task == "kl" else task


def _damaged(error: Exception) -> DataError:
    return DataError(f"the evaluation is damaged ({error!r}): evaluate again")
