"""Names of weights that are stored as several matrices: factors beside a rest, and blocks of rows.

What the matrices are is in `composite.py`; here is what a scheme says of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from quantlib.errors import FormatError

if TYPE_CHECKING:
    from quantlib.formats.weight_format import WeightFormat

FACTORS = {8: "w8", 4: "w4g32"}
"""Formats of factors, by their bits."""
MOST_BLOCKS = 4
"""Of rows: which block a row is in takes two bits at most."""

CANONICAL = re.compile(r"c(?P<rank>[1-9]\d*)k(?P<window>[1-9]\d*(?:x[1-9]\d*)*)w(?P<bits>\d)")
LOW_RANK = re.compile(r"r(?P<rank>[1-9]\d*)(?:w(?P<bits>\d))?")
ROW_BLOCK = re.compile(
    r"(?P<format>[^@d]+)(?:d(?P<width>[1-9]\d*))?(?:@(?P<share>[1-9]\d*/[1-9]\d*))?"
)


@dataclass(frozen=True, order=True)
class LowRank:
    """`rank` directions of a weight as two factors, [N, rank] times [rank, K], in `bits` bits.

    alone:  there is no rest beside them.
    window: of a convolution's filters [N, channels, *window], whose first factor is a product of
            vectors, one of the channels and one of every axis of the window (canonical polyadic
            form); there is no rest then. Empty: the first factor is any matrix.
    """

    rank: int
    bits: int = 8
    alone: bool = False
    window: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or self.bits not in FACTORS:
            raise FormatError(
                f"factors of rank {self.rank} in {self.bits} bits: write for example +r16 (8 bits) "
                "or +r16w4"
            )
        if self.window and not self.alone:
            raise FormatError("canonical factors have no rest beside them")

    def __str__(self) -> str:
        if self.window:
            return f"c{self.rank}k{'x'.join(map(str, self.window))}w{self.bits}"
        return f"r{self.rank}" + ("" if self.bits == 8 and not self.alone else f"w{self.bits}")


@dataclass(frozen=True, order=True)
class RowBlock:
    """Rows of an embedding in one format.

    share: of all rows; None: those that are left, in the last block.
    width: dimensions that are kept of them; 0: all.
    """

    format: WeightFormat
    share: Fraction | None = None
    width: int = 0

    def __str__(self) -> str:
        name = str(self.format) + (f"d{self.width}" if self.width else "")
        share = self.share
        return name if share is None else f"{name}@{share.numerator}/{share.denominator}"


def parse_low_rank(text: str, alone: bool = False) -> LowRank | None:
    """What `+r16` says after the plus, or `r16w8` and `c16k3x3w8` by themselves; None when it is
    something else."""
    canonical = CANONICAL.fullmatch(text) if alone else None
    if canonical is not None:
        window = tuple(int(size) for size in canonical["window"].split("x"))
        return LowRank(int(canonical["rank"]), int(canonical["bits"]), True, window)
    match = LOW_RANK.fullmatch(text)
    if match is None or (alone and not match["bits"]):
        return None
    return LowRank(int(match["rank"]), int(match["bits"] or 8), alone)


def names_rows(name: str) -> bool:
    """Whether a scheme's name is one of blocks of rows, if it is a name."""
    return "@" in name or "d" in name


def check_rows(name: str, rows: tuple[RowBlock, ...]) -> None:
    """Raise FormatError unless the shares of all blocks but the last leave something for it."""
    shares = [block.share for block in rows[:-1] if block.share is not None]
    ordered = len(shares) == len(rows) - 1 and rows[-1].share is None
    if not ordered or sum(shares) >= 1 or len(rows) > MOST_BLOCKS:
        raise FormatError(
            f"{name}: blocks of rows have shares that leave something for the last one, which has "
            f"none, and are at most {MOST_BLOCKS}: write for example w6g64@1/8+w4g64"
        )


def row_counts(rows: tuple[RowBlock, ...], count: int) -> list[int]:
    """How many of `count` rows each block has: its share rounded to the nearest, at least one.

    Raises FormatError when there are too few rows for so many blocks.
    """
    counts = [max(1, round(count * block.share)) for block in rows if block.share is not None]
    counts.append(count - sum(counts))
    if counts[-1] < 1:
        raise FormatError(
            f"{'+'.join(map(str, rows))}: {count} rows are too few for {len(rows)} blocks"
        )
    return counts
