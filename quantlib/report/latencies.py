"""What a millisecond buys: loss over latency, and sizes and latencies at equal loss."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from quantlib.report import words
from quantlib.report.curves import DASHES, HEIGHT, Key, log_axis
from quantlib.report.data import LatencyPoint, LatencyRow, ReportData, TradeOff
from quantlib.report.theme import (
    ACCENT,
    LOSS_RAMP,
    MUTED,
    PAPER,
    WARM,
    Picture,
    css,
    new_figure,
    note,
    style,
    to_svg,
)
from quantlib.search.latency import format_ms


def latency_pictures(data: ReportData) -> list[Picture]:
    """For every limited latency: loss over milliseconds, then milliseconds over bytes."""
    drawn = []
    for row in data.latencies:
        drawn += [_loss_over_time(data, row), _time_over_size(data, row)]
    return [picture for picture in drawn if picture is not None]


# -- loss over latency ---------------------------------------------------------------------------


def _loss_over_time(data: ReportData, row: LatencyRow) -> Picture | None:
    """None without a front."""
    front = [point for point in data.latency_front if point.cost == row.cost and point.loss > 0]
    front.sort(key=lambda point: point.ms)
    if len(front) < 2:
        return None
    key: Key = []
    with style():
        figure, axes = new_figure(HEIGHT)
        _front(axes, front, key)
        axes.axvline(row.limit, color=MUTED, linewidth=1, linestyle=DASHES)
        key.append((css(MUTED), f"budget {format_ms(row.limit)}", "dash"))
        _chosen(axes, data, row, key)
        log_axis(axes, "y")
        axes.set_xlabel(f"ms for {row.what}")
        axes.set_ylabel(f"loss, {data.unit}")
        svg = to_svg(figure, _time_words(data, row, front), f"latency {row.cost}")
    caption = "The least loss predicted at each latency, whatever the size" + _on(data)
    return Picture("Loss against latency", caption, svg, tuple(key))


def _front(axes: Axes, front: list[LatencyPoint], key: Key) -> None:
    times = [point.ms for point in front]
    lows = [point.low for point in front if point.low is not None]
    highs = [point.high for point in front if point.high is not None]
    label = "predicted front"
    if len(lows) == len(highs) == len(front):
        axes.fill_between(times, lows, highs, color=ACCENT, alpha=0.18, linewidth=0)
        label += ", 95 % band"
    axes.plot(times, [point.loss for point in front], color=ACCENT)
    key.append((css(ACCENT), label, "line"))


def _chosen(axes: Axes, data: ReportData, row: LatencyRow, key: Key) -> None:
    """This plan as predicted, and, once the checkpoint was timed, where it really is."""
    loss = _loss_of(data)
    if loss is None or loss <= 0:
        return
    if row.predicted is not None and row.measured is not None:
        axes.plot([row.predicted, row.measured], [loss, loss], color=WARM, linewidth=1)
    if row.predicted is not None:
        axes.plot(row.predicted, loss, "o", color=PAPER, markeredgecolor=WARM, markersize=9)
        key.append((css(WARM), f"this plan, {format_ms(row.predicted)} predicted", "ring"))
    if row.measured is not None:
        axes.plot(row.measured, loss, "o", color=WARM, markeredgecolor=PAPER, markersize=10)
        key.append((css(WARM), f"this model, {format_ms(row.measured)} measured", "big"))


def _loss_of(data: ReportData) -> float | None:
    """This model's loss: measured, else expected, else the plain sum."""
    measured = next((point.loss for point in data.measured if point.chosen), None)
    if measured is not None:
        return measured
    return data.predicted[0] if data.predicted is not None else data.predicted_sum


# -- size and latency ----------------------------------------------------------------------------


def _time_over_size(data: ReportData, row: LatencyRow) -> Picture | None:
    """None without lines of equal loss."""
    places = [place for place in data.trade_offs if place.cost == row.cost]
    levels = sorted({place.level for place in places})
    if not levels:
        return None
    key: Key = []
    with style():
        figure, axes = new_figure(HEIGHT)
        for index, level in enumerate(levels):
            colour = to_hex(LOSS_RAMP(0.25 + 0.7 * index / max(1, len(levels) - 1)))
            line = sorted((p for p in places if p.level == level), key=lambda p: p.bytes)
            _line(axes, line, colour)
            key.append((colour, f"loss {words.number(level)}", "line"))
        _limits(axes, data, row, key)
        taken = row.predicted if row.measured is None else row.measured
        if taken is not None:
            point = data.bytes_after / 1e6, taken
            axes.plot(*point, "o", color=WARM, markeredgecolor=PAPER, markersize=10)
            key.append((css(WARM), "this model" if row.measured else "this plan", "big"))
        axes.set_xlabel("MB on disk")
        axes.set_ylabel(f"ms for {row.what}")
        svg = to_svg(figure, _size_words(data, row, places), f"trade {row.cost}")
    caption = (
        "Sizes and latencies one may choose between at equal loss. Lower left is better; where a "
        "line is short, small and fast are the same" + _on(data)
    )
    return Picture("Size against latency", caption, svg, tuple(key))


def _line(axes: Axes, places: list[TradeOff], colour: str) -> None:
    sizes, times = [place.bytes / 1e6 for place in places], [place.ms for place in places]
    axes.plot(sizes, times, "o-", color=colour, markersize=4)
    note(axes, words.number(places[0].level, 2), (sizes[-1], times[-1]), above=-8)


def _limits(axes: Axes, data: ReportData, row: LatencyRow, key: Key) -> None:
    axes.axhline(row.limit, color=MUTED, linewidth=1, linestyle=DASHES)
    label = f"budget {format_ms(row.limit)}"
    if data.budget_bytes is not None:
        axes.axvline(data.budget_bytes / 1e6, color=MUTED, linewidth=1, linestyle=DASHES)
        label = f"budgets {format_ms(row.limit)} and {words.size(data.budget_bytes)}"
    key.append((css(MUTED), label, "dash"))


# -- words ---------------------------------------------------------------------------------------


def _on(data: ReportData) -> str:
    return f" ({data.machine})." if data.machine else "."


def _time_words(data: ReportData, row: LatencyRow, front: list[LatencyPoint]) -> str:
    fast, slow = front[0], front[-1]
    parts = [
        f"Loss against latency for {row.what}. Predicted loss falls from "
        f"{words.number(fast.loss)} at {format_ms(fast.ms)} to {words.number(slow.loss)} at "
        f"{format_ms(slow.ms)}. {format_ms(row.limit)} are allowed."
    ]
    if row.predicted is not None:
        parts.append(f"This plan is predicted to take {format_ms(row.predicted)}.")
    if row.measured is not None:
        parts.append(f"This model was measured to take {format_ms(row.measured)}.")
    return " ".join(parts)


def _size_words(data: ReportData, row: LatencyRow, places: list[TradeOff]) -> str:
    listed = "; ".join(
        f"loss {words.number(p.level)}: {words.size(p.bytes)} and {format_ms(p.ms)}" for p in places
    )
    return f"Size against latency for {row.what}, at equal loss: {listed}."
