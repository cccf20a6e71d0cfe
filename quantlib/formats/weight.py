"""A quantized weight: codes, scales and zero points, and the tensors they become in a checkpoint.

`QuantizedWeight` is what every rounding method returns and every kernel's reference reads: one code
per byte, scales in the form they are stored in. Nothing in it is more precise than the checkpoint,
so what is measured is what ships.

Stored scales, by `WeightFormat.scale` (N rows, G groups of the segment; TENSOR formats have one row
and one group):

    kind       scale                       row_scale      effective scale, float32
    f16        float16 [N, G]              none           scale
    u4 .. u8   uint8 [N, G], the codes     float16 [N]    row_scale * (code / (2^b - 1))
    e8m0       uint8 [N, G], exponents     none           2^(code - 127), of floats and integers
    e4m3       uint8 [N, G], e4m3 codes    float32 [1]    row_scale * value_of(code)

A scale of zero (f16, u4..u8, e4m3) stands for a group whose weights are all zero and for nothing
else. `zero` is uint8 [N, G], for asymmetric integers only: codes below 2^zero_bits that stand for
`code * zero_step` (a step of 1 unless the format names other bits). Symmetric integers have the
constant zero point 2^(bits-1), which is not stored. A sparse format (`WeightFormat.sparse`) has at
most two codes that are not that zero among every four columns of a row; two are stored, and their
places (`sparse.py`).

A stack of expert matrices [E, N, K] is the matrix [E*N, K]: callers reshape it before and after,
and a row never knows which expert it belongs to. Only per-tensor scales (`t`, nvfp4's row_scale)
are then shared by the experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats import sparse
from quantlib.formats.elements import FLOATS, decode_float
from quantlib.formats.groups import group_blocks
from quantlib.formats.packing import (
    pack_bits,
    pack_codes,
    pack_zeros,
    packed_bytes,
    packed_words,
    unpack_bits,
    unpack_codes,
    unpack_zeros,
)
from quantlib.formats.weight_format import TENSOR, Segment, WeightFormat

E8M0_BIAS = 127
E8M0_NAN = 255
_E4M3_LARGEST = 0x7E

PACKED, SCALE, ROW_SCALE, ZERO_POINT = "_packed", "_scale", "_row_scale", "_zero_point"
PLACES = "_places"
"""Suffixes of the stored tensors, appended to the weight's name: `X.weight` + `_packed` is
`X.weight_packed`."""
ORDER = "_order"
"""Suffix of a tensor that may stand beside those: int32 [K], column j of the stored weight takes
the layer's input `order[j]`."""

TensorLayout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name or suffix -> dtype and shape: what a tensor will be, without its values."""


@dataclass(frozen=True, eq=False)
class QuantizedSegment:
    """One segment's numbers, in the stored forms of the module's table. Shapes and dtypes are
    checked on creation."""

    segment: Segment
    codes: Tensor
    scale: Tensor
    row_scale: Tensor | None = None
    zero: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dim() != 2:
            raise FormatError(
                f"codes are a matrix [N, {self.segment.length}], not {list(self.codes.shape)}"
            )
        rows, format = self.codes.shape[0], self.segment.format
        _expect("codes", self.codes, torch.uint8, (rows, self.segment.length))
        _expect("scale", self.scale, *_scale_form(rows, self.segment))
        _expect("row_scale", self.row_scale, *(_row_scale_form(rows, format) or (None, ())))
        zero_dtype = None if format.symmetric else torch.uint8
        _expect("zero", self.zero, zero_dtype, _scale_form(rows, self.segment)[1])


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] as consecutive segments along K, covering it without gap or overlap."""

    shape: tuple[int, int]
    segments: tuple[QuantizedSegment, ...]

    def __post_init__(self) -> None:
        check_segments(self.shape, [part.segment for part in self.segments])
        for part in self.segments:
            if part.codes.shape[0] != self.shape[0]:
                raise FormatError(
                    f"a segment has {part.codes.shape[0]} rows in a weight of {self.shape[0]}"
                )


def check_segments(shape: Sequence[int], segments: Sequence[Segment]) -> None:
    """Raise FormatError unless `shape` is [N, K], not empty, and the segments cover 0..K in order
    exactly once."""
    if len(shape) != 2 or min(shape) < 1:
        raise FormatError(
            f"a weight to quantize is a matrix [N, K], not {list(shape)}: "
            "reshape a stack [E, N, K] to [E*N, K]"
        )
    position = 0
    for segment in segments:
        if segment.start != position or segment.length < 1:
            raise FormatError(
                f"segments must follow each other: one of {segment.length} weights starts at "
                f"{segment.start}, expected at {position}"
            )
        position += segment.length
    if position != shape[1]:
        raise FormatError(
            f"the segments cover {position} of the weight's {shape[1]} input features"
        )


def decode_scales(scale: Tensor, row_scale: Tensor | None, format: WeightFormat) -> Tensor:
    """Stored scales -> effective ones, float32, same shape as `scale` ([N, G]; [1, 1] for
    TENSOR)."""
    if format.scale == "f16":
        return scale.to(torch.float32)
    if format.scale == "e8m0":
        # Exponent bits in place: exact, also for 2^-127, which is a float32 subnormal.
        exponent = scale.to(torch.int32)
        bits = torch.where(exponent == 0, torch.full_like(exponent, 1 << 22), exponent << 23)
        return bits.view(torch.float32)
    if row_scale is None:
        raise FormatError(f"{format}: two-level scales need a row_scale")
    if format.scale == "e4m3":
        return row_scale * decode_float(scale, "e4m3")
    largest = float((1 << format.scale_bits) - 1)
    return row_scale.to(torch.float32)[:, None] * (scale.to(torch.float32) / largest)


def effective_scale(part: QuantizedSegment) -> Tensor:
    """float32 [N, G]: what a code (less its zero point) is multiplied by. TENSOR scales are
    expanded to [N, 1]."""
    scale = decode_scales(part.scale, part.row_scale, part.segment.format)
    return scale.expand(part.codes.shape[0], -1)


def decode_zeros(zero: Tensor, format: WeightFormat) -> Tensor:
    """Stored zero points -> effective ones, in units of codes: float32, same shape as `zero`."""
    return zero.to(torch.float32) * format.zero_step


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K] that the codes stand for: `(code - zero) * scale` in float32, with the
    effective zero points and scales, then cast to `dtype`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.segments[0].codes.device)
    for part in weight.segments:
        start, length = part.segment.start, part.segment.length
        out[:, start : start + length] = _dequantize_segment(part)
    return out


def _dequantize_segment(part: QuantizedSegment) -> Tensor:
    format, length = part.segment.format, part.segment.length
    scale = effective_scale(part)
    if format.is_integer:
        values = part.codes.to(torch.float32)
    else:
        values = decode_float(part.codes, format.element)
    if format.is_integer and format.symmetric:
        values -= 1 << (format.bits - 1)
    for block in group_blocks(length, format.group_size):
        view = block.view(values)
        if part.zero is not None:
            view -= decode_zeros(part.zero, format)[:, block.groups, None]
        view *= scale[:, block.groups, None]
    return values


def packed_layout(shape: Sequence[int], segments: Sequence[Segment]) -> TensorLayout:
    """Suffix -> (dtype, shape) of every tensor `pack` makes for a weight [N, K] with these
    segments.

    Codes of integers are int32 [N, ceil(length*bits/32)]; of floats uint8 [N, ceil(length*bits/8)],
    the same stream. Two-level scale codes are uint8 [N, ceil(G*scale_bits/8)], one stream per row;
    zero points are int32 [ceil(N*zero_bits/32), G], packed along N (TENSOR: one row and one group,
    so [1, 1]). Sparse formats have half the codes, and their places: int32
    [N, ceil(length/2*2/32)].
    """
    check_segments(shape, segments)
    rows = shape[0]
    layout: TensorLayout = {}
    for index, segment in enumerate(segments):
        format, tail = segment.format, _tail(index)
        if format.is_integer:
            stored = sparse.kept_columns(segment.length) if format.sparse else segment.length
            layout[PACKED + tail] = torch.int32, (rows, packed_words(stored, format.bits))
        else:
            layout[PACKED + tail] = torch.uint8, (rows, packed_bytes(segment.length, format.bits))
        if format.sparse:
            kept = sparse.kept_columns(segment.length)
            layout[PLACES + tail] = torch.int32, (rows, packed_words(kept, sparse.PLACE_BITS))
        scale_dtype, (scale_rows, groups) = _scale_form(rows, segment)
        width = packed_bytes(groups, format.scale_bits) if format.two_level else groups
        layout[SCALE + tail] = scale_dtype, (scale_rows, width)
        row_form = _row_scale_form(rows, format)
        if row_form is not None:
            layout[ROW_SCALE + tail] = row_form
        if not format.symmetric:
            words = packed_words(scale_rows, format.zero_bits)
            layout[ZERO_POINT + tail] = torch.int32, (words, groups)
    return layout


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by suffix, as `packed_layout` describes them.

    Raises FormatError when a weight in a sparse format has more than two codes of four to store.
    """
    tensors: dict[str, Tensor] = {}
    for index, part in enumerate(weight.segments):
        format, tail = part.segment.format, _tail(index)
        if format.sparse:
            values, places = _kept(part).packed(format.bits)
            tensors |= {PACKED + tail: values, PLACES + tail: places}
        else:
            pack_element = pack_codes if format.is_integer else pack_bits
            tensors[PACKED + tail] = pack_element(part.codes, format.bits)
        scale = part.scale.contiguous()
        tensors[SCALE + tail] = pack_bits(scale, format.scale_bits) if format.two_level else scale
        if part.row_scale is not None:
            tensors[ROW_SCALE + tail] = part.row_scale.contiguous()
        if part.zero is not None:
            tensors[ZERO_POINT + tail] = pack_zeros(part.zero, format.zero_bits)
    return tensors


def unpack(
    tensors: Mapping[str, Tensor], shape: Sequence[int], segments: Sequence[Segment]
) -> QuantizedWeight:
    """The inverse of `pack`, for tensors from a file: names, dtypes, shapes and values are checked.

    Raises FormatError on a missing or unexpected tensor, a wrong dtype or shape, and on scales or
    codes that are not finite numbers.
    """
    layout = packed_layout(shape, segments)
    if set(tensors) != set(layout):
        missing, extra = sorted(set(layout) - set(tensors)), sorted(set(tensors) - set(layout))
        raise FormatError(
            f"packed tensors do not match the format: missing {missing}, unexpected {extra}"
        )
    for suffix, (dtype, expected) in layout.items():
        _expect(f"packed tensor {suffix}", tensors[suffix], dtype, expected)
    parts = tuple(
        _unpack_segment(tensors, i, segment, shape[0]) for i, segment in enumerate(segments)
    )
    for part in parts:
        _check_values(part)
    return QuantizedWeight((shape[0], shape[1]), parts)


def _unpack_segment(
    tensors: Mapping[str, Tensor], index: int, segment: Segment, rows: int
) -> QuantizedSegment:
    format, tail = segment.format, _tail(index)
    if format.sparse:
        codes = _unpack_kept(tensors[PACKED + tail], tensors[PLACES + tail], segment)
    else:
        unpack_element = unpack_codes if format.is_integer else unpack_bits
        codes = unpack_element(tensors[PACKED + tail], format.bits, segment.length)
    scale = tensors[SCALE + tail]
    scale_rows, groups = _scale_form(rows, segment)[1]
    if format.two_level:
        scale = unpack_bits(scale, format.scale_bits, groups)
    zero = None
    if not format.symmetric:
        zero = unpack_zeros(tensors[ZERO_POINT + tail], format.zero_bits, scale_rows)
    return QuantizedSegment(segment, codes, scale, tensors.get(ROW_SCALE + tail), zero)


def _kept(part: QuantizedSegment) -> sparse.SparseCodes:
    kept = sparse.kept_of(part.codes, 1 << (part.segment.format.bits - 1))
    if kept is None:
        raise FormatError(
            f"a weight in {part.segment.format} has three or four numbers that are not zero among "
            "four columns: prune it first (`rounding.round_sparse`)"
        )
    return kept


def _unpack_kept(values: Tensor, places: Tensor, segment: Segment) -> Tensor:
    """Codes uint8 [N, length] of a sparse segment, with the zeros that are not stored."""
    bits = segment.format.bits
    zero = torch.tensor(1 << (bits - 1), dtype=torch.uint8, device=values.device)
    codes, _ = sparse.expand(sparse.unpack(values, places, bits, segment.length), zero)
    return codes[:, : segment.length].contiguous()


def _check_values(part: QuantizedSegment) -> None:
    """Raise FormatError on a scale or code that is inf, nan or (scales) negative: such a file is
    damaged."""
    format = part.segment.format
    damaged = "this checkpoint is damaged; write it again"
    for name, values in (("scale", part.scale), ("row scale", part.row_scale)):
        if values is None or not values.is_floating_point():
            continue
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise FormatError(f"a {name} of a {format} weight is negative or not finite: {damaged}")
    if format.scale == "e8m0" and bool((part.scale == E8M0_NAN).any()):
        raise FormatError(f"a scale of a {format} weight is not a number: {damaged}")
    if format.scale == "e4m3" and bool((part.scale > _E4M3_LARGEST).any()):
        raise FormatError(f"a scale of a {format} weight is negative or not a number: {damaged}")
    if not format.is_integer:
        element = FLOATS[format.element]
        magnitude_bits = (1 << (element.bits - 1)) - 1
        if element.specials <= magnitude_bits and bool(
            ((part.codes & magnitude_bits) >= element.specials).any()
        ):
            raise FormatError(f"a code of a {format} weight is inf or nan: {damaged}")


def _scale_form(rows: int, segment: Segment) -> tuple[torch.dtype, tuple[int, int]]:
    """dtype and shape of `QuantizedSegment.scale`."""
    format = segment.format
    dtype = torch.float16 if format.scale == "f16" else torch.uint8
    return dtype, (1 if format.group_size == TENSOR else rows, format.groups(segment.length))


def _row_scale_form(rows: int, format: WeightFormat) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """dtype and shape of `QuantizedSegment.row_scale`, None for the kinds that have none."""
    if format.two_level:
        return torch.float16, (rows,)
    return (torch.float32, (1,)) if format.scale == "e4m3" else None


def _tail(index: int) -> str:
    """What is appended to the suffixes of segment `index`."""
    return f"_{index}" if index else ""


def _expect(
    name: str, tensor: Tensor | None, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> None:
    """Raise FormatError unless `tensor` has this dtype and shape; a dtype of None: it must be
    absent."""
    found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
    wanted = "nothing" if dtype is None else f"{dtype} {list(shape)}"
    if found != wanted:
        raise FormatError(f"{name} is {found}, expected {wanted}".replace("torch.", ""))
