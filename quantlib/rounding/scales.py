"""Least-squares re-fit: the best stored scales and zero points for codes that stay as they are.

For fixed codes a weight is linear in each of its scales (a group's, a row's in two-level formats, a
tensor's in NVFP4) and in each zero point, so the objective tr((W - Q) H (W - Q)^T) is a parabola in
any one of them. They are visited in turn; each goes to the stored value nearest to its parabola's
vertex, which is the exact minimum over everything that the format can store there. Codes are not
touched, so this can follow any rounding, and what comes out is what ships.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats.elements import decode_float, encode_float
from quantlib.formats.groups import group_blocks
from quantlib.formats.weight import (
    E8M0_BIAS,
    E8M0_NAN,
    QuantizedSegment,
    QuantizedWeight,
    decode_scales,
    decode_zeros,
    dequantize,
    effective_scale,
)
from quantlib.formats.weight_format import TENSOR, WeightFormat
from quantlib.rounding.grid import LARGEST_SCALE, SMALLEST_SCALE
from quantlib.rounding.hessian import check_weight, damped

LARGEST_E4M3_CODE = 0x7E


def refit_scales(
    weight: QuantizedWeight,
    target: Tensor,
    hessian: Tensor,
    passes: int = 2,
    damping: float = 0.01,
) -> QuantizedWeight:
    """`weight` with the scales, row scales and zero points that bring it nearest to `target`
    [N, K] under `hessian` [K, K]; its codes are the same.

    No row gets worse: one that float32 sums have misled keeps what it had (a format with one scale
    for the whole tensor is kept or changed as a whole). Raises RoundingError on shapes that
    disagree, inf or nan.
    """
    check_weight("the target", target, hessian)
    if weight.shape != tuple(target.shape):
        raise RoundingError(
            f"a rounded weight {list(weight.shape)} has no target of {list(target.shape)}"
        )
    moment = damped(hessian, damping)
    target = target.to(torch.float32)
    parts = list(weight.segments)
    for _ in range(passes):
        fitted = QuantizedWeight(weight.shape, tuple(parts))
        pull = (target - dequantize(fitted)) @ moment
        for index, part in enumerate(parts):
            parts[index] = _refit_segment(part, pull, moment)
    return _better(weight, QuantizedWeight(weight.shape, tuple(parts)), target, moment)


def unit_values(part: QuantizedSegment) -> Tensor:
    """What a segment's scales multiply, float32 [N, length]: codes less their zero point, or the
    numbers that float codes stand for."""
    format = part.segment.format
    if not format.is_integer:
        return decode_float(part.codes, format.element)
    values = part.codes.to(torch.float32)
    if part.zero is None:
        return values.sub_(1 << (format.bits - 1))
    zeros = decode_zeros(part.zero, format)
    for block in group_blocks(part.segment.length, format.group_size):
        block.view(values).sub_(zeros[:, block.groups, None])
    return values


def nearest_scale(value: Tensor, format: WeightFormat, row_scale: Tensor | None) -> Tensor:
    """The stored scale nearest to each positive `value`, float32 [N, G] ([1, 1] for TENSOR); never
    a stored zero. `row_scale` as stored."""
    if format.scale == "f16":
        return value.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16)
    if format.scale == "e8m0":
        mantissa, exponent = torch.frexp(value)  # in [1/2, 1): the middle of two powers is 3/4
        code = exponent - 1 + (mantissa > 0.75).to(exponent.dtype) + E8M0_BIAS
        return code.clamp_(0, E8M0_NAN - 1).to(torch.uint8)
    if row_scale is None:
        raise RoundingError(f"{format}: two-level scales need a row_scale")
    if format.scale == "e4m3":
        return encode_float(value / row_scale, "e4m3").clamp_(1, LARGEST_E4M3_CODE)
    largest = float((1 << format.scale_bits) - 1)
    steps = value / row_scale.to(torch.float32)[:, None] * largest
    return steps.round_().clamp_(1, largest).to(torch.uint8)


def _refit_segment(part: QuantizedSegment, pull: Tensor, moment: Tensor) -> QuantizedSegment:
    """One visit to every scale and zero point of a segment; `pull` = (W - Q) H [N, K] follows."""
    if part.row_scale is not None:
        part = _refit_row_scale(part, part.row_scale, pull, moment)
    scale, zero = part.scale.clone(), None if part.zero is None else part.zero.clone()
    part = replace(part, scale=scale, zero=zero)
    for group, columns in _groups(part):
        _refit_group(part, group, columns, pull, moment)
    return part


def _refit_row_scale(
    part: QuantizedSegment, row_scale: Tensor, pull: Tensor, moment: Tensor
) -> QuantizedSegment:
    """The scale above a segment's two-level scales: float16 [N], or NVFP4's float32 [1]."""
    columns = slice(part.segment.start, part.segment.start + part.segment.length)
    rows = row_scale.to(torch.float32).expand(len(part.codes))
    values = unit_values(part)
    scale = effective_scale(part)
    for block in group_blocks(part.segment.length, part.segment.format.group_size):
        block.view(values).mul_(scale[:, block.groups, None])
    values /= torch.where(rows > 0, rows, torch.inf)[:, None]
    shared = row_scale.numel() == 1 < len(part.codes)
    step, reach = _vertex(values, columns, pull, moment, shared)
    wanted = row_scale.to(torch.float32) + (step[:1] if shared else step)
    kept = row_scale.to(torch.float32)
    largest = LARGEST_SCALE if row_scale.dtype == torch.float16 else torch.inf
    usable = (wanted >= SMALLEST_SCALE) & (wanted <= largest) & (kept > 0)
    stored = torch.where(usable, wanted, kept).to(row_scale.dtype)
    change = (stored.to(torch.float32) - kept).expand(len(part.codes))
    pull.sub_(reach.mul_(change[:, None]))
    return replace(part, row_scale=stored)


def _refit_group(
    part: QuantizedSegment, group: int, columns: slice, pull: Tensor, moment: Tensor
) -> None:
    """Scale, then zero point, of one group, in place; `columns` are the weight's."""
    format, rows = part.segment.format, len(part.codes)
    own = slice(columns.start - part.segment.start, columns.stop - part.segment.start)
    one = part.scale[:, group : group + 1]
    values = unit_values(part)[:, own] if part.zero is None else _group_steps(part, group, own)
    before = decode_scales(one, part.row_scale, format)
    shared = format.group_size == TENSOR
    step, reach = _vertex(values, columns, pull, moment, shared)
    wanted = before + (step[:1, None] if shared else step[:, None])
    usable = (wanted > 0) & (before > 0)
    stored = nearest_scale(torch.where(usable, wanted, 1.0), format, part.row_scale)
    one.copy_(torch.where(usable, stored, one))
    after = decode_scales(one, part.row_scale, format)
    pull.sub_(reach.mul_((after - before).expand(rows, 1)))
    if part.zero is None:
        return
    stored_zero = part.zero[:, group : group + 1]
    old = decode_zeros(stored_zero, format)
    lever = after.expand(rows, 1).neg().expand(rows, own.stop - own.start)
    step, reach = _vertex(lever, columns, pull, moment, shared)
    wanted = old + (step[:1, None] if shared else step[:, None])
    top = float((1 << format.zero_bits) - 1)
    stored_zero.copy_((wanted / format.zero_step).round_().clamp_(0, top).to(torch.uint8))
    pull.sub_(reach.mul_((decode_zeros(stored_zero, format) - old).expand(rows, 1)))


def _group_steps(part: QuantizedSegment, group: int, own: slice) -> Tensor:
    """Codes of one group less its zero point, float32 [N, g]."""
    assert part.zero is not None
    zero = decode_zeros(part.zero[:, group : group + 1], part.segment.format)
    return part.codes[:, own].to(torch.float32) - zero


def _vertex(
    direction: Tensor, columns: slice, pull: Tensor, moment: Tensor, shared: bool
) -> tuple[Tensor, Tensor]:
    """How far along `direction` [N, g] (in `columns`) each row's objective is least, float32 [N],
    and what a unit step takes from the pull, [N, K]; `shared`: the same step for all rows."""
    reach = direction @ moment[columns]
    slope = (direction * pull[:, columns]).sum(1, dtype=torch.float64)
    curvature = (direction * reach[:, columns]).sum(1, dtype=torch.float64)
    if shared:
        slope, curvature = slope.sum().expand_as(slope), curvature.sum().expand_as(curvature)
    step = torch.where(curvature > 0, slope / curvature.clamp(min=1e-300), 0.0)
    return step.to(torch.float32), reach


def _groups(part: QuantizedSegment) -> Iterator[tuple[int, slice]]:
    """(index, the weight's columns) of every group of a segment."""
    for block in group_blocks(part.segment.length, part.segment.format.group_size):
        for position in range(block.groups.start, block.groups.stop):
            offset = (position - block.groups.start) * block.size
            first = part.segment.start + block.columns.start + offset
            yield position, slice(first, first + block.size)


def _better(
    old: QuantizedWeight, new: QuantizedWeight, target: Tensor, moment: Tensor
) -> QuantizedWeight:
    """Row by row the one with the smaller objective, summed in float64; ties stay."""
    errors = []
    for weight in (old, new):
        difference = (dequantize(weight) - target).to(torch.float64)
        errors.append(((difference @ moment.to(torch.float64)) * difference).sum(1))
    better = errors[1] < errors[0]
    formats = [part.segment.format for part in old.segments]
    if any(format.group_size == TENSOR or format.scale == "e4m3" for format in formats):
        return new if float(errors[1].sum()) < float(errors[0].sum()) else old
    parts = tuple(
        _rows_where(better, after, before)
        for before, after in zip(old.segments, new.segments, strict=True)
    )
    return QuantizedWeight(old.shape, parts)


def _rows_where(chosen: Tensor, new: QuantizedSegment, old: QuantizedSegment) -> QuantizedSegment:
    """The rows of `new` where `chosen` [N], else those of `old`; of the same codes."""
    column = chosen[:, None]
    scale = torch.where(column, new.scale, old.scale)
    row_scale, zero = new.row_scale, new.zero
    if row_scale is not None and old.row_scale is not None:
        row_scale = torch.where(chosen, row_scale, old.row_scale)
    if zero is not None and old.zero is not None:
        zero = torch.where(column, zero, old.zero)
    return replace(new, scale=scale, row_scale=row_scale, zero=zero)
