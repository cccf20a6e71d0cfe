"""What a product is compiled for: the constants of `gemm.multiply` and `rows.dequantize_rows`.

Everything here is known from a weight's format and from how its inputs are rounded; nothing here
needs Triton or a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantlib.formats.activation import FLOAT8, ActivationSegment, float8, scale_columns
from quantlib.formats.elements import FLOATS
from quantlib.formats.weight_format import WeightFormat
from quantlib.kernels.triton.layout import TILE, parts

AT_END, EACH_TILE, EACH_STRETCH = 0, 1, 2
"""When sums are scaled: once, after each tile of 128 columns, after each product."""
_LEAST_DEPTH, _BYTE_DEPTH = 16, 32
"""Columns of a product of 16-bit floats, and of bytes."""


@dataclass(frozen=True)
class Case:
    """Constants of a kernel.

    mantissa: bits of it, or -1 for integers. depth: columns of one product. group: columns of a
    scale, 0: all. flush: AT_END, EACH_TILE or EACH_STRETCH. scaled, zeros, e8m0: what there is of
    scales and zero points. coded: inputs are codes of 8 bits with scales. compute: of operands.
    """

    bits: int
    mantissa: int
    parts: int
    depth: int
    group: int
    flush: int
    scaled: bool
    zeros: bool
    e8m0: bool
    coded: bool
    compute: torch.dtype


def numbers(form: WeightFormat, compute: torch.dtype) -> Case:
    """Inputs as they are: float16, bfloat16 or float32."""
    depth = stretch(form)
    return _case(form, depth, _flush(form, depth, ()), False, compute)


def integers(
    form: WeightFormat, start: int, length: int, activations: Sequence[ActivationSegment]
) -> tuple[Case, tuple[int, ...]] | None:
    """Inputs as int8 codes, for the weight's columns from `start` on: and which of a token's scales
    (`formats.activation.scale_columns`) each stretch of the case's depth takes.

    None when inputs are not rounded to integers, or a scale changes within 16 columns.
    """
    if not activations or not all(part.format.is_integer for part in activations):
        return None
    depth = stretch(form)
    while depth >= _LEAST_DEPTH:
        own = _scales_of_stretches(start, length, depth, scale_columns(activations))
        if own is not None:
            exact = form.is_integer and depth >= _BYTE_DEPTH
            compute = torch.int8 if exact else torch.float16
            return _case(form, depth, _flush(form, depth, own), True, compute), own
        depth //= 2
    return None


def floats(
    form: WeightFormat, start: int, length: int, activations: Sequence[ActivationSegment]
) -> tuple[Case, tuple[int, ...]] | None:
    """The same for inputs as codes of 8-bit floats, which meet a weight's codes of the same element
    as they are. None for other inputs or weights, and where a scale changes within 32 columns."""
    compute = FLOAT8.get(form.element)
    if compute is None or compute != float8(activations):
        return None
    depth = stretch(form)
    while depth >= _BYTE_DEPTH:
        own = _scales_of_stretches(start, length, depth, scale_columns(activations))
        if own is not None:
            return _case(form, depth, _flush(form, depth, own), True, compute), own
        depth //= 2
    return None


def stretch(form: WeightFormat) -> int:
    """Columns that lie side by side and share a scale: those of one product."""
    run = TILE // parts(form.bits)
    return min(run, form.group_size) if form.group_size > 0 else run


def _case(form: WeightFormat, depth: int, flush: int, coded: bool, compute: torch.dtype) -> Case:
    return Case(
        form.bits,
        -1 if form.is_integer else FLOATS[form.element].mantissa_bits,
        parts(form.bits),
        depth,
        max(form.group_size, 0),
        flush,
        form.group_size > 0,
        not form.symmetric,
        form.scale == "e8m0" and form.group_size > 0,
        coded,
        compute,
    )


def _flush(form: WeightFormat, depth: int, own: tuple[int, ...]) -> int:
    per_tile = TILE // depth
    tiles = [own[at : at + per_tile] for at in range(0, len(own), per_tile)]
    if form.group_size <= 0 and len(set(own)) <= 1:
        return AT_END
    whole = form.group_size <= 0 or form.group_size >= TILE
    return EACH_TILE if whole and all(len(set(tile)) == 1 for tile in tiles) else EACH_STRETCH


def _scales_of_stretches(
    start: int, length: int, depth: int, scales: Sequence[slice]
) -> tuple[int, ...] | None:
    """The scale of each stretch; those in the padding take the last one's. None when one has
    several."""
    found: list[int] = []
    at = 0
    for first in range(start, start + length, depth):
        last = min(first + depth, start + length) - 1
        while scales[at].stop <= first:
            at += 1
        if scales[at].stop <= last:
            return None
        found.append(at)
    padded = -(-length // TILE) * TILE // depth
    return (*found, *[found[-1]] * (padded - len(found)))
