"""Round one linear group to many integer schemes in one go.

Members of a linear group share an input, hence a Hessian and its factor; candidate schemes differ only in per-row
constants once they agree on where groups begin. So all members in all such schemes are stacked as rows of one
problem: the column loop, which is the slow part in any array language, is paid once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats.scheme import CHANNEL, TENSOR, Segment, WeightFormat
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight
from quantlib.rounding.grid import RowGrid
from quantlib.rounding.hessian import damped, inverse_factor
from quantlib.rounding.sweep import Span, SpanState, descend, gptq_sweep

Layout = tuple[Segment, ...]


@dataclass(frozen=True)
class RoundingOptions:
    """damping: fraction of the mean diagonal added to the Hessian; passes: coordinate-descent passes after GPTQ;
    rows: most stacked rows in memory at once (bounds memory, does not change results)."""

    damping: float = 0.01
    passes: int = 3
    rows: int = 32768


def is_batchable(format: WeightFormat) -> bool:
    """Whether `round_integers` handles this format: integer codes with scales per group or channel."""
    return format.is_integer and format.group_size != TENSOR


def round_integers(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    layouts: Sequence[Layout],
    options: RoundingOptions = RoundingOptions(),
) -> dict[tuple[str, int], QuantizedWeight]:
    """GPTQ and coordinate descent for members `weights` (name -> [N, K]) under each of `layouts`.

    layouts: the K segments of each candidate; every format must satisfy `is_batchable`.
    Returns (name, index of the layout) -> QuantizedWeight. Raises RoundingError on shapes that disagree.
    """
    _check(weights, hessian, layouts)
    hessian = damped(hessian, options.damping)
    factor = inverse_factor(hessian)
    out: dict[tuple[str, int], QuantizedWeight] = {}
    for bucket in _buckets(layouts):
        for name, weight in weights.items():
            step = max(1, options.rows // len(bucket))
            chunks = [
                _round_rows(rows, hessian, factor, [layouts[i] for i in bucket], options.passes)
                for rows in weight.to(torch.float32).split(step)
            ]
            for position, index in enumerate(bucket):
                out[name, index] = concatenate([chunk[position] for chunk in chunks])
    return out


def _round_rows(
    weight: Tensor, hessian: Tensor, factor: Tensor, layouts: Sequence[Layout], passes: int
) -> list[QuantizedWeight]:
    """Round `weight` [N, K] under each layout of one bucket."""
    rows, columns = weight.shape
    spans = []
    for parts in zip(*layouts, strict=True):
        first = parts[0]
        size = first.format.group_size if first.format.group_size != CHANNEL else first.length
        grid = RowGrid.build([part.format for part in parts], rows)
        spans.append(Span(first.start, first.start + first.length, size, grid))
    target = weight.T.repeat(1, len(layouts)).contiguous()
    result, states = gptq_sweep(target.clone(), factor, spans)
    for _ in range(passes):
        descend(target, result, hessian, spans, states)
    return [
        QuantizedWeight(
            (rows, columns),
            tuple(
                _segment(part, span, state, result, slice(i * rows, (i + 1) * rows))
                for part, span, state in zip(layout, spans, states, strict=True)
            ),
        )
        for i, layout in enumerate(layouts)
    ]


def _segment(part: Segment, span: Span, state: SpanState, result: Tensor, rows: slice) -> QuantizedSegment:
    """Read the codes of rows `rows` back from the dequantized `result` [K, R] and store scales in their file form."""
    grid, format = span.grid, part.format
    codes = torch.empty(result[0, rows].shape[0], part.length, dtype=torch.uint8)
    for index, (first, last) in enumerate(span.groups()):
        steps = result[first:last, rows] / state.scale[index, rows] + state.zero[index, rows]
        codes[:, first - span.start : last - span.start] = steps.round_().T
    if format.two_level:
        scale = grid.scale_codes(state.scale, state.row_scale)[:, rows].T.to(torch.uint8).contiguous()
        row_scale = state.row_scale[rows].half()
    else:
        scale, row_scale = state.scale[:, rows].T.half().contiguous(), None
    zero = None
    if not format.symmetric:
        zero = grid.zero_codes(state.zero)[:, rows].T.to(torch.uint8).contiguous()
    return QuantizedSegment(part, codes, scale, row_scale, zero)


def concatenate(chunks: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Stack results of consecutive row ranges."""
    if len(chunks) == 1:
        return chunks[0]
    segments = []
    for parts in zip(*(chunk.segments for chunk in chunks), strict=True):
        row_scales = [part.row_scale for part in parts if part.row_scale is not None]
        zeros = [part.zero for part in parts if part.zero is not None]
        segments.append(
            QuantizedSegment(
                parts[0].segment,
                torch.cat([part.codes for part in parts]),
                torch.cat([part.scale for part in parts]),
                torch.cat(row_scales) if row_scales else None,
                torch.cat(zeros) if zeros else None,
            )
        )
    rows = sum(chunk.shape[0] for chunk in chunks)
    return QuantizedWeight((rows, chunks[0].shape[1]), tuple(segments))


def _buckets(layouts: Sequence[Layout]) -> list[list[int]]:
    """Indices of layouts whose groups begin at the same columns, in order of first appearance."""
    buckets: dict[tuple[tuple[int, int, int], ...], list[int]] = {}
    for index, layout in enumerate(layouts):
        key = tuple((part.start, part.length, part.format.group_size) for part in layout)
        buckets.setdefault(key, []).append(index)
    return list(buckets.values())


def _check(weights: Mapping[str, Tensor], hessian: Tensor, layouts: Sequence[Layout]) -> None:
    for name, weight in weights.items():
        if weight.dim() != 2 or weight.shape[1] != hessian.shape[-1]:
            raise RoundingError(
                f"{name} is {list(weight.shape)} and its Hessian {list(hessian.shape)}: the input features disagree"
            )
        if not bool(torch.isfinite(weight).all()):
            raise RoundingError(f"{name} holds inf or nan: the source model is damaged")
    for layout in layouts:
        for part in layout:
            if not is_batchable(part.format):
                raise RoundingError(f"{part.format} is not an integer format with scales per group or channel")
