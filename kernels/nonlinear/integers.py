"""Integers on a grid, and what all methods do with them.

Values are int64 tensors, and the arithmetic on them is that of integers alone: no float is made
from a value. Scales are Python floats that belong to a layer and are known before it runs; what
depends on them alone (a polynomial's coefficients, how far to shift) is computed from floats, once.
int64 is room for the reference: where a method is built for 32 bits, its intermediates fit those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FINEST = 2.0**-14
"""The smallest scale of an input: with a finer one the polynomials of I-BERT leave 32 bits."""


@dataclass(frozen=True)
class Integers:
    """values: int64 [...]. scale: what one step is worth; below 0 where a method has it so."""

    values: Tensor
    scale: float

    def floats(self) -> Tensor:
        """The numbers, float32."""
        return (self.values.double() * self.scale).float()


def grid_scale(largest: float, bits: int) -> float:
    """The scale of a symmetric grid of so many bits that reaches `largest`."""
    return max(largest / levels(bits), FINEST)


def levels(bits: int) -> int:
    """The largest code of a symmetric grid."""
    return (1 << (bits - 1)) - 1


def to_integers(x: Tensor, scale: float, bits: int) -> Integers:
    """x on a symmetric grid, rounded to the nearest and clipped; NaN becomes 0, as integers have
    none."""
    codes = (x.double() / scale).nan_to_num(0.0).round()
    return Integers(codes.clamp(-levels(bits), levels(bits)).long(), scale)


def bit_length(values: Tensor) -> Tensor:
    """Bits of values >= 0, as int.bit_length: 0 for 0. int64 of the same shape.

    The exponent of a float64 is exact below 2^53, and so are its even halves above.
    """
    high = values >> 31
    low_bits = torch.frexp(values.double())[1].long()
    high_bits = torch.frexp(high.double())[1].long() + 31
    return torch.where(high > 0, high_bits, low_bits)


def divide(numerator: Tensor, denominator: Tensor | int) -> Tensor:
    """The floor of a quotient of integers."""
    return torch.div(numerator, denominator, rounding_mode="floor")


def shift(values: Tensor, bits: Tensor) -> Tensor:
    """values * 2^bits, the floor of it: left for bits above 0, right for those below."""
    left = values << bits.clamp(min=0)
    return left >> (-bits).clamp(0, 62)


def square_root(values: Tensor) -> Tensor:
    """The floor of the square root of values >= 0, by Newton's iteration from above until it no
    longer falls (I-BERT, algorithm 4)."""
    root = torch.ones_like(values) << ((bit_length(values) + 1) // 2)
    while True:
        following = (root + divide(values, root.clamp(min=1))) >> 1
        if not bool((following < root).any()):
            return root
        root = torch.minimum(root, following)


def centred(values: Tensor) -> Tensor:
    """values [..., n] less their mean, which is rounded to a whole number (halves up)."""
    count = values.shape[-1]
    total = values.sum(-1, keepdim=True)
    return values - divide(2 * total + count, 2 * count)


def squares_in_32_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of squares of values [..., n] shifted right until it surely fits 32 bits.

    Returns (sum [..., 1], bits shifted [..., 1]): I-BERT's guard against overflow, from the largest
    value of the row.
    """
    largest = bit_length(values.abs().amax(-1, keepdim=True))
    room = (32 - math.ceil(math.log2(values.shape[-1]))) // 2
    bits = (largest - room).clamp(min=0)
    return ((values >> bits) ** 2).sum(-1, keepdim=True), bits
