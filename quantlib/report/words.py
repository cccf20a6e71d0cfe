"""Numbers as a reader wants them: how the report writes bytes, losses, bits and seconds."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """`82.8 MB`: decimal units, three or four significant digits, as budgets are written."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            return f"{value:.2f} {unit}" if value < 10 else f"{value:,.1f} {unit}"
    return f"{count:,.0f} B"


def number(value: float, digits: int = 3) -> str:
    """`0.0849`, `2.10e-5`: significant digits, and no exponent where a reader needs none."""
    if value == 0 or not math.isfinite(value):
        return {0.0: "0", math.inf: "∞", -math.inf: "-∞"}.get(value, "nan")
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 7:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(power)}"


def tick(value: float) -> str:
    """A round number, as on an axis: `0.01`, `0.5`, `2e-6`."""
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:g}"
    mantissa, _, power = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(power)}"


def duration(seconds: float) -> str:
    """`3.2 s`, `4 min 10 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: int, noun: str) -> str:
    """`1 weight`, `210 weights`."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def millions(value: int) -> str:
    """`134.5 million`, `1.24 billion`: parameters of a model."""
    return f"{value / 1e9:.2f} billion" if value >= 1e9 else f"{value / 1e6:.1f} million"


def shorten(text: str, most: int) -> str:
    """A name that fits a figure: its beginning and its end around an ellipsis."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
