"""Packed weights with random numbers, made in the form a checkpoint stores: a benchmark of speed
needs neither a model nor the minutes that rounding one takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import (
    PACKED,
    ROW_SCALE,
    SCALE,
    ZERO_POINT,
    TensorLayout,
    packed_layout,
)
from quantlib.formats.weight_format import Segment
from quantlib.kernels.packed import PackedWeight

_SPREAD = 0.03
"""The largest weights, about as large as trained ones: what a deep stack computes stays finite."""
_KINDS = (PACKED, SCALE, ROW_SCALE, ZERO_POINT)
_NO_TOP_EXPONENT = 0xBF
"""Mask of an 8-bit float without the exponent's first bit: no infinity, no nan, nothing above 2."""


def random_weight(rows: int, columns: int, scheme: str, generator: torch.Generator) -> PackedWeight:
    """A weight [N, K] in a uniform integer or float scheme. Raises FormatError on a kept one."""
    segments = Scheme.parse(scheme).segments(columns)
    return PackedWeight.from_tensors(
        random_tensors((rows, columns), segments, generator), (rows, columns), segments
    )


def random_tensors(
    shape: Sequence[int], segments: Sequence[Segment], generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors of `packed_layout(shape, segments)`: random codes and zero points, scales that
    put the largest weights near `_SPREAD`."""
    layout = packed_layout(shape, segments)
    made: dict[str, Tensor] = {}
    for segment, suffixes in _by_segment(layout, segments):
        for suffix in suffixes:
            dtype, form = layout[suffix]
            made[suffix] = _random(suffix, dtype, form, segment, generator)
    return made


def _by_segment(
    layout: TensorLayout, segments: Sequence[Segment]
) -> Iterator[tuple[Segment, list[str]]]:
    for index, segment in enumerate(segments):
        tail = f"_{index}" if index else ""
        kinds = (suffix for suffix in layout if suffix.removesuffix(tail) in _KINDS)
        yield segment, [suffix for suffix in kinds if suffix.endswith(tail)]


def _random(
    suffix: str, dtype: torch.dtype, form: Sequence[int], segment: Segment, g: torch.Generator
) -> Tensor:
    """One tensor: bits, except for scales that are numbers."""
    format = segment.format
    if suffix.startswith((SCALE, ROW_SCALE)) and dtype.is_floating_point:
        largest = float(1 << (format.bits - 1)) if format.is_integer else 6.0
        # An nvfp4 row scale multiplies group scales of about 1; all others stand alone.
        return (_SPREAD / largest * (0.5 + torch.rand(*form, generator=g))).to(dtype)
    if suffix.startswith(SCALE) and format.scale == "e8m0":
        return torch.randint(117, 122, tuple(form), generator=g, dtype=torch.uint8)
    if suffix.startswith(SCALE) and format.scale == "e4m3":
        return torch.randint(0x30, 0x40, tuple(form), generator=g, dtype=torch.uint8)
    info = torch.iinfo(dtype)
    bits = torch.randint(info.min, info.max + 1, tuple(form), generator=g, dtype=dtype)
    is_float8 = suffix.startswith(PACKED) and not format.is_integer and format.bits == 8
    return bits & _NO_TOP_EXPONENT if is_float8 else bits
