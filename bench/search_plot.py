"""What the searches that `bench.search` compares reach at which cost, as SVG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from quantlib.report.theme import PALETTE

STYLE = {
    "svg.hashsalt": "search",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
EXACT = "#1b1b1f"
MARKERS = "osD^v<>PX*ph"
WIDE = 4.0
"""Of costs that are farther apart, the axis is logarithmic."""


Points = Sequence[tuple[float, float, float]]
"""Cost, quality, and half of a 95 % interval of the quality."""


def save_plot(task: Mapping[str, Any], file: Path) -> None:
    """Draw a task's rows: a line for every search, 95 % error bars, the exact one in black."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in task["rows"]:
        point = (row["bytes"] / 1e6, row["loss"], 1.96 * row["error"])
        points.setdefault(row["method"], []).append(point)
    _save(points, ("MB on disk", task["unit"]), ("linear", "log"), file)


def save_others(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the rows of one task as `search_others.other_rows` has them."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        point = (row["cost"], row["quality"], row["error"] or 0.0)
        points.setdefault(row["method"], []).append(point)
    costs = [row["cost"] for row in rows]
    is_wide = max(costs) > WIDE * min(costs)
    labels = (rows[0]["cost_unit"], rows[0]["quality_unit"])
    _save(points, labels, ("log" if is_wide else "linear", "linear"), file)


def _save(
    points: Mapping[str, Points], labels: tuple[str, str], scales: tuple[str, str], file: Path
) -> None:
    """One line with error bars for every method; labels and scales of both axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for index, (method, found) in enumerate(points.items()):
            costs, qualities, errors = zip(*sorted(found), strict=True)
            is_exact = method == "exact, measured"
            axes.errorbar(
                costs,
                qualities,
                errors,
                label=method,
                color=EXACT if is_exact else PALETTE[index % len(PALETTE)],
                marker=MARKERS[index % len(MARKERS)],
                linewidth=2.0 if is_exact else 1.0,
                markersize=5,
                capsize=2,
            )
        axes.set(xlabel=labels[0], ylabel=labels[1], yscale=scales[1])
        if scales[0] == "log":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.legend(frameon=False, fontsize=8, ncols=2)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing, facecolor="white")
