"""Round one linear group to many integer schemes in one go.

Members of a linear group share an input, hence a Hessian and its factor; candidate schemes differ
only in per-row constants once they agree on where groups begin. So all members in all such schemes
are stacked as rows of one problem: the column loop, which is the slow part in any array language,
is paid once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight, check_segments
from quantlib.formats.weight_format import CHANNEL, TENSOR, Segment, WeightFormat
from quantlib.rounding.grid import LARGEST_SCALE, RowGrid, exponents
from quantlib.rounding.hessian import check_weight, damped, inverse_factor
from quantlib.rounding.stack import concatenate, rows_of
from quantlib.rounding.sweep import Span, SpanState, descend, gptq_sweep

Layout = tuple[Segment, ...]

ROW_TILE = 64
"""Rows are stacked in multiples of this, the rest filled with zeros: a multiple of every tile that
matrix products work in, so that a row comes out the same, to the bit, in any company."""


@dataclass(frozen=True)
class RoundingOptions:
    """How to round.

    damping: fraction of the mean diagonal added to the Hessian's diagonal.
    passes:  passes of coordinate descent after GPTQ.
    rows:    most stacked rows in memory at once (it bounds memory and changes no result).
    """

    damping: float = 0.01
    passes: int = 3
    rows: int = 32768


DEFAULTS = RoundingOptions()


def is_batchable(format: WeightFormat) -> bool:
    """Whether `round_integers` handles this format: integers with scales per group or channel,
    none of them left out."""
    return format.is_integer and format.group_size != TENSOR and not format.sparse


def round_integers(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    layouts: Sequence[Layout],
    options: RoundingOptions = DEFAULTS,
) -> dict[tuple[str, int], QuantizedWeight]:
    """GPTQ and coordinate descent for members `weights` (name -> [N, K]) under each of `layouts`.

    hessian: [K, K], second moment of the shared input.
    layouts: the K segments of each candidate; every format must satisfy `is_batchable`.
    Returns (name, index of the layout) -> QuantizedWeight. Raises RoundingError on shapes that
    disagree, inf or nan, and scales beyond float16; FormatError on segments that do not cover K.
    """
    for name, weight in weights.items():
        check_weight(name, weight, hessian)
        for layout in layouts:
            check_segments(weight.shape, layout)
    for part in (part for layout in layouts for part in layout):
        if not is_batchable(part.format):
            raise RoundingError(
                f"{part.format} is not an integer format with scales per group or channel"
            )
    hessian = damped(hessian, options.damping)
    factor = inverse_factor(hessian)
    stacked = torch.cat([weight.to(torch.float32) for weight in weights.values()])
    out: dict[tuple[str, int], QuantizedWeight] = {}
    for bucket in _buckets(layouts):
        step = max(1, options.rows // len(bucket) // ROW_TILE) * ROW_TILE
        chunks = [
            _round_rows(rows, hessian, factor, [layouts[i] for i in bucket], options.passes)
            for rows in stacked.split(step)
        ]
        for position, index in enumerate(bucket):
            rounded, first = concatenate([chunk[position] for chunk in chunks]), 0
            for name, weight in weights.items():
                out[name, index] = rows_of(rounded, first, first + len(weight))
                first += len(weight)
    return out


def _round_rows(
    weight: Tensor, hessian: Tensor, factor: Tensor, layouts: Sequence[Layout], passes: int
) -> list[QuantizedWeight]:
    """Round `weight` [N, K] under each layout of one bucket."""
    rows = len(weight)
    stride = -(-rows // ROW_TILE) * ROW_TILE
    padded = torch.nn.functional.pad(weight, (0, 0, 0, stride - rows))
    target = padded.T.repeat(1, len(layouts))
    spans = []
    for parts in zip(*layouts, strict=True):
        first = parts[0]
        size = first.format.group_size if first.format.group_size != CHANNEL else first.length
        grid = RowGrid.build([part.format for part in parts], stride)
        spans.append(Span(first.start, first.start + first.length, size, grid))
    result, states = gptq_sweep(target.clone(), factor, spans)
    _check_scales(layouts, states, stride)
    for _ in range(passes):
        descend(target, result, hessian, spans, states)
    out = []
    for i, layout in enumerate(layouts):
        own = slice(i * stride, i * stride + rows)
        decided = zip(layout, spans, states, strict=True)
        segments = tuple(_segment(part, span, state, result, own) for part, span, state in decided)
        out.append(QuantizedWeight((rows, weight.shape[1]), segments))
    return out


def _check_scales(layouts: Sequence[Layout], states: Sequence[SpanState], stride: int) -> None:
    """Raise RoundingError where `RowGrid.search` found no scale that can be stored."""
    for i, layout in enumerate(layouts):
        for part, state in zip(layout, states, strict=True):
            if not bool(torch.isfinite(state.scale[:, i * stride : (i + 1) * stride]).all()):
                raise RoundingError(
                    f"{part.format}: a scale is beyond float16's {LARGEST_SCALE:.0f}; keep this "
                    "weight in f32 or use an mx format"
                )


def _segment(
    part: Segment, span: Span, state: SpanState, result: Tensor, rows: slice
) -> QuantizedSegment:
    """Read the codes of rows `rows` back from the dequantized `result` [K, R], and store scales and
    zero points in their file form."""
    grid, format = span.grid, part.format
    codes = torch.empty(rows.stop - rows.start, part.length, dtype=torch.uint8)
    for index, (first, last) in enumerate(span.groups()):
        steps = result[first:last, rows] / state.scale[index, rows] + state.zero[index, rows]
        codes[:, first - span.start : last - span.start] = steps.round_().T
    if format.two_level:
        scale = _stored(grid.scale_codes(state.scale, state.row_scale)[:, rows], torch.uint8)
        row_scale = state.row_scale[rows].half()
    elif format.shares_exponent:
        scale, row_scale = _stored(exponents(state.scale[:, rows]), torch.uint8), None
    else:
        scale, row_scale = _stored(state.scale[:, rows], torch.float16), None
    zero = None
    if not format.symmetric:
        zero = _stored(grid.zero_codes(state.zero)[:, rows], torch.uint8)
    return QuantizedSegment(part, codes, scale, row_scale, zero)


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[G, N] of the sweep -> [N, G] of the file."""
    return values.T.to(dtype).contiguous()


def _buckets(layouts: Sequence[Layout]) -> list[list[int]]:
    """Indices of layouts whose groups begin at the same columns, in order of first appearance."""
    buckets: dict[tuple[tuple[int, int, int], ...], list[int]] = {}
    for index, layout in enumerate(layouts):
        key = tuple((part.start, part.length, part.format.group_size) for part in layout)
        buckets.setdefault(key, []).append(index)
    return list(buckets.values())
