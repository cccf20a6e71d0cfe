# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Inputs on their way to a product: rotated by a Hadamard matrix, rounded to integers, or both in
one pass over memory.

A block's matrix is `dense (x) Sylvester / sqrt(block)` (`cpu.forms.BlockRotation`): Sylvester's
part is butterflies of additions, the dense one (12, 20, 28, ... rows of +1, -1) a small product.
Rounding is `formats.activation`'s, operation for operation, in float32: so that codes are the same
ones, compile it with contraction off (`enable_fp_fusion=False`).
"""

from __future__ import annotations

import triton
import triton.language as tl

KEEP, SYMMETRIC, ASYMMETRIC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Whether numbers stay as they are, or how they are rounded."""


@triton.jit
def butterflies(y, ROWS: tl.constexpr, POWER: tl.constexpr, LEVELS: tl.constexpr):
    """y [ROWS, POWER] times Sylvester's matrix of order POWER = 2^LEVELS."""
    for level in tl.static_range(LEVELS):
        y = butterfly(y, ROWS, POWER, 1 << level)
    return y


@triton.jit
def butterfly(y, ROWS: tl.constexpr, POWER: tl.constexpr, HALF: tl.constexpr):
    """Sums and differences of numbers that are HALF columns apart."""
    pairs = tl.reshape(y, (ROWS * POWER // (2 * HALF), 2, HALF))
    left, right = tl.split(tl.permute(pairs, (0, 2, 1)))
    pairs = tl.permute(tl.join(left + right, left - right), (0, 2, 1))
    return tl.reshape(pairs, (ROWS, POWER))


@triton.jit
def to_nearest(x):
    """Integers next to x, ties to even; |x| < 2^22, and nothing for what is beyond."""
    x = tl.minimum(tl.maximum(x, -4194304.0), 4194304.0)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quotient(x, scale):
    """x / scale, rounded once; 0 where the scale is 0 or nan."""
    usable = scale > 0
    divisor = tl.where(usable, scale, 1.0)
    return tl.where(usable, tl.math.div_rn(x, tl.broadcast_to(divisor, x.shape)), 0.0)


@triton.jit
def rounded(y, clip, LIMIT: tl.constexpr, ROUND: tl.constexpr):
    """y [groups, columns], padded with zeros -> codes (float32), and scales [groups, 1]."""
    finite = tl.max((tl.abs(y) < float("inf")).to(tl.int32) * -1 + 1, axis=1, keep_dims=True) == 0
    limit = tl.zeros_like(finite.to(tl.float32)) + LIMIT
    if ROUND == SYMMETRIC:
        reach = tl.max(tl.abs(y), axis=1, keep_dims=True) * clip
        scale = tl.where(finite, tl.math.div_rn(reach, limit), float("nan"))
        codes = to_nearest(quotient(y, scale))
        codes = tl.minimum(tl.maximum(codes, -LIMIT), LIMIT)
    else:
        low = tl.minimum(tl.min(y, axis=1, keep_dims=True), 0.0) * clip
        high = tl.maximum(tl.max(y, axis=1, keep_dims=True), 0.0) * clip
        scale = tl.where(finite, tl.math.div_rn(high - low, limit), float("nan"))
        zero = to_nearest(quotient(-low, scale))
        codes = to_nearest(quotient(y, scale)) + zero
        codes = tl.minimum(tl.maximum(codes, 0.0), LIMIT) - zero
    return codes, scale


@triton.jit
def rotate_and_round(
    x, dense, out, scales, x_stride, out_stride, scale_stride, first, first_scale, block, columns,
    dense_rows, norm, clip, DENSE: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr,
    LEVELS: tl.constexpr, ROUND: tl.constexpr, LIMIT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A block of `block` of the `columns` from `first` on. Program (token, block).

    A block is ROWS x POWER numbers, of which the first `block` are there. LEVELS 0: not rotated.
    dense: float32 [dense_rows, dense_rows].
    out:   the numbers in any float dtype, or int8 codes; then scales: float32, one for each GROUP
           columns of the block, from number `first_scale` on.
    """
    SIZE: tl.constexpr = ROWS * POWER
    token, number = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, POWER)
    place = row[:, None] * POWER + column[None, :]
    inside = (place < block) & (number * block + place < columns)
    at = first + number * block
    row_of_x = x + tl.cast(token, tl.int64) * x_stride + at
    y = tl.load(row_of_x + place, mask=inside, other=0.0).to(tl.float32)
    if LEVELS > 0:
        y = butterflies(y, ROWS, POWER, LEVELS)
    if DENSE:
        known = (row[:, None] < dense_rows) & (row[None, :] < dense_rows)
        turned = tl.load(dense + row[None, :] * dense_rows + row[:, None], mask=known, other=0.0)
        y = tl.dot(turned, y, input_precision="ieee")
    if DENSE or LEVELS > 0:
        y = tl.where(inside, y * norm, 0.0)
    row_of_out = out + tl.cast(token, tl.int64) * out_stride + at
    if ROUND == KEEP:
        tl.store(row_of_out + place, y.to(out.dtype.element_ty), mask=inside)
    else:
        codes, scale = rounded(tl.reshape(y, (SIZE // GROUP, GROUP)), clip, LIMIT, ROUND)
        codes = tl.reshape(codes, (ROWS, POWER)).to(tl.int8)
        tl.store(row_of_out + place, codes, mask=inside)
        group = tl.arange(0, SIZE // GROUP)
        places = token * scale_stride + first_scale + number * ((block + GROUP - 1) // GROUP)
        kept = (group * GROUP < block) & (number * block + group * GROUP < columns)
        tl.store(scales + places + group, tl.reshape(scale, (SIZE // GROUP,)), mask=kept)
