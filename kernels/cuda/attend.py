"""Launches of the attention kernel with torch tensors, on a GPU or in the emulator.

Sequences whose caches lie side by side are one launch. What is kept rotated is met by rotated
queries, and outputs are rotated back, both in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.kernels import kv_reference, workspace
from quantlib.kernels.cuda import attention
from quantlib.kernels.cuda.launch import Launch, Runner
from quantlib.kernels.kv_format import KvFormat

_WRITES = (4, 5, 6)
"""Places of the output, partial sums and flags among `attention.arguments`."""


@lru_cache(maxsize=256)
def takes(form: KvFormat, head_dim: int, heads: int, dtype: torch.dtype) -> bool:
    """Whether the kernel attends with `heads` query heads to a KV head, queries of this type."""
    try:
        attention.macros(form, head_dim, heads, dtype)
    except FormatError:
        return False
    return True


def attend(
    runner: Runner,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    form: KvFormat,
    lengths: Sequence[int],
    scale: float,
    window: int = 0,
) -> Tensor:
    """Attention of the last position of each of n sequences: float32 [n, heads, head_dim].

    query float16 or bfloat16 [n, heads, head_dim]; keys and values of one layer, uint8 [n,
    kv_heads, blocks, bytes of a block], contiguous; lengths: positions of each sequence, the new
    one included. Raises FormatError unless `takes`.
    """
    count, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    if form.key.rotate:
        query = kv_reference.rotate(query.float()).to(query.dtype)
    query, out = query.contiguous(), torch.empty_like(query, memory_format=torch.contiguous_format)
    group = heads // kv_heads
    macros = attention.macros(form, head_dim, group, query.dtype)
    splits = attention.splits(max(lengths))
    at_once = _sequences_at_once(kv_heads * splits, attention.partial_floats(head_dim, group))
    own = torch.tensor(lengths, dtype=torch.int32).to(query.device)
    for first in range(0, count, at_once):
        piece = slice(first, min(first + at_once, count))
        shape = (piece.stop - first) * kv_heads, splits
        blocks = shape[0] * splits
        given = attention.arguments(
            query[piece],
            keys[piece],
            values[piece],
            own[piece],
            out[piece],
            workspace.partial_sums(query.device),
            workspace.flags(query.device)[:blocks].view(shape),
            scale,
            window,
        )
        shared = attention.shared_bytes(head_dim, group)
        runner.run(
            Launch(
                attention.SOURCE,
                attention.NAME,
                macros,
                given,
                _WRITES,
                blocks,
                attention.THREADS,
                shared,
            )
        )
    found = out.float()
    return kv_reference.rotate(found) if form.value.rotate else found


def _sequences_at_once(splits: int, floats: int) -> int:
    """For how many sequences of so many splits the stream's workspace has flags and partial sums.

    Raises FormatError when a sequence alone is too long.
    """
    most = min(workspace.FLAGS, workspace.BYTES // (4 * floats)) // splits
    if not most:
        raise FormatError(
            f"a sequence of {splits} splits does not fit the attention kernel's workspace: use "
            "another kernel, or a shorter one"
        )
    return most
