"""How the figures look, and how a matplotlib figure becomes part of a page.

Figures are inlined as SVG with live text: they take the page's font, stay sharp on every screen,
and follow its light or dark theme. Matplotlib knows nothing of CSS, so it is handed colours that
stand for roles (`INK`, `ACCENT`, ...) and `to_svg` replaces each by the CSS variable of that name.
Colours that carry data (the ramps, the component palette) are the same in both themes and are
chosen to read on either.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

INK, MUTED, LINE, ACCENT, WARM, PAPER = (f"#0{index}0{index}0{index}" for index in range(1, 7))
"""Stand-ins for the CSS variables of the same (lower-case) names."""
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    ACCENT: "accent",
    WARM: "warm",
    PAPER: "paper",
}

PALETTE = ("#2f8f9d", "#4a6fa5", "#d99a2b", "#bb5a6c", "#7a64ac", "#7c9a4d", "#8d8d86")
"""Components, in order of size; the last one is for everything smaller."""

BITS_RAMP: Colormap = LinearSegmentedColormap.from_list(
    "bits", ["#f3e7c4", "#b9d7b8", "#6fb8b0", "#3a8fa3", "#2a6390", "#27386f", "#20184a"]
)
LOSS_RAMP: Colormap = LinearSegmentedColormap.from_list(
    "loss", ["#f7ecd6", "#f5cf9b", "#ee9f66", "#dd6a50", "#b93d58", "#812260", "#451452"]
)

WIDTH = 460 / 72
"""Inches of every figure: one column of a wide page, and a phone held upright."""

_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of weights are not formulas
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout on every machine
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "lines.linewidth": 2.0,
}


def style() -> Any:
    """The settings figures are made and drawn in, as a context that leaves nothing behind."""
    return matplotlib.rc_context(_RC)


@dataclass(frozen=True)
class Picture:
    """A figure with its words.

    key: (CSS colour, label, shape) rows; a shape is fill, dot, big (a large dot), ring, line or
         dash.
    """

    title: str
    caption: str
    svg: str
    key: tuple[tuple[str, str, str], ...] = ()


def css(role: str) -> str:
    """The CSS of a role's stand-in colour, for keys: `css(ACCENT)` is `var(--accent)`."""
    return f"var(--{_VARIABLES[role]})" if role in _VARIABLES else role


def new_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of the page's width and `height` points, with one axes."""
    figure = Figure(figsize=(WIDTH, height / 72), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def note(axes: Axes, text: str, place: tuple[float, float], above: float = 0.0) -> None:
    """A muted remark right of a point or a bar's end, `above` it by so many points."""
    axes.annotate(
        text,
        place,
        (7, above),
        textcoords="offset points",
        va="center",
        fontsize=10,
        color=MUTED,
    )


def text_on(colour: Any) -> str:
    """Black or white, whichever contrasts more with `colour` (WCAG 2: at least 4.1 to 1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#1b1b1f" if luminance > 0.203 else "#ffffff"


def to_svg(figure: Figure, description: str, salt: str) -> str:
    """The figure as an inline `<svg>` with `description` for screen readers.

    `salt` makes its internal ids differ from those of the page's other figures, and the output
    reproducible.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with style(), matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {box.group() if box else ""} role="img" aria-label="{escape(description)}">'
    text = head + text[text.index(">") + 1 :]
    text = text.replace("xlink:href", "href")
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(r"font: (?:\w+ )*([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    return re.sub(r' id="([^"]*)"', lambda m: m.group() if m.group(1) in used else "", text)
