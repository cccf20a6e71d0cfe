"""Loss over bytes of the searches that `bench.search` compares, as an SVG for the README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

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


def save_plot(task: Mapping[str, Any], file: Path) -> None:
    """Draw a task's rows: a line for every search, 95 % error bars, the exact one in black."""
    methods = list(dict.fromkeys(row["method"] for row in task["rows"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for index, method in enumerate(methods):
            mine = sorted(
                (row for row in task["rows"] if row["method"] == method), key=lambda r: r["bytes"]
            )
            is_exact = method == "exact, measured"
            axes.errorbar(
                [row["bytes"] / 1e6 for row in mine],
                [row["loss"] for row in mine],
                [1.96 * row["error"] for row in mine],
                label=method,
                color=EXACT if is_exact else PALETTE[index % len(PALETTE)],
                marker=MARKERS[index % len(MARKERS)],
                linewidth=2.0 if is_exact else 1.0,
                markersize=5,
                capsize=2,
            )
        axes.set_yscale("log")
        axes.set_xlabel("MB on disk")
        axes.set_ylabel(task["unit"])
        axes.legend(frameon=False, fontsize=8, ncols=2)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing, facecolor="white")
