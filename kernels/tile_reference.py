"""The arithmetic of the CPU kernels, step by step, in torch: every instruction set must give
exactly these bits.

`reference.linear` says what a linear is; this module says in which order its float32 operations are
done (`cpu/src/tiles.h` is the definition): a sum over a piece of up to 128 columns that share a
scale, then one fused multiply-add per piece. Torch has no fused operation, so `fma` makes one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.formats.elements import FLOATS, decode_float
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight, decode_scales, decode_zeros
from quantlib.kernels.reference import act_groups, round_activations

MAX_PIECE = 128
_INTEGER_UNITS = {"e2m1": 0.5, "e2m3": 0.125}
"""Float elements that int8 mode multiplies in integers, and the unit they are multiples of."""


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 tensors, rounded once.

    The product is exact in float64, the sum is rounded there to odd (Boldo and Melquiond, "When
    double rounding is odd", 2005), and rounding that to float32 is the same as rounding the exact
    value, because float64 has more than two bits to spare.
    """
    product, addend = torch.broadcast_tensors(a.double() * b.double(), c.double())
    total = product + addend
    # What the sum lost (Knuth's TwoSum); nan where something is not finite, and then nothing is.
    virtual = total - product
    lost = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    # Away from zero is up by one in the bits, whatever the sign.
    step = torch.where((lost > 0) == (total > 0), 1, -1)
    inexact = torch.isfinite(lost) & (lost != 0) & (bits & 1 == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()


@dataclass(frozen=True)
class Piece:
    """Columns of a weight that share a scale per row.

    columns: where they are in the input.
    codes:   uint8 [N, columns].
    scale:   float32 [N].
    zero:    float32 [N], in codes; 0 for floats.
    element: of the codes.
    """

    columns: slice
    codes: Tensor
    scale: Tensor
    zero: Tensor
    element: str


def pieces(weight: QuantizedWeight) -> Iterator[Piece]:
    """The pieces of all segments, in order, padding left out: it adds zeros."""
    for part in weight.segments:
        form, start, length = part.segment.format, part.segment.start, part.segment.length
        scales, zeros = _scales(part), _zeros(part)
        span = form.group_size if 0 < form.group_size < MAX_PIECE else MAX_PIECE
        for k in range(0, length, span):
            end = min(k + span, length)
            group = k // form.group_size if form.group_size > 0 else 0
            yield Piece(
                slice(start + k, start + end),
                part.codes[:, k:end],
                scales[:, group],
                zeros[:, group],
                form.element,
            )


def _scales(part: QuantizedSegment) -> Tensor:
    """float32 [N, G]. Two-level scales are the code times a quotient that is rounded first, where
    `formats` rounds the other quotient: they differ in the last bit."""
    form, rows = part.segment.format, part.codes.shape[0]
    if form.two_level and part.row_scale is not None:
        factor = part.row_scale.float() / ((1 << form.scale_bits) - 1)
        return part.scale.float() * factor[:, None]
    return decode_scales(part.scale, part.row_scale, form).expand(rows, -1)


def _zeros(part: QuantizedSegment) -> Tensor:
    form, rows = part.segment.format, part.codes.shape[0]
    if part.zero is not None:
        return decode_zeros(part.zero, form).expand(rows, -1)
    constant = float(1 << (form.bits - 1)) if form.is_integer else 0.0
    return torch.full((rows, form.groups(part.segment.length)), constant)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """float32 [N, K], as the kernels decode rows."""
    parts = [(_values(p) - p.zero[:, None]) * p.scale[:, None] for p in pieces(weight)]
    return torch.cat(parts, dim=1)


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    mode: str = "exact",
    act_group: int = 0,
) -> Tensor:
    """x float32 [M, K] -> [M, N], bit for bit what the kernels compute. mode: "exact" or "int8"."""
    rows = weight.shape[0]
    bias = torch.zeros(rows) if bias is None else bias
    if mode == "exact":
        return fma(_exact_total(x, weight), torch.ones(1), bias)
    segments = [part.segment for part in weight.segments]
    groups = act_groups(segments, act_group) if act_group else [slice(0, weight.shape[1])]
    codes, scales = zip(*(round_activations(x[:, columns]) for columns in groups))
    # The scale of every column of x; one per token when there are no groups.
    widths = torch.tensor([columns.stop - columns.start for columns in groups])
    by_column = torch.cat(scales, dim=1).repeat_interleave(widths, dim=1)
    values = torch.cat(codes, dim=1).float()
    token_scale = torch.ones(len(x), 1) if act_group else scales[0]
    if all(p.element not in FLOATS or p.element in _INTEGER_UNITS for p in pieces(weight)):
        total = _int8_total(values, weight, by_column if act_group else None)
    else:
        total = _exact_total(values * by_column if act_group else values, weight)
    return fma(total, token_scale, bias)


def _exact_total(x: Tensor, weight: QuantizedWeight) -> Tensor:
    total = x.new_zeros(len(x), weight.shape[0])
    for piece in pieces(weight):
        values = _values(piece) - piece.zero[:, None]
        sums = torch.zeros_like(total)
        for column, k in zip(values.unbind(1), range(piece.columns.start, piece.columns.stop)):
            sums = fma(x[:, k, None], column, sums)
        total = fma(sums, piece.scale, total)
    return total


def _int8_total(a: Tensor, weight: QuantizedWeight, scales: Tensor | None) -> Tensor:
    """`a` has integers; `scales` those of each column's activation group, or None."""
    total = a.new_zeros(len(a), weight.shape[0])
    for piece in pieces(weight):
        codes, zero, unit = piece.codes.double(), piece.zero, 1.0
        if piece.element in _INTEGER_UNITS:
            unit = _INTEGER_UNITS[piece.element]
            zero = torch.full_like(zero, FLOATS[piece.element].max_value / unit)
            codes = _values(piece).double() / unit + zero[:, None]
        part = a[:, piece.columns]
        dot = (part.double() @ codes.T).float()  # an integer below 2^24: exact
        term = fma(-zero, part.sum(dim=1, keepdim=True), dot)
        if scales is not None:
            term = term * scales[:, piece.columns.start, None]
        total = fma(term, piece.scale * unit, total)
    return total


def _values(piece: Piece) -> Tensor:
    """The number of every code, float32 [N, columns]."""
    if piece.element in FLOATS:
        return decode_float(piece.codes, piece.element)
    return piece.codes.float()
