"""The two sweeps over the columns of a weight: GPTQ's error compensation, then coordinate descent.

Both minimise tr((W - Q) H (W - Q)^T) over grid points Q, all rows independently. GPTQ
(arXiv:2210.17323) fixes each column once and lets the later ones absorb its error. Coordinate
descent then revisits every column with all the others fixed, and each group's scale and zero point
with its codes fixed. Each of these steps is the exact minimum over its own stored values, the old
one included, so no pass raises the objective.

Everything is transposed: W and Q are [K, R], so a column of the weight is contiguous. Sums over
columns are matrix products, not `sum(0)`, whose order of additions changes with the position of a
row: a row is rounded alike whatever stands beside it (see `integer.ROW_TILE`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.rounding.grid import LARGEST_SCALE, RowGrid

SUB_BLOCK = 128
"""Columns whose updates are gathered before one matrix product carries them to the rest."""


@dataclass(frozen=True)
class Span:
    """Columns `start .. stop` of one segment, with its own grid and group size (the last group may
    be shorter)."""

    start: int
    stop: int
    group_size: int
    grid: RowGrid

    def groups(self) -> list[tuple[int, int]]:
        """(first, last + 1) column of each group."""
        first = range(self.start, self.stop, self.group_size)
        return [(k, min(k + self.group_size, self.stop)) for k in first]


@dataclass
class SpanState:
    """What rounding decided for a span: effective scale and zero point [G, R], row_scale [R]."""

    scale: Tensor
    zero: Tensor
    row_scale: Tensor


def gptq_sweep(weight: Tensor, factor: Tensor, spans: list[Span]) -> tuple[Tensor, list[SpanState]]:
    """Round `weight` [K, R] (overwritten) column by column, compensating along `factor` = U [K, K].

    A group's scale and zero point are searched when the sweep reaches it, on weights that already
    carry the compensation of all columns before. Returns the dequantized result [K, R] and each
    span's scales.
    """
    columns = weight.shape[0]
    importance = factor.diagonal() ** -2
    result = torch.empty_like(weight)
    states = []
    for span in spans:
        row_scale = span.grid.row_scale(weight[span.start : span.stop], span.group_size)
        scales, zeros = [], []
        for first, last in span.groups():
            scale, zero = span.grid.search(weight[first:last], importance[first:last], row_scale)
            scales.append(scale)
            zeros.append(zero)
            for k0 in range(first, last, SUB_BLOCK):
                k1 = min(k0 + SUB_BLOCK, last)
                block, local = weight[k0:k1], factor[k0:k1, k0:k1]
                errors = _gptq_block(block, result[k0:k1], local, span.grid, scale, zero)
                if k1 < columns:
                    weight[k1:].addmm_(factor[k0:k1, k1:].T, errors, alpha=-1)
        states.append(SpanState(torch.stack(scales), torch.stack(zeros), row_scale))
    return result, states


def _gptq_block(
    block: Tensor, result: Tensor, factor: Tensor, grid: RowGrid, scale: Tensor, zero: Tensor
) -> Tensor:
    """Round the columns of `block` [B, R] in place into `result`; returns the scaled errors."""
    errors = torch.empty_like(block)
    inverse_scale = 1 / scale
    inverse_diagonal = (1 / factor.diagonal()).tolist()
    for j, column in enumerate(block):
        torch.mul(grid.round(column, inverse_scale, zero).sub_(zero), scale, out=result[j])
        torch.sub(column, result[j], out=errors[j]).mul_(inverse_diagonal[j])
        if j + 1 < block.shape[0]:
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return errors


def descend(
    weight: Tensor, result: Tensor, hessian: Tensor, spans: list[Span], states: list[SpanState]
) -> None:
    """One pass of coordinate descent over codes, scales and zero points.

    weight: [K, R], the target; `result` [K, R] and `states` change in place.
    """
    columns = weight.shape[0]
    gradient = hessian @ (weight - result)
    for span, state in zip(spans, states, strict=True):
        for index, (first, last) in enumerate(span.groups()):
            before = result[first:last].clone()
            local = gradient[first:last].clone()
            block = hessian[first:last, first:last]
            scale, zero = _line_search(result[first:last], local, block, span.grid, state, index)
            state.scale[index], state.zero[index] = scale, zero
            _descend_block(result[first:last], local, block, span.grid, scale, zero)
            if last < columns:
                change = result[first:last] - before
                gradient[last:].addmm_(hessian[first:last, last:].T, change, alpha=-1)


def _line_search(
    result: Tensor, gradient: Tensor, hessian: Tensor, grid: RowGrid, state: SpanState, index: int
) -> tuple[Tensor, Tensor]:
    """Best stored scale, then best stored zero point, of one group with its codes fixed.

    result, gradient: [g, R], updated in place to the new scale and zero point; gradient is
    H (W - Q). The objective is a parabola in either, so the stored value nearest to its vertex is
    never worse than the old one, which is stored too.
    """
    scale, zero = state.scale[index], state.zero[index]
    ones = torch.ones(result.shape[0])
    steps = result / scale
    pull = hessian @ steps
    vertex = scale + (ones @ (steps * gradient)) / (ones @ (steps * pull)).clamp_(min=1e-30)
    # Half and double: far enough for any good step, near enough that codes keep their meaning.
    vertex = torch.minimum(torch.maximum(vertex, scale / 2), scale * 2).clamp_(max=LARGEST_SCALE)
    new_scale = grid.stored_scale(vertex, state.row_scale)
    gradient.sub_(pull.mul_(new_scale - scale))
    rows = hessian.sum(1)
    shift = (ones @ gradient) / (rows.sum() * new_scale)
    new_zero = grid.stored_zero(zero - shift)
    gradient.addr_(rows, (new_zero - zero) * new_scale)
    torch.mul(steps.add_(zero - new_zero), new_scale, out=result)
    return new_scale, new_zero


def _descend_block(
    result: Tensor, gradient: Tensor, hessian: Tensor, grid: RowGrid, scale: Tensor, zero: Tensor
) -> None:
    """Re-round each column of a group to the best code given all others; `result` and `gradient`
    [g, R] in place."""
    inverse_scale = 1 / scale
    inverse_diagonal = (1 / hessian.diagonal()).tolist()
    for j in range(result.shape[0]):
        target = torch.add(result[j], gradient[j], alpha=inverse_diagonal[j])
        value = grid.round(target, inverse_scale, zero).sub_(zero).mul_(scale)
        change = value - result[j]
        result[j] = value
        if j + 1 < result.shape[0]:
            gradient[j + 1 :].addr_(hessian[j, j + 1 :], change, alpha=-1)
