"""One self-contained HTML page from `ReportData`: no scripts, styles, fonts or pictures from
anywhere else.

`render` is a pure function, the same data giving the same bytes. Names that came from a model or a
user pass through jinja's autoescape; the only markup let through unescaped is the SVG that
`theme.to_svg` drew here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from quantlib.checkpoint.disk import atomic_write_text
from quantlib.evaluation.language import LanguageResult
from quantlib.report import bars, curves, grids, latencies, tables, words
from quantlib.report.data import LatencyRow, ReportData, TaskRow, WeightRow
from quantlib.report.theme import Picture
from quantlib.search.latency import format_ms

_PAGE = Path(__file__).parent / "page"
Part = TypeVar("Part", Picture, tables.TextTable)


@dataclass(frozen=True)
class Card:
    """One headline number. `share` fills a meter (percent); `verdict` colours the note: good or
    bad."""

    name: str
    value: str
    unit: str = ""
    note: str = ""
    share: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Column:
    """A column of the table of weights."""

    name: str
    numeric: bool


@dataclass(frozen=True)
class Cell:
    """A cell of that table: its text, what to sort by when numeric, and a patch of colour."""

    text: str
    key: float | None = None
    colour: str = ""


def write_report(data: ReportData, path: str | Path) -> Path:
    """Render into `path`, whole or not at all. Raises CheckpointError when it cannot be written."""
    atomic_write_text(path, render(data))
    return Path(path)


def render(data: ReportData) -> str:
    """The page as text."""
    result = LanguageResult.from_json(data.evaluation) if data.evaluation else None
    weighed = any(row.loss is not None for row in data.weights)
    return _template().render(
        data=data,
        css=_asset("report.css"),
        script=_asset("report.js"),
        lead=_lead(data),
        cards=_cards(data, result),
        grids=[*grids.bits_pictures(data), *grids.loss_pictures(data)],
        bytes=_present(bars.components(data), bars.schemes(data)),
        curves=_present(curves.pareto(data), curves.predictions(data)),
        latencies=latencies.latency_pictures(data),
        components=_present(tables.components(data), tables.kept(data), tables.shares(data)),
        tasks=_present(tables.tasks(data)),
        figures=_present(tables.figures(data.suite)),
        pairs=tables.pairs(data.suite),
        evaluation=_evaluation_rows(result),
        evaluation_note=_evaluation_note(result),
        columns=_columns(weighed),
        weights=[_cells(row, weighed) for row in data.weights],
        facts=data.facts,
        timings=_timings(data),
        provenance=data.provenance,
    )


# -- header --------------------------------------------------------------------------------------


def _lead(data: ReportData) -> str:
    ratio = data.bytes_before / data.bytes_after
    return (
        f"{words.size(data.bytes_before)} of weights became {words.size(data.bytes_after)}: "
        f"{ratio:.1f} times smaller, "
        f"{data.bits:.2f} bits for each of {words.millions(data.parameters)} parameters, "
        "everything counted."
    )


def _cards(data: ReportData, result: LanguageResult | None) -> list[Card]:
    cards = [_size_card(data)]
    if result is not None and result.kl is not None:
        cards.append(_loss_card(data, result))
    elif data.predicted is not None:
        middle, low, high = data.predicted
        note = f"95 % interval {words.number(low)} to {words.number(high)}; not measured"
        cards.append(Card("Predicted KL", words.number(middle), data.unit, note))
    cards += [_task_card(row) for row in data.tasks]
    cards += [_latency_card(row) for row in data.latencies]
    if result is not None:
        cards += _quality_cards(result)
    return cards


def _size_card(data: ReportData) -> Card:
    value, _, unit = words.size(data.bytes_after).partition(" ")
    if data.budget_bytes:
        share = 100 * data.bytes_after / data.budget_bytes
        note = f"{share:.1f} % of the budget of {words.size(data.budget_bytes)}"
        return Card("Size", value, unit, note, min(share, 100.0), "bad" if share > 100 else "")
    note = f"budget {data.budget}" if data.budget else f"before: {words.size(data.bytes_before)}"
    return Card("Size", value, unit, note)


def _task_card(row: TaskRow) -> Card:
    """What is predicted of one of several tasks, and what was measured."""
    value, unit = words.number(row.predicted), row.unit
    if row.increase is not None:
        value, unit = f"{100 * row.increase:+.3g}", "% of its full-precision loss"
    if row.measured is None or row.low is None or row.high is None:
        note = "predicted, not measured" if row.measured is None else "predicted"
        return Card(f"Loss in {row.name}", value, unit, note)
    inside = row.low <= row.measured <= row.high
    note = f"predicted; {words.number(row.measured)} measured, "
    note += f"{'inside' if inside else 'outside'} the predicted "
    note += f"{words.number(row.low)} to {words.number(row.high)}"
    return Card(f"Loss in {row.name}", value, unit, note, verdict="good" if inside else "bad")


def _latency_card(row: LatencyRow) -> Card:
    """Measured or predicted milliseconds against the budget; a tenth over is over."""
    taken = row.predicted if row.measured is None else row.measured
    note = f"{format_ms(row.limit)} allowed for {row.what}"
    if taken is None:
        return Card("Latency", "unknown", "", note)
    value, _, unit = format_ms(taken).partition(" ")
    if row.measured is None:
        return Card("Predicted latency", value, unit, note)
    if row.predicted is not None:
        note += f"; {format_ms(row.predicted)} predicted"
    share = 100 * taken / row.limit
    verdict = "bad" if share > 110 else ""
    return Card("Measured latency", value, unit, note, min(share, 100.0), verdict)


def _loss_card(data: ReportData, result: LanguageResult) -> Card:
    """Measured KL beside its prediction. A measurement is inside when it lies in the interval, its
    own error apart."""
    assert result.kl is not None
    value, _, error = str(result.kl).partition(" ± ")
    nats = "nats per token" if data.tasks else data.unit
    unit = f"± {error} {nats}" if error else nats
    if data.predicted is None:
        return Card("Measured KL", value, unit, "KL divergence from the original model")
    middle, low, high = data.predicted
    inside = low <= result.kl.value <= high
    expected = f"{words.number(middle)} ({words.number(low)} to {words.number(high)})"
    note = f"{'inside' if inside else 'outside'} the predicted {expected}"
    return Card("Measured KL", value, unit, note, verdict="good" if inside else "bad")


def _quality_cards(result: LanguageResult) -> list[Card]:
    value, _, error = str(result.perplexity).partition(" ± ")
    note = f"± {error}, one standard error over windows" if error else ""
    if result.perplexity_ratio is not None and result.reference_perplexity is not None:
        before = str(result.reference_perplexity).partition(" ")[0]
        note = f"before: {before}; ratio {result.perplexity_ratio}"
    cards = [Card("Perplexity", value, "", note)]
    if result.same_top is not None:
        share = f"{100 * result.same_top.value:.1f}"
        cards.append(
            Card("Same most likely token", share, "%", "of positions, against the original model")
        )
    return cards


# -- tables --------------------------------------------------------------------------------------


def _evaluation_rows(result: LanguageResult | None) -> list[tuple[str, str, str]]:
    if result is None:
        return []
    rows = [
        ("perplexity", result.reference_perplexity, result.perplexity),
        ("negative log-likelihood, nats", result.reference_nll, result.nll),
        ("perplexity ratio", None, result.perplexity_ratio),
        ("KL(before ‖ after), nats", None, result.kl),
        ("same most likely token", None, result.same_top),
    ]
    return [
        (name, "" if before is None else str(before), str(after))
        for name, before, after in rows
        if after is not None
    ]


def _evaluation_note(result: LanguageResult | None) -> str:
    if result is None:
        return ""
    return (
        f"{words.count(result.windows, 'window')}, "
        f"{words.count(result.tokens_per_window, 'scored token')} in each; "
        "± is one standard error over windows."
    )


def _columns(weighed: bool) -> list[Column]:
    columns = [
        ("weight", False),
        ("kind", False),
        ("shape", True),
        ("scheme", False),
        ("bits", True),
    ]
    columns += [("before", True), ("after", True)]
    if weighed:
        columns += [("predicted loss", True), ("± error", True)]
    return [Column(name, numeric) for name, numeric in columns]


def _cells(row: WeightRow, weighed: bool) -> list[Cell]:
    cells = [
        Cell(row.name.removesuffix(".weight")),
        Cell(row.kind),
        Cell(" × ".join(f"{length}" for length in row.shape), row.parameters),
        Cell(row.scheme, colour=grids.bits_colour(row.bits)),
        Cell(f"{row.bits:.2f}", row.bits),
        Cell(words.size(row.bytes_before), row.bytes_before),
        Cell(words.size(row.bytes_after), row.bytes_after),
    ]
    if weighed:
        cells += [
            Cell("", -1.0) if value is None else Cell(words.number(value), value)
            for value in (row.loss, row.error)
        ]
    return cells


def _timings(data: ReportData) -> list[tuple[str, str]]:
    rows = [(stage, words.duration(seconds)) for stage, seconds in data.timings]
    if len(rows) > 1:
        rows.append(("together", words.duration(sum(seconds for _, seconds in data.timings))))
    return rows


# -- page ----------------------------------------------------------------------------------------


def _present(*parts: Part | None) -> list[Part]:
    return [part for part in parts if part is not None]


@cache
def _asset(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8").strip()


@cache
def _template() -> Any:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.jinja")
