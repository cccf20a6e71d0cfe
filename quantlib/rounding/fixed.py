"""GPTQ with scales fixed beforehand: for small floats, MX and NVFP4 blocks, per-tensor scales, and mixed segments.

Slower than `rounding.integer` (one weight, one scheme at a time), but it works for every format, because rounding one
column is asked of the format itself. Scales come from round-to-nearest, with each group's clip chosen by
importance-weighted error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlib.formats.rtn import choose_scales, encode
from quantlib.formats.scheme import CHANNEL, TENSOR, Segment, WeightFormat
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight, dequantize
from quantlib.rounding.hessian import damped, inverse_factor

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
Scales = tuple[Tensor, Tensor | None, Tensor | None]


def round_fixed(
    weight: Tensor, hessian: Tensor, segments: Sequence[Segment], damping: float = 0.01
) -> QuantizedWeight:
    """GPTQ of `weight` [N, K] under `hessian` [K, K], any formats, scales chosen from the original weight."""
    factor = inverse_factor(damped(hessian, damping))
    importance = factor.diagonal() ** -2
    work = weight.to(torch.float32).clone()
    columns = work.shape[1]
    parts = []
    for segment in segments:
        first, last = segment.start, segment.start + segment.length
        scales = search_scales(weight[:, first:last].float(), segment.format, importance[first:last])
        codes = torch.empty(work.shape[0], segment.length, dtype=torch.uint8)
        for k in range(first, last):
            part, value = _round_column(work[:, k : k + 1], segment, k - first, scales)
            codes[:, k - first] = part
            if k + 1 < columns:
                error = (work[:, k] - value) / factor[k, k]
                work[:, k + 1 :].addr_(error, factor[k, k + 1 :], alpha=-1)
        parts.append(QuantizedSegment(segment, codes, *scales))
    return QuantizedWeight((work.shape[0], columns), tuple(parts))


def search_scales(weight: Tensor, format: WeightFormat, importance: Tensor) -> Scales:
    """Stored scales of `weight` [N, length]: per group the clip with the least importance-weighted squared error."""
    groups = format.groups(weight.shape[1])
    rows = 1 if format.group_size == TENSOR else weight.shape[0]
    best_clip = torch.ones(rows, groups)
    best_error = torch.full((rows, groups), torch.inf)
    for clip in CLIPS:
        error = _group_errors(weight, format, importance, choose_scales(weight, format, clip))
        best_clip = torch.where(error < best_error, clip, best_clip)
        best_error = torch.minimum(error, best_error)
    return choose_scales(weight, format, best_clip)


def _group_errors(weight: Tensor, format: WeightFormat, importance: Tensor, scales: Scales) -> Tensor:
    """Importance-weighted squared error of plain rounding, [N, G] ([1, 1] for per-tensor scales)."""
    segment = Segment(0, weight.shape[1], format)
    part = QuantizedSegment(segment, encode(weight, format, *scales), *scales)
    residual = dequantize(QuantizedWeight((weight.shape[0], weight.shape[1]), (part,))) - weight
    cost = residual.square_() * importance
    if format.group_size == TENSOR:
        return cost.sum().reshape(1, 1)
    if format.group_size == CHANNEL:
        return cost.sum(1, keepdim=True)
    return torch.stack([block.sum(1) for block in cost.split(format.group_size, dim=1)], dim=1)


def _round_column(column: Tensor, segment: Segment, index: int, scales: Scales) -> tuple[Tensor, Tensor]:
    """(codes uint8 [N], value float32 [N]) of one column [N, 1] at `index` inside its segment."""
    format = segment.format
    group = index // format.group_size if format.group_size > 0 else 0
    scale, row_scale, zero = scales
    one = scale[:, group : group + 1]
    one_zero = None if zero is None else zero[:, group : group + 1]
    codes = encode(column, format, one, row_scale, one_zero)
    part = QuantizedSegment(Segment(0, 1, format), codes, one, row_scale, one_zero)
    return codes[:, 0], dequantize(QuantizedWeight((column.shape[0], 1), (part,)))[:, 0]
