"""One new token's attention over a packed KV cache on a GPU, from outside: `src/kv_attention.cu`.

The cache is the one of `kernels/kv_cache.py`, byte for byte: keys and values of 8 or 4 bits in
groups, with a wider slice or without. Formats that are kept rotated take rotated queries and give
rotated outputs (`kv_reference.rotate`); first positions in float32 are not read here.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.kernels.kv_format import BLOCK, LANES, KvFormat, SideFormat, padded_columns

SOURCE = Path(__file__).with_name("src") / "kv_attention.cu"
NAME = "kv_attention"
THREADS, SPLIT = 256, 256
"""Positions of a block of the grid."""
MOST_HEADS = 8


def macros(form: KvFormat, head_dim: int, heads: int, dtype: torch.dtype) -> dict[str, int]:
    """What the kernel is compiled for, `heads` query heads to each KV head: names and values,
    without the prefix -D. Raises FormatError for what it does not take."""
    for side in (form.key, form.value):
        side.check(head_dim)
        if side.bits == 32 or form.sinks:
            raise FormatError(f"the kernel reads codes alone: a KV cache of {form} keeps floats")
    if head_dim % LANES or not 1 <= heads <= MOST_HEADS:
        raise FormatError(
            f"heads have a multiple of {LANES} columns here and 1 to {MOST_HEADS} share a KV head, "
            f"not {head_dim} and {heads}"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise FormatError(f"queries are float16 or bfloat16 here, not {dtype}")
    found = {
        "QL_BFLOAT": int(dtype == torch.bfloat16),
        "QL_HEADS": heads,
        "QL_COLUMNS": head_dim,
    }
    for name, side in (("K", form.key), ("V", form.value)):
        found |= _side(name, side, head_dim)
    return found


def _side(name: str, side: SideFormat, head_dim: int) -> dict[str, int]:
    rest = side.group or max(padded_columns(head_dim) - side.wide, LANES)
    return {
        f"QL_{name}_BITS": side.bits,
        f"QL_{name}_WIDE": side.wide,
        f"QL_{name}_GROUP": rest,
    }


def shared_bytes(head_dim: int, heads: int) -> int:
    """Of a block: queries, scores, their maxima and sums, outputs of the parts of a split."""
    parts = 4 if head_dim <= 64 else 2 if head_dim <= 128 else 1
    return 4 * heads * (head_dim + SPLIT + 2 + parts * head_dim)


def splits(longest: int) -> int:
    """Blocks of the grid for each sequence and KV head, for up to so many positions."""
    return -(-longest // SPLIT)


def partial_floats(head_dim: int, heads: int) -> int:
    """Of a split."""
    return heads * (head_dim + 2)


def arguments(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    output: Tensor,
    partials: Tensor,
    flags: Tensor,
    scale: float,
    window: int = 0,
) -> list[Tensor | int | float | None]:
    """The kernel's arguments, in order; the grid has as many blocks as `flags` has numbers.

    query and output [batch, kv_heads * heads, head_dim]; keys and values uint8 [batch, kv_heads,
    blocks, bytes of a block]; lengths int32 [batch], the new token included; partials float32
    [batch * kv_heads, splits, partial_floats], which need not be set; flags int32 [batch *
    kv_heads, splits], zero before and after. Scores are query times key times `scale`.
    """
    batch, kv_heads, blocks, _ = keys.shape
    if flags.shape[0] != batch * kv_heads or flags.shape[1] * SPLIT > blocks * BLOCK + SPLIT - 1:
        raise FormatError(
            f"flags are [{batch * kv_heads}, splits of at most {blocks * BLOCK} positions], not "
            f"{list(flags.shape)}"
        )
    return [
        query,
        keys,
        values,
        lengths,
        output,
        partials,
        flags,
        kv_heads,
        blocks,
        flags.shape[1],
        window,
        scale * math.log2(math.e),
    ]
