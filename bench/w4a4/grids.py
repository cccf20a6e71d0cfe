"""Rounding of tokens as the papers define it: min-max grids, one per token and slice of columns.

Deliberately apart from `quantlib.formats.activation`: a baseline keeps its own arithmetic, with
8-bit asymmetric slices and groups of 8 columns that no integer kernel of ours would run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_BITS = 16
"""Bits of a scale (and of a zero point) that is kept with its codes, as in a KV cache."""


@dataclass(frozen=True)
class Grid:
    """How `columns` consecutive numbers of a token are rounded (ResQ, equation 1).

    bits:      16: not at all.
    symmetric: s = clip max|x| / (2^(b-1) - 1); else s = (hi - lo) / (2^b - 1) with lo = clip
               min(x, 0), hi = clip max(x, 0), and an integer zero point.
    group:     columns that share a scale; 0: all of them. It divides `columns`.
    """

    columns: int
    bits: int
    symmetric: bool = False
    clip: float = 1.0
    group: int = 0

    @property
    def scales(self) -> int:
        """Scales per token."""
        return 0 if self.bits >= 16 else self.columns // (self.group or self.columns)

    @property
    def code_bits(self) -> int:
        """Bits of a token's codes."""
        return self.columns * self.bits

    @property
    def true_bits(self) -> int:
        """Codes, scales, and zero points (as wide as a code)."""
        zero = 0 if self.symmetric else self.bits
        return self.code_bits + self.scales * (SCALE_BITS + zero)


Grids = tuple[Grid, ...]


def round_tokens(x: Tensor, grids: Sequence[Grid]) -> Tensor:
    """x [..., K], rounded slice by slice and given back as numbers of the same dtype.

    The slices cover K in order. Raises ValueError when they do not.
    """
    if sum(grid.columns for grid in grids) != x.shape[-1]:
        raise ValueError(f"grids of {[g.columns for g in grids]} columns on {x.shape[-1]}")
    if len(grids) == 1:
        return _round(x, grids[0])
    parts = x.split([grid.columns for grid in grids], dim=-1)
    return torch.cat([_round(part, grid) for part, grid in zip(parts, grids, strict=True)], dim=-1)


def _round(x: Tensor, grid: Grid) -> Tensor:
    if grid.bits >= 16:
        return x
    rows = x.unflatten(-1, (-1, grid.group or grid.columns))
    if grid.symmetric:
        top = (1 << (grid.bits - 1)) - 1
        scale = _safe(rows.abs().amax(-1, keepdim=True) * (grid.clip / top))
        codes = (rows / scale).round_().clamp_(-top, top)
        return codes.mul_(scale).flatten(-2)
    levels = (1 << grid.bits) - 1
    low = rows.amin(-1, keepdim=True).clamp_(max=0) * grid.clip
    high = rows.amax(-1, keepdim=True).clamp_(min=0) * grid.clip
    scale = _safe((high - low) / levels)
    zero = (-low / scale).round_()
    codes = (rows / scale).round_().add_(zero).clamp_(0, levels)
    return codes.sub_(zero).mul_(scale).flatten(-2)


def _safe(scale: Tensor) -> Tensor:
    """A token of zeros has any scale."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
