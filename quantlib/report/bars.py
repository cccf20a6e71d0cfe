"""Where the bytes are: components before and after, and how much is stored in each scheme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from quantlib.report import words
from quantlib.report.data import ComponentRow, ReportData, WeightRow
from quantlib.report.grids import bits_colour
from quantlib.report.theme import (
    INK,
    LINE,
    PALETTE,
    PAPER,
    Picture,
    new_figure,
    note,
    style,
    text_on,
    to_svg,
)

_MOST_SCHEMES = 14
"""Bars of the scheme histogram; the rest is summed up in one more."""
_LABELLED = 0.14
"""Share of the longest bar that a segment needs to have room for its size."""


def components(data: ReportData) -> Picture | None:
    """Two stacked bars, before and after, on one scale. None without components."""
    if not data.components:
        return None
    rows = _largest(data.components, len(PALETTE))
    before, after = sum(row.before for row in rows), sum(row.after for row in rows)
    with style():
        figure, axes = new_figure(132)
        _stack(axes, 1, [row.before for row in rows], before)
        _stack(axes, 0, [row.after for row in rows], before)
        note(axes, f"{100 * after / before:.0f} % of before", (after / 1e6, 0))
        axes.set_yticks([1, 0], ["before", "after"], color=INK)
        _plain_bars(axes)
        axes.set_xlabel("MB on disk")
        changes = [
            f"{row.name} {words.size(row.before)} to {words.size(row.after)}" for row in rows
        ]
        description = f"Stacked bars of bytes, before and after: {'; '.join(changes)}."
        svg = to_svg(figure, description, "components")
    key = tuple((colour, row.name, "fill") for row, colour in zip(rows, PALETTE, strict=False))
    caption = "Codes, scales, zero points, and everything kept in 16 or 32 bits."
    return Picture("Bytes per component", caption, svg, key)


def schemes(data: ReportData) -> Picture | None:
    """The share of the model's numbers in each scheme, fewest bits on top. None without weights."""
    bars = _scheme_bars(data.weights)
    if not bars:
        return None
    everything = sum(bar.numbers for bar in bars)
    with style():
        figure, axes = new_figure(46 + 22 * len(bars))
        for y, bar in enumerate(bars):
            share = 100 * bar.numbers / everything
            axes.barh(y, share, 0.74, color=bits_colour(bar.bits), edgecolor=LINE, linewidth=0.6)
            note(axes, f"{words.count(bar.weights, 'weight')}, {share:.1f} %", (share, y))
        axes.set_yticks(range(len(bars)), [words.shorten(bar.name, 20) for bar in bars], color=INK)
        axes.invert_yaxis()
        _plain_bars(axes)
        largest = max(bars, key=lambda bar: bar.numbers)
        axes.set_xlim(0, 142 * largest.numbers / everything)
        axes.set_xlabel("share of the quantized numbers, %")
        listed = [f"{bar.name} {100 * bar.numbers / everything:.1f} %" for bar in bars]
        svg = to_svg(
            figure, f"Share of the numbers in each scheme: {', '.join(listed)}.", "schemes"
        )
    caption = "Fewest bits on top; colours as in the grid of bits."
    return Picture("Schemes in use", caption, svg)


@dataclass(frozen=True)
class _Bar:
    """One scheme: how many weights and numbers it holds, and their mean bits."""

    name: str
    weights: int
    numbers: int
    bits: float


def _scheme_bars(weights: Sequence[WeightRow]) -> list[_Bar]:
    """By bits; schemes beyond the _MOST_SCHEMES largest become one bar at the end."""
    groups: dict[str, list[WeightRow]] = {}
    for weight in weights:
        groups.setdefault(weight.scheme, []).append(weight)
    ranked = sorted(groups, key=lambda name: -sum(row.parameters for row in groups[name]))
    bars = [_bar(name, groups[name]) for name in ranked[:_MOST_SCHEMES]]
    bars.sort(key=lambda bar: bar.bits)
    rest = ranked[_MOST_SCHEMES:]
    if rest:
        bars.append(_bar(f"{len(rest)} others", [row for name in rest for row in groups[name]]))
    return bars


def _bar(name: str, rows: Sequence[WeightRow]) -> _Bar:
    numbers = sum(row.parameters for row in rows)
    return _Bar(name, len(rows), numbers, sum(row.bits * row.parameters for row in rows) / numbers)


def _stack(axes: Axes, y: int, counts: Sequence[int], longest: int) -> None:
    """One bar of adjoining segments, each with its size where there is room."""
    left = 0.0
    for count, colour in zip(counts, PALETTE, strict=False):
        width = count / 1e6
        axes.barh(y, width, 0.66, left=left, color=colour, edgecolor=PAPER, linewidth=1.2)
        if count > _LABELLED * longest:
            middle = left + width / 2, y
            ink = text_on(colour)
            axes.text(*middle, words.size(count), ha="center", va="center", fontsize=10, color=ink)
        left += width


def _plain_bars(axes: Axes) -> None:
    """Names of bars need no axis line and no ticks."""
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _largest(rows: Sequence[ComponentRow], most: int) -> list[ComponentRow]:
    """The largest components, the others summed into one."""
    ranked = sorted(rows, key=lambda row: -row.before)
    if len(ranked) <= most:
        return ranked
    rest = ranked[most - 1 :]
    before, after = sum(row.before for row in rest), sum(row.after for row in rest)
    return [*ranked[: most - 1], ComponentRow(f"{len(rest)} others", before, after)]
