"""How a KV cache keeps keys and values, and the short names of it.

Grammar of a name (`KvFormat.parse` reads it, `str` writes it; the two are inverse):

    f32             as they are
    int8  int4      asymmetric integers, one scale and zero per token and head
    int4g32         ... one scale and zero per 32 columns of a head (any multiple of 16)
    int4h16         ... the first 16 columns of a head at 8 bits with a scale and zero of their own
                    (any multiple of 16): the form of ResQ, where these are the columns that matter
    int4r           ... of heads rotated by a Hadamard matrix, and their queries with them: no
                    outliers, at no cost in bytes
    int8/int4r      keys / values, where they differ
    int4rk4         ... the first 4 positions of every sequence (up to 64) in float32: attention
                    looks at them from everywhere, and their numbers are unlike all others

Suffixes come in the order g, h, r; k is said once, at the end, for keys and values. What they mean
in bytes is said in cpu/src/kv_cache.h.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from quantlib.errors import FormatError

BLOCK = 64
"""Positions that are stored together; a cache's capacity is a multiple of it."""
LANES = 16
"""Columns of a head are padded to a multiple of it, in memory."""
MAX_HEAD_DIM = 256
MAX_SINKS = 64
"""First positions that can be kept in float32."""

_META_BYTES = 4
_PATTERN = re.compile(r"f32|int(?P<bits>[48])(?:g(?P<group>\d+))?(?:h(?P<wide>\d+))?(?P<turn>r)?")


@dataclass(frozen=True)
class Group:
    """Columns [start, start + columns) of a head, which share a scale and a zero per position."""

    start: int
    columns: int
    bits: int

    @property
    def bytes_per_position(self) -> int:
        """Codes, and a scale and zero."""
        return _META_BYTES + self.columns * self.bits // 8

    @property
    def columns_slice(self) -> slice:
        """Where they stand in a row of a head's padded columns."""
        return slice(self.start, self.start + self.columns)


@dataclass(frozen=True)
class SideFormat:
    """The format of keys, or of values.

    bits:   32 (float32), 8 or 4.
    group:  columns that share a scale; 0 for all that are not wide.
    wide:   first columns kept at 8 bits, with 4 bits for the others.
    rotate: kept in the basis of a Hadamard matrix.
    """

    bits: int
    group: int = 0
    wide: int = 0
    rotate: bool = False

    @classmethod
    def parse(cls, name: str) -> SideFormat:
        """Raises FormatError for a name outside the grammar."""
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise FormatError(
                f"{name!r} is not a format of a KV cache: use f32, int8 or int4, with g<columns> "
                "(a scale per so many columns), h<columns> (so many at 8 bits) and r (rotated) in "
                "this order, as in int4g32r; keys and values apart as in int8/int4r"
            )
        if match["bits"] is None:
            return cls(32)
        bits, group, wide = (int(match[part] or 0) for part in ("bits", "group", "wide"))
        for letter, columns in (("g", group), ("h", wide)):
            if match["group" if letter == "g" else "wide"] and (not columns or columns % LANES):
                raise FormatError(
                    f"{letter}{columns} in the KV cache format {name!r}: columns are counted in "
                    f"multiples of {LANES}"
                )
        if wide and bits == 8:
            raise FormatError(
                f"all columns of the KV cache format {name!r} have 8 bits: drop the h"
            )
        return cls(bits, group, wide, match["turn"] is not None)

    def __str__(self) -> str:
        if self.bits == 32:
            return "f32"
        group, wide = (f"g{self.group}" if self.group else ""), f"h{self.wide}" if self.wide else ""
        return f"int{self.bits}{group}{wide}{'r' if self.rotate else ''}"

    def groups(self, head_dim: int) -> tuple[Group, ...]:
        """The groups of a head in order; none for f32."""
        if self.bits == 32:
            return ()
        padded = padded_columns(head_dim)
        rest = self.group or max(padded - self.wide, LANES)
        groups = [Group(0, self.wide, 8)] if self.wide else []
        groups += [
            Group(start, min(rest, padded - start), self.bits)
            for start in range(self.wide, padded, rest)
        ]
        return tuple(groups)

    def bytes_per_position(self, head_dim: int) -> int:
        """Exact bytes of one position of one head, padding included."""
        if self.bits == 32:
            return 4 * padded_columns(head_dim)
        return sum(group.bytes_per_position for group in self.groups(head_dim))

    def check(self, head_dim: int) -> None:
        """Raise FormatError when heads of `head_dim` columns cannot be kept so."""
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            raise FormatError(
                f"heads have {head_dim} columns, and a KV cache can keep 1 to {MAX_HEAD_DIM}"
            )
        if self.wide >= head_dim:
            raise FormatError(
                f"{self} keeps {self.wide} columns at 8 bits, and a head has {head_dim}: use int8"
            )
        if self.rotate and head_dim % LANES:
            raise FormatError(
                f"{self} rotates heads, which needs a multiple of {LANES} columns, and these have "
                f"{head_dim}: drop the r"
            )


@dataclass(frozen=True)
class KvFormat:
    """The formats of keys and of values, and how many first positions are kept in float32
    instead."""

    key: SideFormat
    value: SideFormat
    sinks: int = 0

    @classmethod
    def parse(cls, name: str) -> KvFormat:
        """Raises FormatError for a name outside the grammar."""
        sides, kept, count = name.partition("k")
        key, slash, value = sides.partition("/")
        form = cls(SideFormat.parse(key), SideFormat.parse(value if slash else key))
        if not kept:
            return form
        if not re.fullmatch(r"[1-9]\d*", count):
            raise FormatError(
                f"{name!r} is not a format of a KV cache: after the k comes how many first "
                "positions are kept in float32, as in int4k4"
            )
        return form.with_sinks(int(count))

    def with_sinks(self, count: int) -> KvFormat:
        """The same with so many first positions in float32. Raises FormatError for more than
        MAX_SINKS, or none at all to keep so."""
        if not 0 <= count <= MAX_SINKS:
            raise FormatError(
                f"{count} first positions cannot be kept in float32: keep 0 to {MAX_SINKS}"
            )
        if count and self.key.bits == self.value.bits == 32:
            raise FormatError(
                f"a KV cache of f32 has all positions in float32, not only {count}: drop the k"
            )
        return replace(self, sinks=count)

    def __str__(self) -> str:
        sides = str(self.key) if self.key == self.value else f"{self.key}/{self.value}"
        return f"{sides}k{self.sinks}" if self.sinks else sides

    def bytes_per_position(self, head_dim: int) -> int:
        """Exact bytes of the key and the value of one position of one head; first positions in
        float32 come on top (`sink_bytes`)."""
        return self.key.bytes_per_position(head_dim) + self.value.bytes_per_position(head_dim)

    def mean_bits(self, head_dim: int, positions: int) -> float:
        """Bits that a number takes in the cache of a sequence of so many positions: codes, scales,
        zeros, padding, and the first positions that are kept in float32 besides."""
        stored = positions * self.bytes_per_position(head_dim) + self.sink_bytes(head_dim)
        return 8 * stored / (2 * head_dim * positions)

    def sink_bytes(self, head_dim: int) -> int:
        """Bytes of the first positions of one sequence and head, in memory."""
        floats = padded_columns(head_dim) * padded_columns(self.sinks)
        return 4 * floats * sum(side.bits != 32 for side in (self.key, self.value))


def padded_columns(head_dim: int) -> int:
    """Columns of a head in memory: a multiple of LANES."""
    return -(-head_dim // LANES) * LANES
