"""Budgets as people write them, in bytes as the solver needs them.

`90MB` is 90,000,000 bytes and `85MiB` is 85 * 2^20: file sizes and the prices of storage are
decimal, memory is binary, and mixing them up loses 5 %. Bits per parameter are *true* bits: every
byte of the checkpoint (codes, scales, zero points, what stays in 16 bits, headers) times eight over
the parameters of the model. Arithmetic is exact (fractions), and a budget is rounded down: one byte
over is over.
"""

from __future__ import annotations

import re
from fractions import Fraction

from quantlib.errors import UsageError

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_NAMES = ("kB", "MB", "GB", "TB")
_UNITS = _DECIMAL | _BINARY
_SIZE = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d[\d_]*)(?:\.\d+)?)\s*(?P<unit>%|[kmgt]i?b?|b|bytes)?",
    re.IGNORECASE,
)


def parse_size(text: str | int, source_bytes: int | None = None) -> int:
    """Bytes of `82.8MB`, `1.2GB`, `85MiB`, `82800000`, or `30%` of `source_bytes`. Raises
    UsageError."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise UsageError(
            f"{text!r} is not a size: write for example 90MB, 1.2GB, 85MiB, 82800000 or 30%"
        )
    number = Fraction(match["number"].replace("_", "").replace(",", ""))
    unit = (match["unit"] or "").lower()
    if unit == "%":
        if source_bytes is None:
            raise UsageError(
                f"{text!r}: a percentage needs the size of the source model, which is not known"
            )
        size = int(number * source_bytes / 100)
    else:
        size = int(number * _UNITS[unit.removesuffix("ytes").removesuffix("b")])
    if size <= 0:
        raise UsageError(f"{text!r} leaves no bytes at all: a budget must be positive")
    return size


def parse_bits(bits: str | float, parameters: int) -> int:
    """Bytes that `bits` true bits for each of `parameters` parameters come to. Raises
    UsageError."""
    try:
        value = Fraction(str(bits).strip())
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"{bits!r} is not a number of bits: write for example 4 or 4.25"
        ) from error
    if not 0 < value <= 32:
        raise UsageError(
            f"{bits} bits per parameter is out of range: write a number up to 32, such as 4.25"
        )
    if parameters <= 0:
        raise UsageError("bits per parameter need a model with parameters; this one has none")
    return int(value * parameters / 8)


def true_bits(size: int, parameters: int) -> float:
    """Bits per parameter of a checkpoint of `size` bytes, everything counted."""
    if parameters <= 0:
        raise UsageError("bits per parameter need a model with parameters; this one has none")
    return 8 * size / parameters


def format_size(size: int) -> str:
    """`82800000` as `82.8 MB`: decimal units, three or four digits, never rounded up past a
    unit."""
    if abs(size) < 1000:
        return f"{size} bytes"
    power = 1
    while abs(size) / 1000**power >= 999.95 and power < len(_NAMES):
        power += 1
    value = size / 1000**power
    digits = 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f} {_NAMES[power - 1]}"
