"""The arithmetic of the CPU kernels, step by step, in torch: every instruction set must give
exactly these bits.

`reference.linear` says what a linear is; this module says in which order its float32 operations are
done (`cpu/src/tiles.h` is the definition): a sum over a run of up to 128 columns that share a
scale, then one fused multiply-add per run. Torch has no fused operation, so `fma` makes one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlib.formats.activation import ActivationSegment, quantize, scale_columns
from quantlib.formats.elements import FLOATS, decode_float
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight, decode_scales, decode_zeros
from quantlib.kernels.cpu.forms import BlockRotation
from quantlib.kernels.reference import int8_activations

MAX_PIECE = 128
WHOLE_RUN, MOST_WHOLE = 512, 32767
"""kWholeRun and kMostWhole of `cpu/src/tiles.h`."""
_INTEGER_UNITS = {"e2m1": 0.5, "e2m2": 0.25, "e2m3": 0.125, "e2m4": 0.0625}
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
    """The pieces of all segments, in order. Padding is left out: it adds zeros."""
    for part in weight.segments:
        yield from pieces_of(part)


def pieces_of(part: QuantizedSegment, most: int = MAX_PIECE) -> Iterator[Piece]:
    """The pieces of a segment, cut into runs of at most `most` columns."""
    form, start, length = part.segment.format, part.segment.start, part.segment.length
    scales, zeros = _scales(part), _zeros(part)
    span = min(form.group_size, most) if form.group_size > 0 else most
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
    activations: Sequence[ActivationSegment] = (),
) -> Tensor:
    """x float32 [M, K] -> [M, N], bit for bit what the kernels compute. mode: "exact" or "int8", or
    exact and `activations`."""
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    if mode == "int8":
        activations = int8_activations([part.segment for part in weight.segments], act_group)
    if not activations:
        return fma(_exact_total(x, weight), torch.ones(1), bias)
    codes, stored = quantize(x, activations)
    values = codes.float()
    widths = [columns.stop - columns.start for columns in scale_columns(activations)]
    scales = stored.repeat_interleave(torch.tensor(widths), dim=1)  # of every column
    if all(p.element not in FLOATS or p.element in _INTEGER_UNITS for p in pieces(weight)):
        return _int8_linear(values, weight, scales, bias, _common_group(activations))
    if mode == "int8" and not act_group:  # the scale of the whole token comes last
        return fma(_exact_total(values, weight), scales[:, :1], bias)
    return fma(_exact_total(values * scales, weight), torch.ones(1), bias)


def _common_group(activations: Sequence[ActivationSegment]) -> int:
    """What all activation groups are multiples of; 0 when there are none."""
    return math.gcd(*(part.format.group for part in activations))


def rotate(x: Tensor, rotation: BlockRotation) -> Tensor:
    """x float32 [M, K], rotated as a form of the kernels does it, bit for bit."""
    dense, power = rotation.parts()
    if rotation.still:
        rotated, still = x[:, : -rotation.still], x[:, -rotation.still :]
        return torch.cat([rotate(rotated, replace(rotation, still=0)), still], dim=1)
    whole = x.shape[1] // rotation.size * rotation.size
    if whole < x.shape[1]:
        y = torch.cat([rotate(x[:, :whole], rotation), x[:, whole:]], dim=1)
        y[:, -rotation.size :] = rotate(y[:, -rotation.size :], rotation)
        return y
    y = x * torch.tensor(1 / math.sqrt(rotation.size), dtype=torch.float32)
    apart = 1
    while apart < power:
        pairs = y.reshape(len(x), -1, 2, apart)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack([first + second, first - second], dim=2).reshape(x.shape)
        apart *= 2
    if dense is None:
        return y
    rows = y.reshape(len(x), -1, len(dense), power)
    out = torch.zeros_like(rows)
    for i, entries in enumerate(dense):
        out = fma(rows[:, :, i : i + 1], entries[:, None], out)
    return out.reshape(x.shape)


def _exact_total(x: Tensor, weight: QuantizedWeight) -> Tensor:
    total = x.new_zeros(len(x), weight.shape[0])
    for piece in pieces(weight):
        values = _values(piece) - piece.zero[:, None]
        sums = torch.zeros_like(total)
        for column, k in zip(values.unbind(1), range(piece.columns.start, piece.columns.stop)):
            sums = fma(x[:, k, None], column, sums)
        total = fma(sums, piece.scale, total)
    return total


def _int8_linear(
    a: Tensor, weight: QuantizedWeight, scales: Tensor, bias: Tensor, act_group: int
) -> Tensor:
    """`a` has integers, `scales` those of each column."""
    out = bias.expand(len(a), -1)
    for part in weight.segments:
        if act_group:
            total = _total_of_runs(a, part, min(act_group, MAX_PIECE), scales)
            out = fma(total, torch.ones(1), out)
        else:
            total = (_total_of_whole_runs if has_whole_sums(part) else _total_of_runs)(a, part)
            out = fma(total, scales[:, part.segment.start, None], out)
    return out


def has_whole_sums(part: QuantizedSegment) -> bool:
    """Whether the pieces of a segment are summed as integers where activations have no groups."""
    form = part.segment.format
    if not form.is_integer or not form.two_level:
        return False
    code_units, _ = _units(part)
    return code_units * ((1 << form.bits) - 1) * ((1 << form.scale_bits) - 1) <= MOST_WHOLE


def _units(part: QuantizedSegment) -> tuple[int, int]:
    """A zero point's step in codes, as a quotient: denominator and numerator."""
    form = part.segment.format
    if form.symmetric:
        return 1, 1
    largest, zeros = (1 << form.bits) - 1, (1 << form.zero_bits) - 1
    common = math.gcd(largest, zeros)
    return zeros // common, largest // common


def _total_of_whole_runs(a: Tensor, part: QuantizedSegment) -> Tensor:
    segment, form = part.segment, part.segment.format
    rows = part.codes.shape[0]
    assert part.row_scale is not None
    code_units, zero_units = _units(part)
    factor = part.row_scale.float() / ((1 << form.scale_bits) - 1)
    factor = factor * torch.tensor(1 / code_units, dtype=torch.float32)
    zero = torch.full((rows, 1), 1 << (form.bits - 1)) if part.zero is None else part.zero
    groups = torch.arange(segment.length) // form.group_size
    units = (
        code_units * part.codes.long()
        - (zero_units * zero.long()).expand(rows, part.scale.shape[1])[:, groups]
    )
    units *= part.scale.long().expand(rows, -1)[:, groups]
    total = a.new_zeros(len(a), rows)
    for k in range(0, segment.length, WHOLE_RUN):
        end = min(k + WHOLE_RUN, segment.length)
        own = a[:, segment.start + k : segment.start + end]
        # Below 2^31, so exact in float64.
        total = fma((own.double() @ units[:, k:end].double().T).float(), factor, total)
    return total


def _total_of_runs(
    a: Tensor, part: QuantizedSegment, most: int = MAX_PIECE, scales: Tensor | None = None
) -> Tensor:
    """`scales` are those of each column's activation group, or None."""
    total = a.new_zeros(len(a), part.codes.shape[0])
    for piece in pieces_of(part, most):
        codes, zero, unit = piece.codes.double(), piece.zero, 1.0
        if piece.element in _INTEGER_UNITS:
            unit = _INTEGER_UNITS[piece.element]
            zero = torch.full_like(zero, FLOATS[piece.element].max_value / unit)
            codes = _values(piece).double() / unit + zero[:, None]
        own = a[:, piece.columns]
        dot = (own.double() @ codes.T).float()  # an integer below 2^24: exact
        term = fma(-zero, own.sum(dim=1, keepdim=True), dot)
        if scales is not None:
            term = term * scales[:, piece.columns.start, None]
        total = fma(term, piece.scale * unit, total)
    return total


def _values(piece: Piece) -> Tensor:
    """The number of every code, float32 [N, columns]."""
    if piece.element in FLOATS:
        return decode_float(piece.codes, piece.element)
    return piece.codes.float()
