# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: SIM300
"""What Triton kernels share: reading codes of a tile, and turning them into operands.

BITS is a code's width, DEPTH the columns that are read at once, PARTS the runs of columns that lie
side by side in a byte of the finest plane (`layout.py`). A run has RUN = 128 / PARTS columns, and
may be read in several stretches of DEPTH. Runs that share bytes read the same addresses: of equal
loads the compiler makes one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def part_of(step, PARTS):
    """The run of columns of a step, in bit-reversed order: those that share bytes follow each
    other."""
    return step % 2 * (PARTS // 2) + step // 2 % 2 * (PARTS // 4) + step // 4 % 2 * (PARTS // 8)


@triton.jit
def column_of(tile, step: tl.constexpr, PARTS: tl.constexpr, DEPTH: tl.constexpr):
    """The first column of a step of a tile."""
    return tile * 128 + (part_of(step, PARTS) * (128 // PARTS) + step // PARTS * DEPTH)


@triton.jit
def plane_bytes(
    codes, first, rows, row_mask, chunk: tl.constexpr, stretch: tl.constexpr, WIDTH: tl.constexpr,
    RUN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Bytes [rows, DEPTH] of a plane of WIDTH bits; `first` is where the tile begins in it."""
    at = rows * (16 * WIDTH) + chunk * RUN + stretch * DEPTH
    offsets = at[:, None] + tl.arange(0, DEPTH)[None, :]
    return tl.load(codes + first + offsets, mask=row_mask[:, None], other=0)


@triton.jit
def read_codes(
    codes, tiles, tile, row_count, rows, row_mask, step: tl.constexpr, BITS: tl.constexpr,
    PARTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Codes (uint8) [rows, DEPTH] of the columns of a step: one stretch of one run of a tile."""
    RUN: tl.constexpr = 128 // PARTS
    part: tl.constexpr = part_of(step, PARTS)
    stretch: tl.constexpr = step // PARTS
    unit = tl.cast(row_count, tl.int64) * 16  # bytes of a tile of a plane of one bit
    if BITS == 8:
        code = plane_bytes(codes, tile * unit * 8, rows, row_mask, 0, stretch, 8, RUN, DEPTH)
    if BITS >= 4 and BITS < 8:
        at = plane_bytes(
            codes, tile * unit * 4, rows, row_mask, part % (PARTS // 2), stretch, 4, RUN, DEPTH
        )
        code = (at >> (part // (PARTS // 2) * 4)) & 15
    if BITS % 4 >= 2:
        begin = (tiles * (BITS // 4 * 4) + tile * 2) * unit
        at = plane_bytes(codes, begin, rows, row_mask, part % (PARTS // 4), stretch, 2, RUN, DEPTH)
        field = (at >> (part // (PARTS // 4) * 2)) & 3
        code = code | (field << 4) if BITS >= 4 else field
    if BITS % 2 == 1:
        begin = (tiles * (BITS - 1) + tile) * unit
        at = plane_bytes(codes, begin, rows, row_mask, 0, stretch, 1, RUN, DEPTH)
        code = code | (((at >> part) & 1) << (BITS - 1))
    return code


@triton.jit
def as_operand(code, BITS: tl.constexpr, MANTISSA: tl.constexpr, COMPUTE: tl.constexpr):
    """Codes (uint8) as exact numbers of COMPUTE.

    MANTISSA < 0: integers, less half their range, 2^(BITS-1). Else floats with so many bits of
    mantissa: 8-bit ones as they are, if COMPUTE is of their kind; otherwise read as float16 with
    their own exponent, `layout.element_unit` times too small. Integers become floats by their
    bits: a code in the low mantissa bits of 1024 (bfloat16: 128) is 1024 + code, and the
    subtraction is exact.
    """
    if COMPUTE == tl.float8e4nv or COMPUTE == tl.float8e5:
        value = code.to(COMPUTE, bitcast=True)
    elif MANTISSA >= 0:
        wide = code.to(tl.uint16)
        sign = (wide >> (BITS - 1)) << 15
        bits = sign | ((wide & ((1 << (BITS - 1)) - 1)) << (10 - MANTISSA))
        value = bits.to(tl.float16, bitcast=True).to(COMPUTE)
    elif COMPUTE == tl.int8:
        if BITS == 8:
            value = (code ^ 128).to(tl.int8, bitcast=True)
        else:
            value = code.to(tl.int8, bitcast=True) - (1 << (BITS - 1))
    elif COMPUTE == tl.float16:
        bits = code.to(tl.uint16) | 0x6400
        value = bits.to(tl.float16, bitcast=True) - (1024.0 + (1 << (BITS - 1)))
    elif COMPUTE == tl.bfloat16 and BITS < 8:
        bits = code.to(tl.uint16) | 0x4300
        value = bits.to(tl.bfloat16, bitcast=True) - (128.0 + (1 << (BITS - 1)))
    else:
        value = (code.to(tl.float32) - (1 << (BITS - 1))).to(COMPUTE)
    return value


@triton.jit
def group_scale(scale, group, stride, rows, row_mask, E8M0: tl.constexpr):
    """Scales [rows] of a group, float32; padding rows and columns have 0."""
    stored = tl.load(scale + group * stride + rows, mask=row_mask, other=0)
    if E8M0:
        exponent = stored.to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)  # 2^-127 is subnormal
        value = bits.to(tl.float32, bitcast=True)
    else:
        value = stored.to(tl.float32)
    return value
