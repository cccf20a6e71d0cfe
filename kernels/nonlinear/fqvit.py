"""FQ-ViT (Lin et al., IJCAI 2022, arXiv 2111.13824): LayerNorm of channels on grids of powers of
two, and softmax in logarithms.

Power-of-two factor: channel c of what a LayerNorm reads is on the grid 2^alpha_c s, alpha_c in
0..3, so that channels of very different size share 8 bits, and shifting left by alpha_c puts all on
the grid s again. Log-int-softmax: weights are kept as log2 of them, 4 bits, and multiply values by
shifting them. The method has no GELU of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantlib.kernels.nonlinear.ibert import below_largest, exponential
from quantlib.kernels.nonlinear.integers import (
    Integers,
    bit_length,
    divide,
    levels,
    shift,
    square_root,
)

LOG_BITS = 4
LARGEST_SHIFT = 3
_FRACTION = 30
"""Fraction bits of exponentials: so many halvings are told apart."""
_GAIN_BITS = 16
"""Fraction bits of gains, which are known beforehand, and of their quotient by a deviation."""
_MULTIPLIER_BITS = 8


def softmax(scores: Integers, seen: Tensor | None = None) -> Integers:
    """Over the last axis: -log2 of weights, 0..2^LOG_BITS, the last of which stands for a weight of
    0 (`from_logs`). seen: bool, broadcast: scores that count."""
    values = below_largest(scores.values, seen)
    # Sums of exponentials take more than 32 bits; their quotients do not.
    one = math.ceil(1 / exponential(values[..., :0], scores.scale).scale).bit_length()
    fraction = min(_FRACTION, 60 - one - math.ceil(math.log2(values.shape[-1])))
    codes = exponential(values, scores.scale, fraction).values.clamp(min=1)
    counted = codes if seen is None else torch.where(seen, codes, 0)
    total = counted.sum(-1, keepdim=True)
    quotient = divide(2 * total + codes, 2 * codes).clamp(max=1 << _FRACTION)
    logs = _rounded_log2(quotient.clamp(min=1)).clamp(max=1 << LOG_BITS)
    return Integers(logs if seen is None else torch.where(seen, logs, 1 << LOG_BITS), 1.0)


def from_logs(logs: Tensor) -> Tensor:
    """The weights that logarithms stand for, float32."""
    return torch.where(logs < 1 << LOG_BITS, torch.exp2(-logs.float()), 0.0)


def _rounded_log2(values: Tensor) -> Tensor:
    """log2 of values >= 1: one more than its floor from 1.5 times a power of two on."""
    floor = bit_length(values) - 1
    rest = values - (torch.ones_like(values) << floor)
    half = (torch.ones_like(values) << floor) >> 1
    return floor + ((rest >= half) & (half > 0)).long()


def to_channel_grids(x: Tensor, scale: float, shifts: Tensor, bits: int) -> Integers:
    """x [..., channels] with channel c on the grid scale * 2^shifts[c] of `bits` bits; integers on
    the grid `scale` come back."""
    steps = scale * torch.exp2(shifts.double())
    codes = (x.double() / steps).nan_to_num(0.0).round().clamp(-levels(bits), levels(bits))
    return Integers(codes.long() << shifts, scale)


def channel_shifts(x: Tensor, scale: float, bits: int) -> Tensor:
    """int64 [channels]: the shift of least squared error for each channel of rows x [rows, n]."""
    errors = torch.stack(
        [
            (to_channel_grids(x, scale, torch.full(x.shape[-1:], power), bits).floats() - x)
            .square()
            .sum(0)
            for power in range(LARGEST_SHIFT + 1)
        ]
    )
    return errors.argmin(0)


def layer_norm(x: Integers, gain: Tensor, bias: Tensor, output: float, bits: int) -> Integers:
    """LayerNorm over the last axis, on a grid of scale `output` and so many bits.

    gain, bias: float [channels], known beforehand; they become integers before a row is looked at.
    Every row's factor per channel, gain / (deviation * output), is an 8-bit number M / 2^N.
    """
    count = x.values.shape[-1]
    total = x.values.sum(-1, keepdim=True)
    deviation = square_root(count * (x.values**2).sum(-1, keepdim=True) - total**2)
    spread = count * x.values - total
    gains = (gain.double().abs() / output * 2**_GAIN_BITS).round().long()
    multiplier, power = _short(divide(gains << _GAIN_BITS, deviation.clamp(min=1)))
    sign = torch.where(gain < 0, -1, 1)
    product = sign * spread * multiplier
    # An 8-bit number times 2^power, and 2 _GAIN_BITS fraction bits; rounded to the nearest.
    half = shift(torch.ones_like(power), 2 * _GAIN_BITS - power - 1)
    codes = shift(product + half, power - 2 * _GAIN_BITS)
    codes = codes + (bias.double() / output).round().long()
    return Integers(codes.clamp(-levels(bits), levels(bits)), output)


def _short(values: Tensor) -> tuple[Tensor, Tensor]:
    """values >= 0 as their first 8 bits and a power of two."""
    power = (bit_length(values) - _MULTIPLIER_BITS).clamp(min=0)
    return values >> power, power


def output_scale(normal: Tensor, bits: int) -> float:
    """The scale of a LayerNorm's output grid, from outputs of calibration."""
    return max(float(normal.abs().max()) / levels(bits), math.ldexp(1.0, -_GAIN_BITS))
