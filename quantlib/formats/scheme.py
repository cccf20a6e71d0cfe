"""Schemes: what is done to a weight and to its inputs, and the short names of that.

Grammar of a scheme's name (`Scheme.parse` reads it, `str(scheme)` writes it; the two are inverse):

    w{2..8}         integer weights, symmetric, one float16 scale per output channel
    w4g64           ... one scale per group of 64 along the input axis (16, 32, 64, 128 or 256)
    w4t             ... one scale for the whole tensor
    w4g64z          asymmetric: an integer zero point of as many bits as the weight
    w4g64z6         ... a zero point of 6 bits, in steps of (2^4 - 1) / (2^6 - 1) codes (z2..z8)
    w4g64zs6        two-level scales: 6-bit scale codes and one float16 per output channel (s4..s8)
    w4g64e w8e w8te dynamic fixed point: the scale of a group, channel or tensor is a power of two,
                    one shared exponent (e8m0) over integers, with or without zero points
    w4g128:2of4     two of every four weights of a row are zero and not stored (`sparse.py`);
                    symmetric integers under any scales
    fp8 fp8e5m2 fp6 fp6e2m3 fp4
                    floating point per output channel (e4m3, e5m2, e3m2, e2m3, e2m1); g, t, s as
                    above
    fp5e2m2 fp7e4m2 ...
                    the other floats of 4 to 8 bits: 5e2m2 5e3m1 6e4m1 7e2m4 7e3m3 7e4m2 7e5m1
                    8e2m5 8e3m4
    mxfp8 mxfp8e5m2 mxfp6 mxfp6e2m3 mxfp4
                    OCP microscaling: groups of 32 with an e8m0 scale
    nvfp4           e2m1 in groups of 16 with an e4m3 scale and one float32 per tensor
    bf16 f16 f32    kept as it is

after any of these, how the layer's inputs are rounded (`activation.py`; left out: not at all):

    a8 a4           integers of 2..8 bits, symmetric, one scale per token
    a4z             asymmetric (2..7 bits)
    a8g128          ... one scale per token and 128 columns
    amxfp4 anvfp4 afp8
                    floating point, under any float name above and with its groups and scales

after these (but not after a kept weight), a share of wider columns, the last ones:

    h8/8            the last 1/8 of the input features have 8 bits: weights in the style of the
                    others, activations (if they are rounded) symmetric
    h8x3/16         ... the last 3/16
    hfp8/8 hmxfp6/8 ... weights in another float format, and activations too if they are floats;
                    integer activations get as many bits
    h3x5/16h4/16    several such shares, each wider than the one before it: the last 1/16 have 4
                    bits, the 5/16 before them 3

So `w4g64zs4a4zh8/8` multiplies 7/8 of the columns as w4g64zs4a4z does and 1/8 as w8g64zs4a8 does.
Columns are stored in ascending importance. The number of wide ones is the share of K rounded to the
nearest multiple of 4, and at least 4; a layer of fewer columns is wide altogether, and the widest
share takes its columns first.

after all of that, directions of a linear that are kept beside the rounded rest, as two factors:

    w3g64z4+r16     the 16 directions that matter most, in 8 bits (one scale per row of a factor)
    w3g64z4+r16w4   ... in 4 bits (groups of 32)
    r16w8 r16w4     of a convolution: these directions alone
    c16k3x3w8       of a convolution with a window of 3 x 3: 16 products of four vectors, of the
                    filters, the channels and both axes of the window (canonical polyadic form)

or, for embeddings, blocks of rows in formats of their own, the most frequent tokens first:

    w6g64zs6@1/8+w4g32zs4@3/8+w3g32z4s4d256
                    an eighth of the rows in 6 bits, three eighths in 4, the rest in 3 bits and 256
                    dimensions, under a basis in 8 bits

Such a weight is several matrices (`composite.py`), and has no segments of its own.

Group size is written in weights along K (input features). A row whose K is not a multiple of the
group has a shorter last group; shapes are never refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import pairwise, product

from quantlib.errors import FormatError
from quantlib.formats.activation import (
    AS_THEY_ARE,
    INTEGER,
    UNROUNDED,
    ActivationFormat,
    ActivationSegment,
)
from quantlib.formats.several import (
    FACTORS,
    ROW_BLOCK,
    LowRank,
    RowBlock,
    check_rows,
    names_rows,
    parse_low_rank,
)
from quantlib.formats.weight_format import (
    FLOAT_NAME,
    FLOAT_OF_BITS,
    FORMAT_NAME,
    MX_NAME,
    Segment,
    WeightFormat,
    named_format,
    restyled,
)

KEPT = {"bf16": 2, "f16": 2, "f32": 4}
"""Names of the schemes that leave a weight unquantized, and their bytes per element."""

_PATTERN = re.compile(rf"(?P<kept>bf16|f16|f32)|{FORMAT_NAME}")
_NAME = re.compile(r"(?P<weight>[^ah]+)(?:a(?P<activation>[^ah]+))?(?P<high>(?:h[^ah]+)*)")
_HIGH = re.compile(
    rf"(?P<format>[2-8]|nvfp4|mx(?:{MX_NAME})|{FLOAT_NAME})"
    r"(?:x(?P<count>[1-9]\d*))?/(?P<parts>[1-9]\d*)"
)
_COLUMN_STEP = 4
"""Wide columns are counted in these: whole dot products of four int8."""


@dataclass(frozen=True, order=True)
class HighColumns:
    """The last `share` of the columns, in wider formats: `name` is a number of bits, "8", or a
    float format, "mxfp6"."""

    name: str
    share: Fraction

    def __post_init__(self) -> None:
        if not _HIGH.fullmatch(f"{self.name}/8"):
            raise FormatError(f"{self.name!r} is no number of bits and no float format: write h8/8")
        if not 0 < self.share < 1:
            raise FormatError(
                f"a share of {self.share} of the columns: write a part of them, such as h8/8 or "
                "h8x3/16"
            )

    def count(self, length: int) -> int:
        """How many of `length` columns these are."""
        steps = (2 * length * self.share + _COLUMN_STEP) // (2 * _COLUMN_STEP)
        return min(length, max(1, int(steps)) * _COLUMN_STEP)

    def __str__(self) -> str:
        count = "" if self.share.numerator == 1 else f"x{self.share.numerator}"
        return f"h{self.name}{count}/{self.share.denominator}"


@dataclass(frozen=True)
class Scheme:
    """What is done to a weight and to its inputs.

    weight:     format of the weight, of its low columns if some are high; None: kept as `kept`.
    activation: format of the inputs, likewise.
    high:       the columns that are wider, if any.
    higher:     those after them that are wider still, ascending.
    low_rank:   directions that are kept beside the rest, if any.
    rows:       blocks of rows with formats of their own, the first one's is `weight`; none: all
                rows are alike.
    """

    weight: WeightFormat | None
    kept: str | None = None
    activation: ActivationFormat = AS_THEY_ARE
    high: HighColumns | None = None
    higher: tuple[HighColumns, ...] = ()
    low_rank: LowRank | None = None
    rows: tuple[RowBlock, ...] = ()

    def __post_init__(self) -> None:
        if self.low_rank is not None and self.weight is None:
            raise FormatError(f"a weight kept as {self.kept} has no rounded rest to add factors to")
        if self.rows:
            check_rows(str(self), self.rows)
        if (
            self.low_rank is not None
            and self.low_rank.alone
            and (self.activation.rounds or self.high)
        ):
            raise FormatError(f"{self.low_rank}: factors alone round no inputs")
        if self.activation.clip != 1:
            raise FormatError("a clip factor belongs to one weight's activations, not to a scheme")
        if not self.wide:
            return
        if self.weight is None:
            raise FormatError(f"a weight kept as {self.kept} has no wider columns")
        widths = [(self.weight.bits, self.activation.bits)]
        widths += [(self._weight_of(p).bits, self._activation_of(p).bits) for p in self.wide]
        for index, (before, after) in enumerate(pairwise(widths)):
            if min(after[0] - before[0], after[1] - before[1]) < 0 or (index and after == before):
                raise FormatError(
                    f"{self}: the last columns matter most and must not be narrower than the "
                    "others, and every further share must be wider than the one before it"
                )
        if sum(part.share for part in self.wide) >= 1:
            raise FormatError(f"{self}: wider columns are a part of all: their shares sum to 1")

    @staticmethod
    @cache
    def parse(name: str) -> Scheme:
        """Read a scheme's short name. Raises FormatError with examples when it is not one."""
        head, *beside = name.split("+")
        if names_rows(head):
            return _parse_rows(name)
        if beside:
            low_rank = parse_low_rank(beside[0]) if len(beside) == 1 else None
            if low_rank is None:
                raise _no_scheme(name)
            return replace(Scheme.parse(head), low_rank=low_rank)
        alone = parse_low_rank(name, alone=True)
        if alone is not None:
            return replace(Scheme.parse(FACTORS[alone.bits]), low_rank=alone)
        match = _NAME.fullmatch(name)
        base = _PATTERN.fullmatch(match["weight"]) if match else None
        highs = [_HIGH.fullmatch(part) for part in match["high"].split("h")[1:]] if match else []
        if match is None or base is None or None in highs:
            raise _no_scheme(name)
        try:
            activation = ActivationFormat.parse(match["activation"] or str(UNROUNDED))
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error
        wide = tuple(
            HighColumns(high["format"], Fraction(int(high["count"] or 1), int(high["parts"])))
            for high in highs
            if high
        )
        weight = None if base["kept"] else named_format(base)
        return Scheme(weight, base["kept"], activation, wide[0] if wide else None, wide[1:])

    @staticmethod
    def of(segments: Sequence[Segment], activations: Sequence[ActivationSegment] = ()) -> Scheme:
        """The scheme that has these segments and activations; their clip factors do not count.

        Raises FormatError when no scheme does.
        """
        length = sum(part.length for part in segments)
        rounded = [replace(part, format=replace(part.format, clip=1.0)) for part in activations]
        low = segments[0].format
        activation = rounded[0].format if rounded else AS_THEY_ARE
        wide = segments[1:]
        shares = [_share(part.length, length) for part in wide]
        names = [dict.fromkeys((str(part.format.bits), str(part.format))) for part in wide]
        for chosen in product(*names):
            with suppress(FormatError):
                columns = tuple(map(HighColumns, chosen, shares))
                first, others = columns[0] if columns else None, columns[1:]
                scheme = Scheme(low, None, activation, first, others)
                same = scheme.segments(length) == tuple(segments)
                if same and scheme.activations(length) == tuple(rounded):
                    return scheme
        raise FormatError(
            f"no scheme has the formats {'+'.join(str(part.format) for part in segments)} on "
            f"{'+'.join(str(part.length) for part in segments)} columns"
            + (
                f" with inputs in {'+'.join(str(part.format) for part in rounded)}"
                if rounded
                else ""
            )
        )

    @property
    def is_composite(self) -> bool:
        """Whether a weight in this scheme is stored as several matrices."""
        return self.low_rank is not None or bool(self.rows)

    @property
    def rest(self) -> Scheme:
        """The scheme of what the factors leave. Raises FormatError where they leave nothing."""
        if self.low_rank is not None and self.low_rank.alone:
            raise FormatError(f"a weight in {self} is its factors, and there is no rest")
        return replace(self, low_rank=None)

    @property
    def activation_bits(self) -> int:
        """Bits of an input in the low columns; 16: not rounded."""
        return self.activation.bits

    @property
    def wide(self) -> tuple[HighColumns, ...]:
        """The shares of wider columns, in the order of the columns."""
        return (self.high, *self.higher) if self.high else ()

    def _weight_of(self, part: HighColumns) -> WeightFormat:
        """Format of the weight in a share of wider columns."""
        if not part.name.isdigit():
            weight = Scheme.parse(part.name).weight
        else:
            weight = self.weight and restyled(self.weight, int(part.name))
        assert weight is not None
        return weight

    def _activation_of(self, part: HighColumns) -> ActivationFormat:
        """Format of the inputs in a share of wider columns."""
        low = self.activation
        if not low.rounds:
            return low
        bits = max(low.bits, self._weight_of(part).bits)
        if low.element == INTEGER:
            return replace(low, bits=bits, symmetric=True)
        if not part.name.isdigit():
            return ActivationFormat(element=part.name)
        return ActivationFormat(element=low.element if bits == low.bits else _wider(low, bits))

    def segments(self, length: int) -> tuple[Segment, ...]:
        """The K segments of a weight with `length` input features: low columns, then wider ones.

        One, for a uniform scheme. Raises FormatError for a weight that is kept, and for one that is
        stored as several matrices: `composite.parts_of` has theirs.
        """
        if self.weight is None:
            raise FormatError(f"a weight kept as {self.kept} has no segments")
        if self.is_composite:
            raise FormatError(f"a weight in {self} is several matrices, and has no segments itself")
        formats = [self.weight, *map(self._weight_of, self.wide)]
        spans = zip(self._spans(length), formats, strict=True)
        return tuple(Segment(start, count, form) for (start, count), form in spans if count)

    def activations(self, length: int) -> tuple[ActivationSegment, ...]:
        """How `length` input features are rounded, in the same segments; none: not at all."""
        if not self.activation.rounds:
            return ()
        formats = [self.activation, *map(self._activation_of, self.wide)]
        spans = zip(self._spans(length), formats, strict=True)
        return tuple(
            ActivationSegment(start, count, form) for (start, count), form in spans if count
        )

    def low_columns(self, length: int) -> int:
        """How many of `length` input features come before the wider ones: all, if none are."""
        return self._spans(length)[0][1]

    def _spans(self, length: int) -> list[tuple[int, int]]:
        """(start, length) of the low columns and of each share of wider ones; some may be empty."""
        left, spans = length, []
        for part in reversed(self.wide):
            count = min(left, part.count(length))
            left -= count
            spans.append((left, count))
        return [(0, left), *reversed(spans)]

    def __str__(self) -> str:
        if self.rows:
            return "+".join(map(str, self.rows))
        if self.low_rank is not None and self.low_rank.alone:
            return str(self.low_rank)
        base = str(self.weight) if self.weight is not None else str(self.kept)
        activation = f"a{self.activation}" if self.activation.rounds else ""
        factors = f"+{self.low_rank}" if self.low_rank is not None else ""
        return base + activation + "".join(map(str, self.wide)) + factors


def _no_scheme(name: str) -> FormatError:
    return FormatError(
        f"{name!r} is not a scheme: write for example w4g64, w3g32z, w4g64zs6, w8a8, w4a4zh8/8, "
        "w3g64+r16, w6g64@1/8+w4g64, fp8, mxfp4, nvfp4 or bf16"
    )


def _parse_rows(name: str) -> Scheme:
    """The scheme of an embedding whose rows are in blocks."""
    blocks = []
    for part in name.split("+"):
        match = ROW_BLOCK.fullmatch(part)
        if match is None:
            raise _no_scheme(name)
        scheme = Scheme.parse(match["format"])
        if scheme.weight is None or scheme != Scheme(scheme.weight):
            raise FormatError(f"{name}: {match['format']} is no format for a block of rows")
        share = Fraction(match["share"]) if match["share"] else None
        blocks.append(RowBlock(scheme.weight, share, int(match["width"] or 0)))
    return Scheme(blocks[0].format, rows=tuple(blocks))


def _share(count: int, length: int) -> Fraction:
    """The share that `count` of `length` columns are: in sixteenths where those give this count,
    because they are what a search chooses among."""
    shares = (Fraction(part, 16) for part in range(1, 16))
    fitting = (share for share in shares if HighColumns("8", share).count(length) == count)
    return next(fitting, Fraction(count, length))


def _wider(format: ActivationFormat, bits: int) -> str:
    """The name of the float activations of `bits` bits in the style of `format`."""
    if bits not in FLOAT_OF_BITS:
        raise FormatError(f"no float activation stands for {bits} bits alone: use 8 or 6")
    return ("mx" if format.is_mx else "") + f"fp{bits}"
