"""SparseGPT (arXiv:2301.00774): two of every four weights of a row set to zero, the others changed
to make up for it, and rounded.

Columns are visited in order, as GPTQ does, and what a visited weight loses is passed on to later
columns. At the first column of every four each row drops the two of its four whose loss is least:
w^2 / U_kk^2, with U the factor of the inverse Hessian, is what a zero still costs after the columns
behind it have paid. Rounding is a second sweep over the original weight under the mask of the
first, with scales that are chosen for the weights that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats.rtn import encode
from quantlib.formats.sparse import AMONG, KEPT
from quantlib.formats.weight import (
    QuantizedSegment,
    QuantizedWeight,
    check_segments,
    dequantize,
)
from quantlib.formats.weight_format import Segment
from quantlib.rounding.fixed import Scales, round_column, round_fixed, search_scales
from quantlib.rounding.hessian import check_weight, damped, inverse_factor
from quantlib.rounding.sweep import SUB_BLOCK


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A rounded weight [N, K] of which two of every four columns are zero.

    rounded: all codes; those that were dropped are the code of zero.
    mask:    bool [N, K], true where a weight was kept. A kept one may have been rounded to zero.
    """

    rounded: QuantizedWeight
    mask: Tensor


def prune(
    weight: Tensor, hessian: Tensor, damping: float = 0.01, spared: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(weight float32 [N, K] with zeros, mask bool [N, K]) of `weight` under `hessian` [K, K].

    Of a last four with less than four columns two are kept, too. spared: bool [K], the columns
    behind the pruned ones, which stay as they are; None: there are none. Raises RoundingError on
    shapes that disagree, inf or nan.
    """
    factor = _factor(weight, hessian, damping)
    out = torch.zeros(weight.shape, dtype=torch.float32)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    pruned = torch.ones(weight.shape[1], dtype=torch.bool) if spared is None else ~spared
    mask[:, ~pruned] = True

    def visit(ahead: Tensor, k: int) -> Tensor:
        if k % AMONG == 0 and pruned[k]:
            end = k + int(pruned[k : k + AMONG].sum())
            mask[:, k:end] = _keep(ahead[:, : end - k], factor.diagonal()[k:end])
        out[:, k] = ahead[:, 0] * mask[:, k]
        return out[:, k]

    _sweep(weight, factor, visit)
    return out, mask


def round_sparse(
    weight: Tensor, hessian: Tensor, segments: Sequence[Segment], damping: float = 0.01
) -> SparseWeight:
    """Prune `weight` [N, K] under `hessian` [K, K] to 2:4 and round what stays to `segments`.

    Where some of the formats are sparse, only their columns are pruned; otherwise all are. Raises
    what `prune` raises, and RoundingError for a format that has no zero; FormatError on segments
    that do not cover K.
    """
    check_segments(weight.shape, segments)
    dense = [part for part in segments if not part.format.sparse]
    spared = torch.zeros(weight.shape[1], dtype=torch.bool)
    for part in dense if len(dense) < len(segments) else ():
        spared[part.start : part.start + part.length] = True
    pruned, mask = prune(weight, hessian, damping, spared)
    factor = _factor(weight, hessian, damping)
    importance = factor.diagonal() ** -2
    parts, segment_of = [], []
    for segment in segments:
        first, last = segment.start, segment.start + segment.length
        scales = search_scales(pruned[:, first:last], segment.format, importance[first:last])
        codes = _codes_of_zero(len(weight), segment, scales)
        parts.append(QuantizedSegment(segment, codes, *scales))
        segment_of += [parts[-1]] * segment.length

    def visit(ahead: Tensor, k: int) -> Tensor:
        part, kept = segment_of[k], mask[:, k]
        place = k - part.segment.start
        scales = (part.scale, part.row_scale, part.zero)
        codes, value = round_column(ahead[:, :1], part.segment, place, scales)
        part.codes[:, place] = torch.where(kept, codes, part.codes[:, place])
        return value * kept

    _sweep(weight, factor, visit)
    rows, columns = weight.shape
    return SparseWeight(QuantizedWeight((rows, columns), tuple(parts)), mask)


def round_alone(
    weight: Tensor, hessian: Tensor, segments: Sequence[Segment], damping: float = 0.01
) -> QuantizedWeight:
    """`weight` [N, K] rounded by itself, to segments of any formats: pruned where they are sparse.

    Raises what `round_sparse` and `round_fixed` raise.
    """
    if any(segment.format.sparse for segment in segments):
        return round_sparse(weight, hessian, segments, damping).rounded
    return round_fixed(weight, hessian, segments, damping)


def _sweep(weight: Tensor, factor: Tensor, visit: Callable[[Tensor, int], Tensor]) -> None:
    """Visit all columns of a copy of `weight` [N, K] in order, and pass on what each has lost.

    visit: (columns k and those that follow in its block [N, 1..SUB_BLOCK], as they are by now; k)
        -> the value float32 [N] that stands for column k from then on.
    """
    work = weight.to(torch.float32).clone()
    for k0 in range(0, work.shape[1], SUB_BLOCK):
        k1 = min(k0 + SUB_BLOCK, work.shape[1])
        block, local = work[:, k0:k1], factor[k0:k1, k0:k1]
        errors = torch.empty_like(block)
        for j in range(k1 - k0):
            errors[:, j] = (block[:, j] - visit(block[:, j:], k0 + j)) / local[j, j]
            block[:, j + 1 :].addr_(errors[:, j], local[j, j + 1 :], alpha=-1)
        work[:, k1:].addmm_(errors, factor[k0:k1, k1:], alpha=-1)


def _factor(weight: Tensor, hessian: Tensor, damping: float) -> Tensor:
    check_weight("the weight", weight, hessian)
    return inverse_factor(damped(hessian, damping))


def _keep(four: Tensor, diagonal: Tensor) -> Tensor:
    """bool [N, 4]: of four columns [N, 4], whose factor has `diagonal` [4], the two that cost most
    as zeros; or of less than four, the last ones."""
    loss = (four / diagonal).square()
    kept = loss.topk(min(KEPT, loss.shape[1]), dim=1).indices
    return torch.zeros(loss.shape, dtype=torch.bool).scatter_(1, kept, True)


def _codes_of_zero(rows: int, segment: Segment, scales: Scales) -> Tensor:
    """uint8 [N, length]: what zero is stored as. Raises RoundingError if it cannot be stored."""
    zeros = encode(torch.zeros(rows, segment.length), segment.format, *scales)
    part = QuantizedSegment(Segment(0, segment.length, segment.format), zeros, *scales)
    if bool(dequantize(QuantizedWeight((rows, segment.length), (part,))).any()):
        raise RoundingError(
            f"{segment.format} cannot store zero exactly, which 2:4 sparsity needs: use a "
            "symmetric format, or zero points of as many bits as the codes"
        )
    return zeros
