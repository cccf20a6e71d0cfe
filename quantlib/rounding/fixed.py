"""GPTQ with scales fixed beforehand: for small floats, MX and NVFP4 blocks, per-tensor scales, and
mixed segments.

Slower than `rounding.integer` (one weight, one scheme at a time), but it works for every format,
because rounding one column is asked of the format itself. Scales come from round-to-nearest, with
each group's clip chosen by importance-weighted error; when all codes are known, they are fitted
once more to them (`rounding.scales`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlib.formats.rtn import choose_scales, encode
from quantlib.formats.weight import (
    QuantizedSegment,
    QuantizedWeight,
    check_segments,
    dequantize,
)
from quantlib.formats.weight_format import CHANNEL, TENSOR, Segment, WeightFormat
from quantlib.rounding.hessian import check_weight, damped, inverse_factor
from quantlib.rounding.scales import refit_scales
from quantlib.rounding.sweep import SUB_BLOCK

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""Fractions of a group's range that the scale search tries."""
REFIT_PASSES = 2
"""Visits to every scale after the sweep; a third changes the fourth digit of the error."""
E8M0_CLIPS = (1.0, 2.0, 0.5)
"""The same for scales that are powers of two. The scale of the MX specification saturates the
largest weights of some groups; twice as large, it saturates none."""

Scales = tuple[Tensor, Tensor | None, Tensor | None]
"""(scale, row_scale, zero) of a segment, in stored form."""


def round_fixed(
    weight: Tensor,
    hessian: Tensor,
    segments: Sequence[Segment],
    damping: float = 0.01,
    refit: int = REFIT_PASSES,
) -> QuantizedWeight:
    """GPTQ of `weight` [N, K] under `hessian` [K, K], any formats; scales are chosen from the
    original weight, and fitted to the codes at the end, in `refit` visits.

    Raises RoundingError on shapes that disagree, inf or nan; FormatError on segments that do not
    cover K, and on scales that cannot be stored.
    """
    check_weight("the weight", weight, hessian)
    check_segments(weight.shape, segments)
    factor = inverse_factor(damped(hessian, damping))
    importance = factor.diagonal() ** -2
    work = weight.to(torch.float32).clone()
    rows, columns = work.shape
    parts = []
    for segment in segments:
        first, last = segment.start, segment.start + segment.length
        original = weight[:, first:last].to(torch.float32)
        scales = search_scales(original, segment.format, importance[first:last])
        codes = torch.empty(rows, segment.length, dtype=torch.uint8)
        for k0 in range(first, last, SUB_BLOCK):
            k1 = min(k0 + SUB_BLOCK, last)
            block = codes[:, k0 - first : k1 - first]
            local = factor[k0:k1, k0:k1]
            errors = _round_block(work[:, k0:k1], block, local, segment, k0 - first, scales)
            work[:, k1:].addmm_(errors, factor[k0:k1, k1:], alpha=-1)
        parts.append(QuantizedSegment(segment, codes, *scales))
    rounded = QuantizedWeight((rows, columns), tuple(parts))
    return refit_scales(rounded, weight, hessian, refit, damping)


def search_scales(weight: Tensor, format: WeightFormat, importance: Tensor) -> Scales:
    """Stored scales of `weight` [N, length]: per group the clip with the least squared error,
    weighted by `importance` [length]."""
    groups = format.groups(weight.shape[1])
    rows = 1 if format.group_size == TENSOR else weight.shape[0]
    best_clip = torch.ones(rows, groups)
    best_error = torch.full((rows, groups), torch.inf)
    for clip in E8M0_CLIPS if format.scale == "e8m0" else CLIPS:
        scales = choose_scales(weight, format, clip)
        error = _group_errors(weight, format, importance, scales)
        best_clip = torch.where(error < best_error, clip, best_clip)
        best_error = torch.minimum(error, best_error)
    return choose_scales(weight, format, best_clip)


def _group_errors(
    weight: Tensor, format: WeightFormat, importance: Tensor, scales: Scales
) -> Tensor:
    """Importance-weighted squared error of plain rounding, [N, G] ([1, 1] for TENSOR)."""
    segment = Segment(0, weight.shape[1], format)
    part = QuantizedSegment(segment, encode(weight, format, *scales), *scales)
    residual = dequantize(QuantizedWeight((weight.shape[0], weight.shape[1]), (part,))) - weight
    cost = residual.square_() * importance
    if format.group_size == TENSOR:
        return cost.sum().reshape(1, 1)
    if format.group_size == CHANNEL:
        return cost.sum(1, keepdim=True)
    return torch.stack([block.sum(1) for block in cost.split(format.group_size, dim=1)], dim=1)


def _round_block(
    block: Tensor, codes: Tensor, factor: Tensor, segment: Segment, offset: int, scales: Scales
) -> Tensor:
    """Round the columns of `block` [N, B] (overwritten), the first of which is column `offset` of
    the segment, into `codes`; returns the scaled errors [N, B]."""
    errors = torch.empty_like(block)
    for j in range(block.shape[1]):
        codes[:, j], value = round_column(block[:, j : j + 1], segment, offset + j, scales)
        errors[:, j] = (block[:, j] - value) / factor[j, j]
        block[:, j + 1 :].addr_(errors[:, j], factor[j, j + 1 :], alpha=-1)
    return errors


def round_column(
    column: Tensor, segment: Segment, index: int, scales: Scales
) -> tuple[Tensor, Tensor]:
    """(codes uint8 [N], value float32 [N]) of one column [N, 1] at `index` inside its segment."""
    format = segment.format
    group = index // format.group_size if format.group_size > 0 else 0
    scale, row_scale, zero = scales
    one = scale[:, group : group + 1]
    one_zero = None if zero is None else zero[:, group : group + 1]
    codes = encode(column, format, one, row_scale, one_zero)
    part = QuantizedSegment(Segment(0, 1, format), codes, one, row_scale, one_zero)
    return codes[:, 0], dequantize(QuantizedWeight((column.shape[0], 1), (part,)))[:, 0]
