# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: SIM300
"""The product of inputs and one segment of a weight: integers of 2 to 8 bits, or small floats.

    out[m, n] = factor[n] * sum over groups g of scale[g, n] * x_scale[m, h] *
                  sum over k in g of (code[n, k] - zero[g, n]) * x[m, k]          (+ bias[n])

Inputs are numbers (x_scale is then 1), or codes of 8 bits with a scale for each token and group h
of columns: int8, or floats, which meet weights of the same kind as they are. The weight is the left
operand: its rows fill the 64 rows that Hopper's products want, and the tokens, few of them, are the
columns. Operands are exact (`device.as_operand`): codes less half their range, and inputs as they
are. Scales and zero points meet the sums, not the operands: for few tokens that is less work, and
nothing is rounded to 16 bits. A zero point needs the sum of the inputs of its group, taken along.

Sums of int8 codes are int32. Where a stretch has fewer than the 32 columns that integer tensor
cores want, the same integers are multiplied as float16, with sums below 2^24: exact as well.

With several segments or splits along K each launch writes float32 partial sums, and `add_parts`
adds them in one order: results do not depend on who is early. No launch allocates or waits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantlib.kernels.triton import plan
from quantlib.kernels.triton.device import as_operand, column_of, group_scale, read_codes

AT_END, EACH_TILE = tl.constexpr(plan.AT_END), tl.constexpr(plan.EACH_TILE)
EACH_STRETCH = tl.constexpr(plan.EACH_STRETCH)
"""When sums are scaled."""


@triton.jit
def scaled(
    sums, input_sums, scale, zero, x_scale, x_group, group, stretch, row_count, rows, row_mask,
    tokens, token_mask, x_scales, zero_step, BITS: tl.constexpr, SCALED: tl.constexpr,
    ZEROS: tl.constexpr, E8M0: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """Sums [rows, tokens] of one group and its inputs' sums [tokens], made float32 numbers."""
    value = sums.to(tl.float32)
    if ZEROS:
        stored = tl.load(zero + group * row_count + rows, mask=row_mask, other=0)
        offset = (1 << (BITS - 1)) - stored.to(tl.float32) * zero_step
        value += offset[:, None] * input_sums.to(tl.float32)[None, :]
    if SCALED:
        value *= group_scale(scale, group, row_count, rows, row_mask, E8M0)[:, None]
    if CODED:
        own = tl.load(x_group + stretch)
        value *= tl.load(x_scale + tokens * x_scales + own, mask=token_mask, other=0.0)[None, :]
    return value


@triton.jit(do_not_specialize=["token_count"])
def multiply(
    x, x_scale, x_group, codes, scale, zero, factor, bias, out,
    token_count, row_count, columns, start, x_stride, x_scales, tiles, split_tiles, zero_step,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, PARTS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, FLUSH: tl.constexpr, SCALED: tl.constexpr, ZEROS: tl.constexpr,
    E8M0: tl.constexpr, CODED: tl.constexpr, COMPUTE: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One segment, tokens [M, K] by a weight [N, K]. Program (block of rows, of tokens, split).

    x:        [M, x_stride], the segment from column `start` on; COMPUTE, or codes (CODED): int8, or
              the bits of floats, uint8.
    x_scale:  float32 [M, x_scales]; x_group: int32, which of them each stretch of DEPTH takes.
    codes, scale, zero, factor: as `layout.SplitSegment` has them.
    out:      [splits, M, N]; with one split the result itself, in any float dtype.
    """
    EXACT: tl.constexpr = CODED and MANTISSA < 0
    FLOAT8: tl.constexpr = COMPUTE == tl.float8e4nv or COMPUTE == tl.float8e5
    SUM: tl.constexpr = tl.int32 if EXACT else tl.float32
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row_mask, token_mask = rows < row_count, tokens < token_count
    depth = tl.arange(0, DEPTH)
    split = tl.program_id(2)
    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), SUM)
    input_sums = tl.zeros((BLOCK_TOKENS,), SUM)
    for tile in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, tiles)):
        for step in tl.static_range(128 // DEPTH):
            column = column_of(tile, step, PARTS, DEPTH)
            code = read_codes(
                codes, tiles, tile, row_count, rows, row_mask, step, BITS, PARTS, DEPTH
            )
            w = as_operand(code, BITS, MANTISSA, COMPUTE)
            places = tokens[None, :] * x_stride + (start + column + depth)[:, None]
            inside = token_mask[None, :] & ((column + depth) < columns)[:, None]
            given = tl.load(x + places, mask=inside, other=0)
            if FLOAT8:
                # Hopper's own sums have fewer bits: those of 32 columns are added up in float32.
                own = given.to(COMPUTE, bitcast=True)
                sums = tl.dot(w, own, sums, max_num_imprecise_acc=32)
            elif COMPUTE == tl.int8:
                sums = tl.dot(w, given, sums, out_dtype=tl.int32)
            elif EXACT:
                sums += tl.dot(w, given.to(COMPUTE)).to(tl.int32)
            else:
                sums = tl.dot(w, given.to(COMPUTE), sums, input_precision="ieee")
            if ZEROS:
                input_sums += tl.sum(given.to(SUM), axis=0)
            if FLUSH == EACH_STRETCH:
                group = tl.minimum(column, columns - 1) // GROUP if GROUP > 0 else 0
                total += scaled(
                    sums, input_sums, scale, zero, x_scale, x_group, group, column // DEPTH,
                    row_count, rows, row_mask, tokens, token_mask, x_scales, zero_step, BITS,
                    SCALED, ZEROS, E8M0, CODED,
                )  # fmt: skip
                sums = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), SUM)
                input_sums = tl.zeros((BLOCK_TOKENS,), SUM)
        if FLUSH == EACH_TILE:
            group = tile * 128 // GROUP if GROUP > 0 else 0
            total += scaled(
                sums, input_sums, scale, zero, x_scale, x_group, group, tile * (128 // DEPTH),
                row_count, rows, row_mask, tokens, token_mask, x_scales, zero_step, BITS, SCALED,
                ZEROS, E8M0, CODED,
            )  # fmt: skip
            sums = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), SUM)
            input_sums = tl.zeros((BLOCK_TOKENS,), SUM)
    if FLUSH == AT_END:
        total = scaled(
            sums, input_sums, scale, zero, x_scale, x_group, 0, 0, row_count, rows, row_mask,
            tokens, token_mask, x_scales, zero_step, BITS, SCALED, ZEROS, E8M0, CODED,
        )  # fmt: skip
    total *= tl.load(factor + rows, mask=row_mask, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    places = (tl.cast(split, tl.int64) * token_count + tokens[None, :]) * row_count + rows[:, None]
    kept = row_mask[:, None] & token_mask[None, :]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["size"])
def add_parts(partial, bias, out, size, row_count, parts, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """partial float32 [parts, size] -> their sums in order, plus bias [row_count]: out [size]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(partial + tl.cast(part, tl.int64) * size + at, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + at % row_count, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
