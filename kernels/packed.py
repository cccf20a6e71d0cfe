"""`PackedWeight`: a weight as the checkpoint stores it, the same on every machine.

The tensors may be views of a mapped file. The CPU kernels rearrange them once (`layouts.tile`);
everything else reads them as they are. What a kernel must know besides the tensors (shape, K
segments, formats) travels as one short string, the layout, because that is what an operator of
`torch.library` can take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.activation import ActivationFormat, ActivationSegment
from quantlib.formats.packing import pack_zeros, unpack_zeros
from quantlib.formats.weight import (
    PACKED,
    PLACES,
    ROW_SCALE,
    SCALE,
    ZERO_POINT,
    QuantizedWeight,
    pack,
    packed_layout,
    unpack,
)
from quantlib.formats.weight_format import TENSOR, Segment, WeightFormat

_SPARSE = "2of4"


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The canonical tensors of a weight [N, K], by suffix, in the order of `packed_layout`.

    Build it with `from_tensors`, which checks them: the kernels trust shapes and dtypes.
    """

    shape: tuple[int, int]
    segments: tuple[Segment, ...]
    tensors: dict[str, Tensor]
    layout: str = field(repr=False)

    @staticmethod
    def from_tensors(
        tensors: Mapping[str, Tensor], shape: Sequence[int], segments: Sequence[Segment]
    ) -> PackedWeight:
        """Take the tensors that `formats.pack` made, keyed by suffix ("_packed", ...), uncopied.

        Raises FormatError when one is missing, unexpected, or of another dtype or shape. Values are
        not read: `formats.unpack` checks those when a file is first opened.
        """
        expected = packed_layout(shape, segments)
        if set(tensors) != set(expected):
            missing = sorted(set(expected) - set(tensors))
            extra = sorted(set(tensors) - set(expected))
            raise FormatError(
                f"packed tensors do not match the format: missing {missing}, unexpected {extra}"
            )
        for suffix, (dtype, form) in expected.items():
            found = tensors[suffix]
            if found.dtype != dtype or tuple(found.shape) != tuple(form):
                raise FormatError(
                    f"packed tensor {suffix} is {_name(found.dtype)} {list(found.shape)}, "
                    f"expected {_name(dtype)} {list(form)}: the checkpoint and its plan disagree"
                )
        return PackedWeight(
            (shape[0], shape[1]),
            tuple(segments),
            {suffix: tensors[suffix].contiguous() for suffix in expected},
            layout_of(shape, segments),
        )

    def to_quantized(self) -> QuantizedWeight:
        """The unpacked weight, for the reference. Raises FormatError on damaged values."""
        return unpack(self.tensors, self.shape, self.segments)

    def select_rows(self, rows: Tensor) -> PackedWeight:
        """The packed weight of the rows `rows`: int64 [n], at least one, each in 0..N-1."""
        chosen = {}
        for index, segment in enumerate(self.segments):
            form, tail = segment.format, f"_{index}" if index else ""
            per_row = form.group_size != TENSOR
            chosen[PACKED + tail] = self.tensors[PACKED + tail][rows]
            if form.sparse:
                chosen[PLACES + tail] = self.tensors[PLACES + tail][rows]
            scale = self.tensors[SCALE + tail]
            chosen[SCALE + tail] = scale[rows] if per_row else scale
            if ROW_SCALE + tail in self.tensors:
                row_scale = self.tensors[ROW_SCALE + tail]
                chosen[ROW_SCALE + tail] = row_scale[rows] if form.two_level else row_scale
            if not form.symmetric:
                words = self.tensors[ZERO_POINT + tail]
                chosen[ZERO_POINT + tail] = (
                    _select_zeros(words, form, self.shape[0], rows) if per_row else words
                )
        return PackedWeight.from_tensors(chosen, (len(rows), self.shape[1]), self.segments)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors: what this weight keeps resident."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def layout_of(shape: Sequence[int], segments: Sequence[Segment]) -> str:
    """Shape and segments as text, for example `96x512|0:448:int4:64:6:f16|448:64:int8:0:0:f16`.

    A segment is start, length, element, group size, bits of a zero point (0: symmetric) and scale,
    and `2of4` if it is sparse.
    """
    parts = [f"{shape[0]}x{shape[1]}"]
    for segment in segments:
        form = segment.format
        fields = (segment.start, segment.length, form.element, form.group_size, form.zero_bits)
        parts.append(":".join(map(str, (*fields, form.scale, *[_SPARSE] * form.sparse))))
    return "|".join(parts)


@lru_cache(maxsize=4096)
def parse_layout(layout: str) -> tuple[tuple[int, int], tuple[Segment, ...]]:
    """The inverse of `layout_of`. Raises FormatError when the text is not a layout."""
    try:
        head, *parts = layout.split("|")
        rows, columns = (int(size) for size in head.split("x"))
        segments = []
        for part in parts:
            start, length, element, group_size, zero_bits, scale, *rest = part.split(":")
            if rest not in ([], [_SPARSE]):
                raise ValueError
            symmetric, sparse = int(zero_bits) == 0, bool(rest)
            form = WeightFormat(element, int(group_size), symmetric, scale, int(zero_bits), sparse)
            segments.append(Segment(int(start), int(length), form))
    except ValueError as error:
        raise FormatError(
            f"{layout!r} is not a weight layout: take it from PackedWeight.layout"
        ) from error
    return (rows, columns), tuple(segments)


@lru_cache(maxsize=4096)
def dense_layout(layout: str) -> str:
    """The layout of the same weight stored with all its zeros: itself where nothing is sparse."""
    if _SPARSE not in layout:
        return layout
    shape, segments = parse_layout(layout)
    return layout_of(shape, [_dense(segment) for segment in segments])


def to_dense(tensors: Sequence[Tensor], layout: str) -> list[Tensor]:
    """A weight's tensors, in the order of its layout -> those of its `dense_layout`, for kernels
    that multiply zeros like all numbers. Raises FormatError on damaged values."""
    if dense_layout(layout) == layout:
        return list(tensors)
    named = dict(zip(suffixes_of(layout), tensors))
    return list(pack(_recast(unpack(named, *parse_layout(layout)), _dense)).values())


def to_sparse(tensors: Sequence[Tensor], layout: str) -> list[Tensor]:
    """The inverse of `to_dense`: tensors of the `dense_layout` -> those of the layout."""
    if dense_layout(layout) == layout:
        return list(tensors)
    _, segments = parse_layout(layout)
    dense = dense_layout(layout)
    whole = unpack(dict(zip(suffixes_of(dense), tensors)), *parse_layout(dense))
    own = {segment.start: segment for segment in segments}
    return list(pack(_recast(whole, lambda segment: own[segment.start])).values())


def _dense(segment: Segment) -> Segment:
    return replace(segment, format=replace(segment.format, sparse=False))


def _recast(weight: QuantizedWeight, segment_of: Callable[[Segment], Segment]) -> QuantizedWeight:
    """The same codes in other formats."""
    parts = (replace(part, segment=segment_of(part.segment)) for part in weight.segments)
    return QuantizedWeight(weight.shape, tuple(parts))


@lru_cache(maxsize=4096)
def suffixes_of(layout: str) -> tuple[str, ...]:
    """Suffixes of the tensors of a layout, in the order an operator takes them."""
    return tuple(packed_layout(*parse_layout(layout)))


def activations_of(segments: Sequence[ActivationSegment]) -> str:
    """How inputs are rounded as text, for example `0:448:4z:0.9|448:64:8:1.0`; "": not at all.

    A segment is start, length, format and clip factor.
    """
    return "|".join(
        f"{part.start}:{part.length}:{part.format}:{part.format.clip!r}" for part in segments
    )


@lru_cache(maxsize=4096)
def parse_activations(text: str) -> tuple[ActivationSegment, ...]:
    """The inverse of `activations_of`. Raises FormatError when the text is not one."""
    segments = []
    for part in text.split("|") if text else ():
        fields = part.split(":")
        try:
            start, length, clip = int(fields[0]), int(fields[1]), float(fields[3])
        except (ValueError, IndexError) as error:
            raise FormatError(
                f"{text!r} does not say how inputs are rounded: take it from activations_of"
            ) from error
        form = replace(ActivationFormat.parse(fields[2]), clip=clip)
        segments.append(ActivationSegment(start, length, form))
    return tuple(segments)


def _select_zeros(words: Tensor, form: WeightFormat, count: int, rows: Tensor) -> Tensor:
    """Zero points are packed along N, so choosing rows means packing them again."""
    return pack_zeros(unpack_zeros(words, form.zero_bits, count)[rows], form.zero_bits)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
