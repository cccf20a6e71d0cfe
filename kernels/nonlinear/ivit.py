"""I-ViT (Li and Gu, ICCV 2023, arXiv 2207.01405): shifts in place of multiplications.

exp(x) = 2^(x log2 e), log2 e ~ 1 + 1/2 - 1/16, and 2^f ~ 1 + f/2 on (-1, 0]: a sum of shifted
copies and one more shift. A sigmoid is a quotient of two such, and x sigmoid(1.702 x) stands for
GELU; 1.702 is part of the scale, as in the authors' code (the paper also writes it as shifts).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantlib.kernels.nonlinear.ibert import below_largest, normalized
from quantlib.kernels.nonlinear.integers import (
    Integers,
    centred,
    divide,
    shift,
    squares_in_32_bits,
)

SIGMOID_OF_GELU = 1.702
SOFTMAX_SHIFT, GELU_SHIFT = 15, 23
"""Fraction bits of exponentials (section 3.3 and 3.4), fewer where finer grids need the room."""
ITERATIONS = 10
"""Of the square root, from 2^16 (section 3.5): 1 iteration halves what is far too large."""
_LARGEST = (1 << 31) - 1


def exponential(values: Tensor, scale: float, fraction: int) -> Tensor:
    """exp of values <= 0, of which one step is scale * 2^-fraction (ShiftExp, algorithm 1)."""
    one = -math.floor(-1 / scale)
    power = values + (values >> 1) - (values >> 4)
    power = power.clamp(min=-(fraction + one.bit_length()) * one)  # nothing is left beyond
    whole = divide(-power, one)
    rest = power + whole * one
    return shift((rest >> 1) + one, fraction - whole)


def softmax(scores: Integers, bits: int, seen: Tensor | None = None) -> Integers:
    """Over the last axis; weights of `bits` bits with a sign (Shiftmax, algorithm 1).

    seen: bool, broadcast: scores that count. A row without any has weights of 0.
    """
    fraction = _fraction(SOFTMAX_SHIFT, scores.scale, scores.values.shape[-1], bits)
    values = exponential(below_largest(scores.values, seen), scores.scale, fraction)
    values = values if seen is None else torch.where(seen, values, 0)
    return _quotient(values, values.sum(-1, keepdim=True), bits)


def gelu(x: Integers, bits: int) -> Integers:
    """x sigmoid(1.702 x), the sigmoid in `bits` bits with a sign (ShiftGELU, algorithm 2).

    Both exponentials are taken relative to the row's largest value (or 0), so a row's result
    depends on its outliers: values of about 9 crush the others to 0, as in the method.
    """
    scale = SIGMOID_OF_GELU * x.scale
    fraction = _fraction(GELU_SHIFT, scale, 2, bits)
    largest = x.values.amax(-1, keepdim=True).clamp(min=0)
    above = exponential(x.values - largest, scale, fraction)
    sigmoid = _quotient(above, above + exponential(-largest, scale, fraction), bits)
    return Integers(x.values * sigmoid.values, x.scale * sigmoid.scale)


def layer_norm(x: Integers) -> Integers:
    """(x - mean) / standard deviation over the last axis (I-LayerNorm, section 3.5).

    As I-BERT's, with a fixed number of iterations for the square root; gains and biases belong to
    the rounding that follows.
    """
    values = centred(x.values)
    squares, shifted = squares_in_32_bits(values)
    root = torch.full_like(squares, 1 << 16)
    for _ in range(ITERATIONS):
        root = (root + divide(squares, root.clamp(min=1))) >> 1
    return normalized(values, root << shifted)


def _quotient(part: Tensor, whole: Tensor, bits: int) -> Integers:
    """part / whole in `bits` bits with a sign, by a reciprocal of 31 bits (IntDiv)."""
    whole = whole.clamp(1, _LARGEST)
    product = part * divide(torch.full_like(whole, _LARGEST), whole)
    codes = product >> (31 - bits + 1)
    return Integers(codes.clamp(max=(1 << (bits - 1)) - 1), 2.0 ** -(bits - 1))


def _fraction(wanted: int, scale: float, terms: int, bits: int) -> int:
    """Fraction bits so that the sum of so many exponentials fits 31 bits, and the reciprocal of one
    of them still has as many bits as the quotient."""
    one = math.ceil(1 / scale).bit_length()
    return max(min(wanted, 31 - one - max(bits, math.ceil(math.log2(terms)))), 0)
