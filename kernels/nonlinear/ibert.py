"""I-BERT (Kim et al., ICML 2021, arXiv 2101.01321): polynomials of second order in integers.

A polynomial a (x + b)^2 + c of x = S q is a S^2 ((q + q_b)^2 + q_c) with whole q_b and q_c, known
before q is. The exponential is one on (-ln 2, 0] and a shift, the error function one with its sign
put aside, and the square root under a LayerNorm is Newton's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantlib.kernels.nonlinear.integers import (
    Integers,
    centred,
    divide,
    shift,
    square_root,
    squares_in_32_bits,
)

EXPONENTIAL = (0.3585, 1.353, 0.344)
"""exp on (-ln 2, 0], within 1.9e-3 (section 3.5)."""
ERROR_FUNCTION = (-0.2888, -1.769, 1.0)
"""erf of |x|, clipped at 1.769; the GELU of it lies within 0.018 of the true one (section 3.4)."""
_MULTIPLIED_BITS = 16
"""Of what a product of two 16-bit numbers takes in: longer intermediates are shifted to this."""


def polynomial(values: Tensor, scale: float, a: float, b: float, c: float) -> Integers:
    """a (x + b)^2 + c of x = scale * values (algorithm 1)."""
    q_b, q_c = math.floor(b / scale), math.floor(c / (a * scale**2))
    return Integers((values + q_b) ** 2 + q_c, a * scale**2)


def exponential(values: Tensor, scale: float, fraction: int = 0) -> Integers:
    """exp of values <= 0, with so many fraction bits (algorithm 2): exp(p) / 2^z with values = p -
    z ln 2."""
    ln2 = max(math.floor(math.log(2) / scale), 1)
    z = divide(-values, ln2)
    at = polynomial(values + z * ln2, scale, *EXPONENTIAL)
    return Integers(shift(at.values, (fraction - z).clamp(min=-62)), at.scale * 2.0**-fraction)


def softmax(scores: Integers, bits: int, seen: Tensor | None = None) -> Integers:
    """Over the last axis; weights of `bits` bits, below 1 (section 3.5).

    seen: bool, broadcast: scores that count. A row without any has weights of 0.
    """
    values = below_largest(scores.values, seen)
    exponentials = exponential(values, scores.scale)
    excess = max(_bits_of_largest(exponentials) - _MULTIPLIED_BITS, 0)
    short = _only(exponentials.values >> excess, seen)
    reciprocal = divide(torch.full_like(short[..., :1], 1 << 32), _at_least_1(short.sum(-1, True)))
    weights = (short * reciprocal) >> (32 - bits)
    return Integers(weights.clamp(max=(1 << bits) - 1), 2.0**-bits)


def gelu(x: Integers) -> Integers:
    """x (1 + erf(x / sqrt 2)) / 2 (algorithm 3)."""
    scale = x.scale / math.sqrt(2)
    _, b, _ = ERROR_FUNCTION
    clipped = x.values.abs().clamp(max=-math.floor(b / scale))
    erf = polynomial(clipped, scale, *ERROR_FUNCTION)
    excess = max(_bits_of_largest(erf) - _MULTIPLIED_BITS, 0)
    signed, step = x.values.sign() * (erf.values >> excess), erf.scale * 2**excess
    return Integers(x.values * (signed + math.floor(1 / step)), x.scale * step / 2)


def layer_norm(x: Integers) -> Integers:
    """(x - mean) / standard deviation over the last axis (section 3.6).

    Gains and biases belong to the rounding that follows: they are a scale and a shift per channel.
    """
    values = centred(x.values)
    squares, shifted = squares_in_32_bits(values)
    return normalized(values, square_root(squares) << shifted)


def normalized(values: Tensor, length: Tensor) -> Integers:
    """values [..., n] over `length` [..., 1], the root of the sum of their squares, times sqrt n;
    with a reciprocal of 31 bits."""
    reciprocal = divide(torch.full_like(length, (1 << 31) - 1), _at_least_1(length))
    return Integers((values * reciprocal) >> 1, math.sqrt(values.shape[-1]) * 2.0**-30)


def below_largest(values: Tensor, seen: Tensor | None) -> Tensor:
    """Scores less the largest of their row that counts; 0 for the others."""
    if seen is None:
        return values - values.amax(-1, keepdim=True)
    lowest = torch.iinfo(torch.int64).min >> 1
    largest = torch.where(seen, values, lowest).amax(-1, keepdim=True)
    return torch.where(seen, values - largest, 0)


def _only(values: Tensor, seen: Tensor | None) -> Tensor:
    return values if seen is None else torch.where(seen, values, 0)


def _at_least_1(values: Tensor) -> Tensor:
    return values.clamp(min=1)


def _bits_of_largest(x: Integers) -> int:
    """Bits of the code of 1, the largest that an exponential or an error function can be."""
    return max(math.ceil(abs(1 / x.scale)), 1).bit_length()
