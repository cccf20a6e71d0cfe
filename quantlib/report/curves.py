"""What a byte buys, and whether predictions came true: loss over bytes, measured over predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from quantlib.errors import SearchError
from quantlib.report import words
from quantlib.report.data import FrontPoint, MeasuredPoint, ReportData
from quantlib.report.theme import (
    ACCENT,
    LINE,
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
from quantlib.search.calibrate import Calibration

HEIGHT = 340.0
DASHES = (0, (3, 3))
_NORMAL_95 = 1.96
"""Half a 95 % interval in standard errors: what the error bars show."""

Key = list[tuple[str, str, str]]


def pareto(data: ReportData) -> Picture | None:
    """Loss over bytes: the predicted front with its band, what was measured, what others reach.

    None when there is neither a front nor a measurement.
    """
    front = sorted((point for point in data.front if point.loss > 0), key=lambda p: p.bytes)
    if len(front) < 2 and not any(point.loss > 0 for point in data.measured):
        return None
    key: Key = []
    with style():
        figure, axes = new_figure(HEIGHT)
        _front(axes, front, key)
        _budget(axes, data, key)
        _promise(axes, data, key)
        _plans(axes, data, key)
        log_axis(axes, "y")
        axes.set_xlabel("MB on disk")
        axes.set_ylabel(f"loss, {data.unit}")
        svg = to_svg(figure, _pareto_words(data), "pareto")
    caption = (
        "The least loss predicted at each size, where this plan lies on it, and plans that were "
        "really measured, with 95 % error bars. Lower left is better."
    )
    return Picture("Loss against size", caption, svg, tuple(key))


def predictions(data: ReportData) -> Picture | None:
    """Measured loss over the sum of predicted ones, with the fitted line and its 95 % band.

    None when nothing was measured; only the points when probes cannot carry a line.
    """
    probes = [probe for probe in data.probes if probe.predicted > 0 and probe.measured > 0]
    here = _chosen(data)
    if here is not None and not (here.loss > 0 and data.predicted_sum):
        here = None  # the axes are logarithmic
    if not probes and here is None:
        return None
    key: Key = [(css(ACCENT), "probe plans", "dot")] if probes else []
    sums = [probe.predicted for probe in probes]
    measured = [MeasuredPoint("", 0, probe.measured, probe.error) for probe in probes]
    calibration = _calibration(data)
    with style():
        figure, axes = new_figure(HEIGHT)
        ends = [*sums, *([data.predicted_sum] if data.predicted_sum else [])]
        ends += [here.loss] if here is not None else []
        grid = np.geomspace(min(ends) / 1.25, max(ends) * 1.25, 60)
        axes.plot(grid, grid, color=MUTED, linewidth=1, linestyle=DASHES)
        if calibration is not None:
            lines = np.array([calibration.predict(float(value)) for value in grid])
            axes.fill_between(grid, lines[:, 1], lines[:, 2], color=ACCENT, alpha=0.18, linewidth=0)
            axes.plot(grid, lines[:, 0], color=ACCENT)
            key.append((css(ACCENT), "fitted line, 95 % band", "line"))
        if probes:
            _points(axes, sums, measured, ACCENT, 5.5)
        if here is not None and data.predicted_sum:
            _points(axes, [data.predicted_sum], [here], WARM, 9)
            key.append((css(WARM), "this model", "dot"))
        key.append((css(MUTED), "measured = predicted", "dash"))
        log_axis(axes, "x")
        log_axis(axes, "y")
        axes.set_xlabel(f"sum of predicted losses, {data.unit}")
        axes.set_ylabel(f"measured loss, {data.unit}")
        caption = _prediction_words(data, calibration)
        svg = to_svg(figure, caption, "predictions")
    return Picture("Predicted against measured", caption, svg, tuple(key))


# -- parts ---------------------------------------------------------------------------------------


def _front(axes: Axes, front: Sequence[FrontPoint], key: Key) -> None:
    if len(front) < 2:
        return
    sizes = [point.bytes / 1e6 for point in front]
    lows = [point.low for point in front if point.low is not None]
    highs = [point.high for point in front if point.high is not None]
    label = "predicted front"
    if len(lows) == len(highs) == len(front):
        axes.fill_between(sizes, lows, highs, color=ACCENT, alpha=0.18, linewidth=0)
        label += ", 95 % band"
    axes.plot(sizes, [point.loss for point in front], color=ACCENT)
    key.append((css(ACCENT), label, "line"))


def _budget(axes: Axes, data: ReportData, key: Key) -> None:
    if data.budget_bytes is not None:
        axes.axvline(data.budget_bytes / 1e6, color=MUTED, linewidth=1, linestyle=DASHES)
        key.append((css(MUTED), f"budget {words.size(data.budget_bytes)}", "dash"))


def _promise(axes: Axes, data: ReportData, key: Key) -> None:
    """A ring where the chosen plan was predicted to be."""
    loss = _promised(data)
    if loss is not None:
        place = [data.bytes_after / 1e6], [loss]
        axes.plot(*place, "o", color=WARM, markersize=11, markerfacecolor="none", zorder=4)
        key.append((css(WARM), "this plan, predicted", "ring"))


def _plans(axes: Axes, data: ReportData, key: Key) -> None:
    """Measured points: this model large, our other plans small, other methods grey with names."""
    layers = (
        ([point for point in data.measured if not point.chosen], WARM, 5.5, "other measured plans"),
        (list(data.others), MUTED, 5.5, "other methods"),
        ([point for point in data.measured if point.chosen], WARM, 10.0, "this model"),
    )
    for plans, colour, size, label in layers:
        points = [point for point in plans if point.loss > 0]  # the axis is logarithmic
        if points:
            _points(axes, [point.bytes / 1e6 for point in points], points, colour, size)
            key.append((css(colour), label, "dot" if size < 8 else "big"))
    for point in data.others:
        note(axes, words.shorten(point.label, 28), (point.bytes / 1e6, point.loss), above=4)


def _points(
    axes: Axes, xs: Sequence[float], points: Sequence[MeasuredPoint], colour: str, size: float
) -> None:
    """Markers with 95 % error bars."""
    losses = np.array([point.loss for point in points])
    half = _NORMAL_95 * np.array([point.error or 0.0 for point in points])
    low = np.minimum(half, 0.95 * losses)  # a logarithmic axis has no room for zero
    bars = np.stack([low, half]) if half.any() else None
    axes.errorbar(
        xs,
        losses,
        yerr=bars,
        fmt="o",
        color=colour,
        markersize=size,
        markeredgecolor=PAPER,
        markeredgewidth=0.8,
        elinewidth=1.2,
    )


def log_axis(axes: Axes, name: Literal["x", "y"]) -> None:
    """Logarithmic, with plain numbers: at 1, 2 and 5 of each decade when there are few decades, at
    all nine when there is a part of one."""
    getattr(axes, f"set_{name}scale")("log")
    axis = getattr(axes, f"{name}axis")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    steps = tuple(range(1, 10)) if decades < 0.6 else (1, 2, 5) if decades < 2.5 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: words.tick(value)))
    axes.grid(axis=name, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)


# -- words ---------------------------------------------------------------------------------------


def _calibration(data: ReportData) -> Calibration | None:
    """The search's own line through the probes; None when they cannot carry one."""
    try:
        return Calibration.fit([(p.predicted, p.measured, p.error) for p in data.probes])
    except SearchError:
        return None


def _chosen(data: ReportData) -> MeasuredPoint | None:
    return next((point for point in data.measured if point.chosen), None)


def _promised(data: ReportData) -> float | None:
    """The chosen plan's predicted loss, as the front counts it: calibrated where the front is."""
    if data.predicted is not None:
        return data.predicted[0] if data.predicted[0] > 0 else None
    if not data.predicted_sum:
        return None
    calibration = _calibration(data)
    if calibration is None:
        return data.predicted_sum
    return calibration.predict(data.predicted_sum).value


def _pareto_words(data: ReportData) -> str:
    parts = ["Loss against size."]
    if len(data.front) > 1:
        ends = sorted(data.front, key=lambda point: point.bytes)
        small, large = (
            f"{words.number(p.loss)} at {words.size(p.bytes)}" for p in ends[:: len(ends) - 1]
        )
        parts.append(f"Predicted loss falls from {small} to {large}.")
    promised, here = _promised(data), _chosen(data)
    if promised is not None:
        expected = f"{words.number(promised)} at {words.size(data.bytes_after)}"
        parts.append(f"This plan is predicted to lose {expected}.")
    if here is not None:
        measured = f"{words.size(here.bytes)} and a measured loss of {words.number(here.loss)}"
        parts.append(f"This model has {measured}.")
    others = (f"{p.label}: {words.number(p.loss)} at {words.size(p.bytes)}." for p in data.others)
    return " ".join([*parts, *others])


def _prediction_words(data: ReportData, calibration: Calibration | None) -> str:
    if not data.probes:
        return (
            "No probe plans were measured to calibrate the sum of predicted losses, which is often "
            "too small by itself. On the dashed line it would have come true."
        )
    probes = words.count(len(data.probes), "measured probe plan")
    if calibration is None:
        return f"{probes}, too few or too alike to fit a line."
    factor = words.number(math.exp(calibration.intercept))
    return (
        f"{probes}. The line is measured = {factor} × predicted^{calibration.slope:.2f}; "
        "the band is for one new measurement."
    )
