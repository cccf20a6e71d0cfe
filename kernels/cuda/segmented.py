"""Kernel (b) from outside: which weights and inputs it takes, what it is compiled for, its
arguments.

`src/segmented_gemm.cu` says what it computes. A linear whose weight and inputs are integers has a
`Layout`: its segments, in the kernel's order, each with a kind of product that suits an
architecture. Weights and tokens are packed for a layout; a `GemmCase` is what the kernel is
compiled for, segments baked in. Who launches it is not known here.

What runs: one to three segments, widest first, each of integer weights of 2 to 8 bits, symmetric or
not, with one scale to a row or tensor or one to 32, 64, 128 or 256 columns (float16 or two-level),
times inputs of 2 to 8 bits, symmetric or not, with one scale to a token or to groups of columns of
which one kind divides the other. Groups of 16 columns are refused: sums of so few products would
be scaled more often than multiplied.

Weights of up to 4 bits are kept as nibbles, wider ones as bytes. Nibbles times nibbles is for
inputs of up to 4 bits on sm_80, sm_86 and sm_89; elsewhere, and for groups of 32, inputs are bytes.
The results have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.errors import FormatError
from quantlib.formats.activation import ActivationFormat, ActivationSegment, check_activations
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight
from quantlib.formats.weight_format import Segment, WeightFormat
from quantlib.kernels.cuda.decode import RESERVED_SHARED, SHARED_KB, split_scales
from quantlib.kernels.cuda.integer_layout import (
    BYTES,
    MIXED,
    NIBBLES,
    STEP_BYTES,
    UNSIGNED,
    Kind,
    pack_weight,
    pair_rows,
)

SOURCE = Path(__file__).with_name("src") / "segmented_gemm.cu"
NAME = "segmented_gemm"
THREADS, TILE_ROWS, TOKEN_TILE = 256, 128, 8
DECODE_TILES, PROMPT_TILES = (1, 2, 4, 8), 16
"""Tokens of a block / 8."""
LEAST_STAGES, MOST_STAGES = 3, 6
MOST_SEGMENTS = 3
NIBBLE_ARCHITECTURES = (80, 86, 89)
"""Whose tensor cores multiply nibbles; later ones have none."""
_LARGEST_SUM = 1 << 31


@dataclass(frozen=True)
class SegmentCase:
    """What the kernel is compiled for of a segment (`src/segments.h`). span_steps 0: scales belong
    to a chunk, half a step."""

    kind: Kind
    steps: int
    span_steps: int
    zeros: bool

    @property
    def spans(self) -> int:
        """Sets of scales."""
        return -(-self.steps // self.span_steps) if self.span_steps else 2 * self.steps

    @property
    def span_columns(self) -> int:
        """Columns of a span that is not the last."""
        if self.span_steps:
            return self.span_steps * self.kind.step_columns
        return self.kind.chunk_columns


@dataclass(frozen=True)
class LayoutSegment:
    """Columns [start, start + length) of a linear's inputs, and how they are multiplied."""

    start: int
    length: int
    weight: WeightFormat
    activation: ActivationFormat
    case: SegmentCase


@dataclass(frozen=True)
class Layout:
    """A linear's segments in the kernel's order, widest first, for K = `columns`."""

    columns: int
    segments: tuple[LayoutSegment, ...]

    @property
    def cases(self) -> tuple[SegmentCase, ...]:
        return tuple(part.case for part in self.segments)

    @property
    def spans(self) -> int:
        """Sets of scales, of all segments."""
        return sum(case.spans for case in self.cases)

    @property
    def token_bytes(self) -> int:
        """Of a token's codes."""
        return STEP_BYTES * sum(case.steps for case in self.cases)

    @property
    def token_planes(self) -> int:
        """Numbers of a token and span: its scale, sums for weights with zero points, zero points of
        unsigned nibbles."""
        return 1 + self.any_zeros + self.any_unsigned

    @property
    def any_zeros(self) -> bool:
        return any(case.zeros for case in self.cases)

    @property
    def any_unsigned(self) -> bool:
        return any(case.kind.unsigned for case in self.cases)


def layout(
    weight: Sequence[Segment], activations: Sequence[ActivationSegment], architecture: int
) -> Layout:
    """How a linear with these weight and input segments is multiplied on an architecture (80, 86,
    ...). Raises FormatError for what the kernel does not take: see the module."""
    columns = sum(part.length for part in weight)
    check_activations(columns, activations)
    if len(weight) > MOST_SEGMENTS:
        raise FormatError(
            f"the segmented kernel takes {MOST_SEGMENTS} segments, not {len(weight)}: merge some"
        )
    parts = []
    for part in weight:
        own = _activation_of(part, activations)
        parts.append(
            LayoutSegment(
                part.start,
                part.length,
                part.format,
                own,
                _segment_case(part.format, own, part.length, architecture),
            )
        )
    return Layout(columns, tuple(reversed(parts)))


def _activation_of(part: Segment, activations: Sequence[ActivationSegment]) -> ActivationFormat:
    """How the inputs of a weight's segment are rounded, in one format."""
    end = part.start + part.length
    for own in activations:
        same = own.start == part.start and own.length == part.length
        if own.start <= part.start and end <= own.start + own.length:
            if own.format.group and not same:
                break
            return own.format
    raise FormatError(
        f"columns {part.start} to {end} of the weight are not rounded in one segment of the "
        "inputs: give both the same segments"
    )


def _segment_case(
    weight: WeightFormat, activation: ActivationFormat, length: int, architecture: int
) -> SegmentCase:
    if not weight.is_integer or weight.shares_exponent or not activation.is_integer:
        raise FormatError(
            "the segmented kernel multiplies integers, those of weights with scales in float16, "
            f"not {weight} by {activation}: use another"
        )
    groups = [size for size in (max(weight.group_size, 0), activation.group) if size]
    span = min(groups, default=length)
    if max(groups, default=span) % span:
        raise FormatError(
            f"of groups of {weight.group_size} weights and {activation.group} inputs neither "
            "divides the other: choose groups that do"
        )
    few = weight.bits <= 4
    nibbles = few and activation.bits <= 4 and architecture in NIBBLE_ARCHITECTURES
    kinds = [NIBBLES if activation.symmetric else UNSIGNED] if nibbles else []
    for kind in (*kinds, MIXED if few else BYTES):
        steps = -(-length // kind.step_columns)
        if span >= length:
            return _checked(SegmentCase(kind, steps, steps, not weight.symmetric))
        if span == kind.chunk_columns:
            return SegmentCase(kind, steps, 0, not weight.symmetric)
        if span % kind.step_columns == 0:
            return SegmentCase(kind, steps, span // kind.step_columns, not weight.symmetric)
    raise FormatError(
        f"scales for {span} columns are too many for the segmented kernel: use groups of 32, or "
        "of a multiple of 64"
    )


def _checked(case: SegmentCase) -> SegmentCase:
    """Refuses sums that 32 bits may not hold."""
    each = 15 * 8 if case.kind.token_bits == 4 else 127 * 128
    if case.steps * case.kind.step_columns * each >= _LARGEST_SUM:
        raise FormatError(
            f"the sum of {case.steps * case.kind.step_columns} products may not fit 32 bits: give "
            "the weight groups"
        )
    return case


@dataclass(frozen=True)
class GemmCase:
    """What the kernel is compiled for; `macros` gives it to a compiler. dtype is the output's."""

    segments: tuple[SegmentCase, ...]
    dtype: torch.dtype
    token_tiles: int
    stages: int = LEAST_STAGES

    def macros(self) -> dict[str, int]:
        """Names and values, without the prefix -D."""
        found = {
            "QL_SEGMENTS": len(self.segments),
            "QL_TOKEN_TILES": self.token_tiles,
            "QL_STAGES": self.stages,
            "QL_BFLOAT": int(self.dtype == torch.bfloat16),
        }
        none = SegmentCase(BYTES, 0, 1, zeros=False)
        for index in range(MOST_SEGMENTS):
            own = self.segments[index] if index < len(self.segments) else none
            found[f"QL_KIND_{index}"] = own.kind.number
            found[f"QL_STEPS_{index}"] = own.steps
            found[f"QL_SPAN_STEPS_{index}"] = own.span_steps
            found[f"QL_ZEROS_{index}"] = int(own.zeros)
        return found

    @property
    def tokens(self) -> int:
        """Of a block."""
        return self.token_tiles * TOKEN_TILE

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self.segments)

    @property
    def stage_bytes(self) -> int:
        """Of shared memory: weights, tokens and scales of one step."""
        unsigned = any(part.kind.unsigned for part in self.segments)
        zeros = any(part.zeros for part in self.segments)
        spans = 2 if any(not part.span_steps for part in self.segments) else 1
        rows, tokens = (1 + unsigned) * TILE_ROWS, (1 + zeros + unsigned) * self.tokens
        return (TILE_ROWS + self.tokens) * STEP_BYTES + spans * (rows + tokens) * 4

    @property
    def shared_bytes(self) -> int:
        """Of a block: the ring, and where sums change hands."""
        passed = TOKEN_TILE * (4 if self.token_tiles == PROMPT_TILES else 1)
        return self.stages * self.stage_bytes + passed * (TILE_ROWS + 4) * 4

    @property
    def partial_floats(self) -> int:
        """Of a block: sums of a tile that another block finishes."""
        return self.tokens * TILE_ROWS

    def tiles(self, tokens: int, rows: int) -> int:
        """Of the output: more blocks than these share them."""
        return -(-tokens // self.tokens) * -(-rows // TILE_ROWS)


def case(own: Layout, tokens: int, dtype: torch.dtype, architecture: int) -> GemmCase:
    """What the kernel is compiled for to multiply `tokens` inputs, with as many stages as fit.

    Raises FormatError for another dtype, or an architecture of which nothing is known.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise FormatError(f"outputs are float16 or bfloat16 here, not {dtype}")
    if architecture not in SHARED_KB or tokens < 1:
        raise FormatError(f"nothing is known of {tokens} tokens on sm_{architecture}")
    tiles = next((t for t in DECODE_TILES if t * TOKEN_TILE >= tokens), PROMPT_TILES)
    found = GemmCase(own.cases, dtype, tiles)
    for stages in range(MOST_STAGES, LEAST_STAGES, -1):
        tried = replace(found, stages=stages)
        if tried.shared_bytes + RESERVED_SHARED <= SHARED_KB[architecture] * 1024:
            return tried
    return found


@dataclass(frozen=True, eq=False)
class SegmentedWeight:
    """A weight [N, K] in the kernel's layout.

    codes: uint8, segment after segment (`integer_layout`). meta: int32 [spans, planes, N padded to
    128]: a float16 scale and, above it, a float16 zero point, then sums of codes where a segment
    has unsigned nibbles; rows paired. units: float32 [2 * segments, N padded]: what a segment's
    sums are worth, then what those of the segment before are worth in them. zero_points: of each of
    three segments, what a stored zero point is worth in codes and the code that is stored as 0.
    """

    shape: tuple[int, int]
    layout: Layout
    codes: Tensor
    meta: Tensor
    units: Tensor
    zero_points: tuple[tuple[float, float], ...]

    @property
    def nbytes(self) -> int:
        """Bytes that a launch reads of it."""
        return self.codes.nbytes + self.meta.nbytes + self.units.nbytes


def pack(weight: QuantizedWeight, own: Layout) -> SegmentedWeight:
    """A weight in the layout of its segments (`layout`)."""
    by_start = {part.segment.start: part for part in weight.segments}
    rows = weight.shape[0]
    pad = -rows % TILE_ROWS
    codes, meta, units = [], [], []
    for part in own.segments:
        found = by_start[part.start]
        middle = 1 << (part.weight.bits - 1)
        signed = (found.codes.to(torch.int16) - middle).to(torch.int8)
        codes.append(pack_weight(signed, part.case.kind).flatten())
        planes, unit = _row_meta(found, signed, part, own.any_unsigned)
        meta.append(functional.pad(planes, (0, pad)))
        units.append(functional.pad(unit, (0, pad), value=1.0))
    ratios = [torch.ones_like(units[0])]
    ratios += [before / unit for before, unit in pairwise(units)]
    zero_points = [
        (part.weight.zero_step, float(1 << (part.weight.bits - 1))) for part in own.segments
    ]
    return SegmentedWeight(
        weight.shape,
        own,
        torch.cat(codes),
        pair_rows(torch.cat(meta)),
        torch.stack([*units, *ratios]),
        tuple(zero_points + [(1.0, 0.0)] * (MOST_SEGMENTS - len(zero_points))),
    )


def _row_meta(
    found: QuantizedSegment, signed: Tensor, part: LayoutSegment, sums: bool
) -> tuple[Tensor, Tensor]:
    """int32 [spans, planes, N] and the rows' units, float32 [N]. A row of zeros has the unit 1."""
    rows, spans, size = len(signed), part.case.spans, part.case.span_columns
    scale, unit = split_scales(found, rows)
    scale = torch.where(unit[:, None] > 0, scale, 0.0).expand(rows, -1)
    first = torch.arange(spans) * size
    group = part.weight.group_size
    index = (first // group if group > 0 else first * 0).clamp(max=scale.shape[1] - 1)
    exists = first < part.length
    words = _half_bits(torch.where(exists, scale[:, index], 0.0))
    if found.zero is not None:
        zero = found.zero.expand(rows, -1)[:, index]
        words = words | _half_bits(torch.where(exists, zero, 0)) << 16
    planes = [words.T]
    if sums:
        padded = functional.pad(signed, (0, spans * size - signed.shape[1]))
        planes.append(padded.unflatten(1, (spans, size)).sum(-1, dtype=torch.int32).T)
    return torch.stack(planes, 1), torch.where(unit > 0, unit, 1.0)


def _half_bits(values: Tensor) -> Tensor:
    return values.to(torch.float16).view(torch.int16).to(torch.int32) & 0xFFFF


@dataclass(frozen=True, eq=False)
class Tokens:
    """Rounded inputs [M, K] in the kernel's layout.

    codes: uint8 [M, layout.token_bytes]. meta: int32 [spans, planes, M padded to 4]: the bits of
    float32 scales, of scales times sums of codes where a segment's weights have zero points, and
    zero points where a segment has unsigned nibbles.
    """

    count: int
    codes: Tensor
    meta: Tensor


def arguments(
    weight: SegmentedWeight,
    tokens: Tokens,
    bias: Tensor | None,
    output: Tensor,
    partials: Tensor,
    flags: Tensor,
) -> list[Tensor | int | float | None]:
    """The kernel's arguments, in order.

    output [M, N] in rows with any stride, from a multiple of 8 bytes; partials float32
    [blocks, partial_floats], which need not be set; flags int32 [blocks], zero before and after.
    """
    if output.stride(-1) != 1 or output.data_ptr() % 8:
        raise FormatError("the output is in rows, from a multiple of 8 bytes: give it memory anew")
    if tokens.codes.shape[1] != weight.layout.token_bytes:
        raise FormatError(
            f"tokens of {tokens.codes.shape[1]} bytes meet a weight for "
            f"{weight.layout.token_bytes}: pack both for one layout"
        )
    floats = [number for pair in weight.zero_points for number in pair]
    return [
        tokens.codes,
        weight.codes,
        tokens.meta,
        weight.meta,
        weight.units,
        bias,
        output,
        partials,
        flags,
        tokens.count,
        weight.shape[0],
        output.stride(0),
        tokens.meta.shape[-1],
        weight.units.shape[-1],
        *floats,
    ]
