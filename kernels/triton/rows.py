# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Rows of a weight as numbers: embeddings, and the dense weight for products of many tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from quantlib.kernels.triton.device import as_operand, column_of, group_scale, read_codes


@triton.jit(do_not_specialize=["count"])
def dequantize_rows(
    ids, codes, scale, zero, factor, out, first, count, row_count, columns, start, out_stride,
    tiles, zero_step, BITS: tl.constexpr, MANTISSA: tl.constexpr, PARTS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, ZEROS: tl.constexpr,
    E8M0: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows `ids` (int64 [count]), or, unless CHOSEN, `count` of them from `first` on, of one
    segment, into the columns from `start` on of out [count, out_stride]. Program (block of rows,
    tile).

    A number that is none of the rows gives nan: whoever asks cannot wait for a GPU's complaint.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.program_id(1)
    wanted = place < count
    if CHOSEN:
        rows = tl.load(ids + place, mask=wanted, other=0)
        known = (rows >= 0) & (rows < row_count)
        rows = tl.where(known, rows, 0).to(tl.int32)
    else:
        rows, known = first + place, wanted
    depth = tl.arange(0, DEPTH)
    row_factor = tl.load(factor + rows, mask=wanted, other=0.0)
    for step in tl.static_range(128 // DEPTH):
        column = column_of(tile, step, PARTS, DEPTH)
        code = read_codes(codes, tiles, tile, row_count, rows, wanted, step, BITS, PARTS, DEPTH)
        value = as_operand(code, BITS, MANTISSA, tl.float32)
        group = tl.minimum(column, columns - 1) // GROUP if GROUP > 0 else 0
        if ZEROS:
            stored = tl.load(zero + group * row_count + rows, mask=wanted, other=0)
            value = (value + (1 << (BITS - 1))) - (stored.to(tl.float32) * zero_step)[:, None]
        if SCALED:
            own = group_scale(scale, group, row_count, rows, wanted, E8M0) * row_factor
        else:
            own = row_factor
        value = tl.where(known[:, None], value * own[:, None], float("nan"))
        places = tl.cast(place, tl.int64)[:, None] * out_stride + (start + column + depth)[None, :]
        inside = wanted[:, None] & ((column + depth) < columns)[None, :]
        tl.store(out + places, value.to(out.dtype.element_ty), mask=inside)
