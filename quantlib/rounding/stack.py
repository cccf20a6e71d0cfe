"""Quantized weights one above the other: rows of several matrices as one, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight
from quantlib.formats.weight_format import TENSOR


def concatenate(chunks: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of `chunks` one above the other: row ranges of one matrix, or experts of a stack.

    Raises RoundingError when they are of different formats, or when a format has one scale for the
    whole tensor, which parts that were rounded alone do not share.
    """
    if not chunks:
        raise RoundingError("there is nothing to concatenate: pass at least one quantized weight")
    if len(chunks) == 1:
        return chunks[0]
    layouts = {tuple(part.segment for part in chunk.segments) for chunk in chunks}
    if len(layouts) > 1:
        raise RoundingError("quantized weights of different formats cannot be one weight")
    segments = []
    for parts in zip(*(chunk.segments for chunk in chunks), strict=True):
        format = parts[0].segment.format
        if format.group_size == TENSOR or format.scale == "e4m3":
            raise RoundingError(
                f"{format} has one scale for a whole tensor, so experts cannot be rounded to it "
                "one by one: use a format with scales per channel or group, such as w4g32 or mxfp4"
            )
        segments.append(
            QuantizedSegment(
                parts[0].segment,
                torch.cat([part.codes for part in parts]),
                torch.cat([part.scale for part in parts]),
                _joined([part.row_scale for part in parts]),
                _joined([part.zero for part in parts]),
            )
        )
    rows = sum(chunk.shape[0] for chunk in chunks)
    return QuantizedWeight((rows, chunks[0].shape[1]), tuple(segments))


def rows_of(weight: QuantizedWeight, first: int, last: int) -> QuantizedWeight:
    """Rows `first` .. `last - 1`, in memory of their own unless they are all; not for formats with
    one scale for a whole tensor."""
    if (first, last) == (0, weight.shape[0]):
        return weight
    return select_rows(weight, torch.arange(first, last))


def select_rows(weight: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    """The rows int64 [R], in their order and in memory of their own; as `rows_of`."""
    segments = tuple(
        QuantizedSegment(
            part.segment,
            part.codes[rows],
            part.scale[rows],
            None if part.row_scale is None else part.row_scale[rows],
            None if part.zero is None else part.zero[rows],
        )
        for part in weight.segments
    )
    return QuantizedWeight((len(rows), weight.shape[1]), segments)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors one above the other; None when the format has none."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
