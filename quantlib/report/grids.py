"""Layers down, kinds of weight across: who got which bits, and who needed them.

Both pictures share one layout, so the eye can go from one to the other. A weight outside the
repeated blocks (an embedding, a projector) is a bar over all columns, placed where it stands in the
model. Several weights in one cell (the experts of a layer) are shown as their mean bits, or the sum
of their losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, to_hex
from matplotlib.patches import Rectangle

from quantlib.report import words
from quantlib.report.data import ReportData, WeightRow
from quantlib.report.stacks import Stack, stacks
from quantlib.report.theme import (
    BITS_RAMP,
    LINE,
    LOSS_RAMP,
    MUTED,
    PAPER,
    Picture,
    new_figure,
    style,
    text_on,
    to_svg,
)

BITS = Normalize(2, 8, clip=True)
"""Fixed, so that a colour means the same bits in every report; 16-bit weights take the darkest."""

_ROW, _THIN_ROW, _HEADER = 20.0, 11.0, 40.0
"""Points of a row with numbers, of one without, and of the column names."""
_TALL, _WIDE = 48, 12
"""Rows and columns beyond which cells have no room for numbers."""


@dataclass(frozen=True)
class _Paint:
    """How weights of one cell become a value (None: unknown), and a value a colour and a text."""

    name: str
    value: Callable[[Sequence[WeightRow]], float | None]
    colour: Callable[[float], Any]
    text: Callable[[float], str]


def bits_colour(bits: float) -> str:
    """Hex colour of so many bits, as the grid and every key show it."""
    return to_hex(BITS_RAMP(BITS(bits)))


def bits_pictures(data: ReportData) -> list[Picture]:
    """One grid per stack, coloured by true bits per weight."""

    def mean(cell: Sequence[WeightRow]) -> float:
        total = sum(row.parameters for row in cell)
        return sum(row.bits * row.parameters for row in cell) / total

    def text(bits: float) -> str:
        return f"{bits:.0f}" if bits >= 10 else f"{bits:.2f}"

    paint = _Paint("bits", mean, bits_colour, text)
    key = tuple((bits_colour(bits), str(bits), "fill") for bits in range(2, 9))
    caption = "True bits per weight: codes, scales and zero points. Layers run down, in order."
    pictures = []
    for stack in stacks(data.weights):
        low = min(stack.weights, key=lambda row: row.bits)
        high = max(stack.weights, key=lambda row: row.bits)
        description = (
            f"Grid of {words.count(len(stack.blocks), 'block')} by "
            f"{words.count(len(stack.columns), 'kind')} of weight, coloured by true bits per "
            f"weight: from {low.bits:.2f} for {low.name} to {high.bits:.2f} for {high.name}."
        )
        pictures.append(
            Picture(f"Bits in {stack.prefix}", caption, _draw(stack, paint, description), key)
        )
    return pictures


def loss_pictures(data: ReportData) -> list[Picture]:
    """One grid per stack, coloured by predicted loss in one scheme: one log scale for all stacks.

    Empty without a sensitivity map, or when no loss in it is positive.
    """
    losses = data.sensitivity.loss if data.sensitivity is not None else {}
    positive = sorted(loss for loss in losses.values() if loss > 0)
    if data.sensitivity is None or not positive:
        return []
    scheme = data.sensitivity.scheme
    lowest, highest = _decades(positive)
    norm = LogNorm(10.0**lowest, 10.0**highest, clip=True)
    step = 10.0 ** math.floor(math.log10(positive[len(positive) // 2]))

    def total(cell: Sequence[WeightRow]) -> float | None:
        known = [losses[row.name] for row in cell if row.name in losses]
        return math.fsum(known) if known else None

    def colour(loss: float) -> str:
        return to_hex(LOSS_RAMP(norm(max(loss, 10.0**lowest))))

    def text(loss: float) -> str:
        return f"{loss / step:.0f}" if loss >= 10 * step else f"{loss / step:.1f}"

    paint = _Paint("loss", total, colour, text)
    decades = range(lowest, highest + 1)
    key = tuple((colour(10.0**power), words.tick(10.0**power), "fill") for power in decades)
    caption = (
        f"Loss predicted when one weight alone is stored as {scheme}: colour in {data.unit}, "
        f"numbers in units of {words.tick(step)}. Darker needs more bits."
    )
    pictures = []
    for stack in stacks(data.weights):
        worst = max(stack.weights, key=lambda row: losses.get(row.name, 0.0))
        description = (
            f"Grid of the loss predicted when each weight alone is stored as {scheme}, on a "
            f"logarithmic colour scale. The most sensitive is {worst.name} with "
            f"{words.number(losses.get(worst.name, 0.0))} {data.unit}."
        )
        pictures.append(
            Picture(
                f"Sensitivity of {stack.prefix}", caption, _draw(stack, paint, description), key
            )
        )
    return pictures


# -- drawing -------------------------------------------------------------------------------------


def _draw(stack: Stack, paint: _Paint, description: str) -> str:
    """The grid as inline SVG."""
    rows = len(stack.before) + len(stack.blocks) + len(stack.after)
    columns = len(stack.columns)
    row_points = _ROW if len(stack.blocks) <= _TALL else _THIN_ROW
    roomy = row_points == _ROW and columns <= _WIDE
    slanted = max(map(len, stack.labels)) * columns > 56
    with style():
        figure, axes = new_figure(rows * row_points + _HEADER + (20 if slanted else 0))
        outside = [*enumerate(stack.before)]
        outside += [*enumerate(stack.after, len(stack.before) + len(stack.blocks))]
        for y, weight in outside:
            short = words.shorten(weight.name.removesuffix(".weight").split(".")[-1], 40)
            _cell(axes, (0, y), columns, paint, [weight], f"{short} · ", row_points)
        for (block, column), weights in stack.cells.items():
            place = column, block + len(stack.before)
            _cell(axes, place, 1, paint, weights, "" if roomy else None, row_points)
        _frame(axes, stack, rows, slanted)
        return to_svg(figure, description, f"{paint.name} {stack.prefix}")


def _cell(
    axes: Axes,
    place: tuple[int, int],
    width: int,
    paint: _Paint,
    weights: Sequence[WeightRow],
    label: str | None,
    row_points: float,
) -> None:
    """One rectangle; `label` comes before the value's text, None for no text at all."""
    x, y = place
    value = paint.value(weights)
    fill = LINE if value is None else paint.colour(value)
    axes.add_patch(Rectangle((x, y), width, 1, facecolor=fill, edgecolor=PAPER, linewidth=1.3))
    if label is not None:
        text = label + ("–" if value is None else paint.text(value))
        ink = MUTED if value is None else text_on(fill)
        size = min(9.0, 0.8 * row_points)
        middle = x + width / 2, y + 0.52
        axes.text(*middle, text, ha="center", va="center", fontsize=size, color=ink)


def _frame(axes: Axes, stack: Stack, rows: int, slanted: bool) -> None:
    """Names of columns on top, numbers of blocks at the left, and no box."""
    columns = len(stack.columns)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=3)
    axes.xaxis.tick_top()
    turn: dict[str, Any] = {"rotation": 35, "ha": "left"} if slanted else {"ha": "center"}
    places = [column + (0.3 if slanted else 0.5) for column in range(columns)]
    labels = [words.shorten(label, 18) for label in stack.labels]
    axes.set_xticks(places, labels, fontsize=10.5, **turn)
    shown = range(0, len(stack.blocks), 1 if len(stack.blocks) <= _TALL else 5)
    numbers = [stack.numbers[index] for index in shown]
    heights = [len(stack.before) + index + 0.5 for index in shown]
    axes.set_yticks(heights, numbers, fontsize=9.5, color=MUTED)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around sorted values; at most five apart, the smallest sharing a colour."""
    high = math.ceil(math.log10(values[-1]) - 1e-9)
    low = min(math.floor(math.log10(values[0]) + 1e-9), high - 1)
    return max(low, high - 5), high
