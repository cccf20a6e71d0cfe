"""Integer grids for many rows at once, each with its own width of codes, scales and zero points.

The rounding sweeps work on transposed matrices [K, R]: a column of the weight is one contiguous
vector over R rows, and R stacks every output row of every candidate scheme, so that one pass over
the columns rounds a weight to all of its candidates. `RowGrid` holds what differs between rows as
vectors [R]; all methods are elementwise over rows.

A grid knows scales and zero points only as they are stored. `stored_scale` and `stored_zero` give,
bit for bit, what `formats.weight` will read back from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.formats.weight import E8M0_BIAS
from quantlib.formats.weight_format import WeightFormat

CLIPS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5)
"""Fractions of a group's range that the scale search tries."""
SMALLEST_SCALE = 2.0**-24
"""The smallest float16: an ideal scale below it (an all-zero group) is raised to it."""
LARGEST_SCALE = 65504.0
"""The largest float16."""
POWER_ABOVE = 1.5
"""A number times this is nearest to the least power of two that is not below the number."""


@dataclass(frozen=True)
class RowGrid:
    """Per-row constants, float32 [R].

    top:       the largest code.
    zero_top:  the largest stored zero point; 0 for symmetric rows, where zero is (top + 1) / 2.
    scale_top: the largest stored scale code; 0 for rows with float16 scales or powers of two.
    powers:    whether a row's scales are powers of two; None: no row's are.
    """

    top: Tensor
    zero_top: Tensor
    scale_top: Tensor
    powers: Tensor | None = None

    @staticmethod
    def build(formats: Sequence[WeightFormat], rows: int) -> RowGrid:
        """`rows` rows of each format, in order."""

        def spread(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).repeat_interleave(rows)

        shared = [f.shares_exponent for f in formats]

        return RowGrid(
            spread([(1 << f.bits) - 1 for f in formats]),
            spread([0 if f.symmetric else (1 << f.zero_bits) - 1 for f in formats]),
            spread([(1 << f.scale_bits) - 1 if f.two_level else 0 for f in formats]),
            torch.tensor(shared).repeat_interleave(rows) if any(shared) else None,
        )

    def extremes(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high) [R] of weights [g, R]: both include 0, and symmetric rows reach as far up as
        down."""
        low, high = weights.amin(0).clamp_(max=0), weights.amax(0).clamp_(min=0)
        amax = torch.maximum(high, -low)
        symmetric = self.zero_top == 0
        return torch.where(symmetric, -amax, low), torch.where(symmetric, amax, high)

    def row_scale(self, weights: Tensor, group_size: int) -> Tensor:
        """What two-level codes are relative to: the largest ideal scale [R] over the groups of
        weights [K, R], in float16; inf when float16 cannot hold it."""
        largest = torch.full((weights.shape[1],), SMALLEST_SCALE)
        for block in weights.split(group_size):
            low, high = self.extremes(block)
            largest = torch.maximum(largest, (high - low) / self.top)
        return largest.half().float()

    def scale_codes(self, scale: Tensor, row_scale: Tensor) -> Tensor:
        """Nearest stored scale codes (at least 1); meaningless for rows with float16 scales."""
        codes = (scale / row_scale * self.scale_top).round_().clamp_(min=1)
        return torch.minimum(codes, self.scale_top)

    def stored_scale(self, scale: Tensor, row_scale: Tensor) -> Tensor:
        """The effective scale after storing `scale` [R]: two-level below `row_scale`, float16 (inf
        beyond its range), or the nearest power of two."""
        levels = row_scale * (self.scale_codes(scale, row_scale) / self.scale_top.clamp(min=1))
        halves = scale.half().float().clamp_(min=SMALLEST_SCALE)
        stored = torch.where(self.scale_top > 0, levels, halves)
        return stored if self.powers is None else torch.where(self.powers, _power(scale), stored)

    def zero_codes(self, zero: Tensor) -> Tensor:
        """Nearest stored zero point codes; meaningless for symmetric rows."""
        codes = (zero / self.top * self.zero_top).round_().clamp_(min=0)
        return torch.minimum(codes, self.zero_top)

    def stored_zero(self, zero: Tensor) -> Tensor:
        """The effective zero point, in codes, after storing `zero` [R]."""
        steps = self.zero_codes(zero) * (self.top / self.zero_top.clamp(min=1))
        return torch.where(self.zero_top > 0, steps, (self.top + 1) / 2)

    def round(self, value: Tensor, inverse_scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes of one column [R], as float32; ties to even, saturating."""
        codes = torch.addcmul(zero, value, inverse_scale).round_().clamp_(min=0)
        return torch.minimum(codes, self.top, out=codes)

    def search(
        self, weights: Tensor, importance: Tensor, row_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Stored (scale, zero) [R] of the group `weights` [g, R] with the least squared error,
        weighted by `importance` [g]: what an error in each input costs (GPTQ's 1 / U_kk^2).

        A scale of inf marks a row that no stored scale can hold.
        """
        low, high = self.extremes(weights)
        best_error, best_scale = torch.full_like(low, torch.inf), torch.full_like(low, torch.inf)
        best_zero = torch.zeros_like(low)
        span = high - low
        if self.powers is not None:
            # To the power above, not the nearest: with the clips below, both neighbours are tried.
            span = torch.where(self.powers, span * POWER_ABOVE, span)
        for clip in CLIPS:
            scale = self.stored_scale(span * (clip / self.top), row_scale)
            zero = self.stored_zero(low * -clip / scale)
            codes = torch.addcmul(zero, weights, 1 / scale).round_().clamp_(min=0)
            residual = torch.minimum(codes, self.top).sub_(zero).mul_(scale).sub_(weights)
            error = importance @ residual.square_()
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        return best_scale, best_zero


def exponents(scale: Tensor) -> Tensor:
    """The e8m0 codes of scales that are powers of two, uint8 of the same shape."""
    return (torch.frexp(scale).exponent - 1 + E8M0_BIAS).to(torch.uint8)


def _power(scale: Tensor) -> Tensor:
    """The power of two nearest to each scale, not below SMALLEST_SCALE; what is not finite stays
    so."""
    mantissa, exponent = torch.frexp(scale.clamp(min=SMALLEST_SCALE))
    nearest = torch.ldexp(torch.ones_like(scale), exponent - 1 + (mantissa > 0.75).int())
    return torch.where(torch.isfinite(scale), nearest, scale)
