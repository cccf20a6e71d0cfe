"""Matrices of a stack in packed form: experts `[E, N, K]` are one packed matrix `[E*N, K]`, and the
kernels take them one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantlib.formats.packing import pack_zeros, unpack_zeros
from quantlib.formats.weight import PACKED, PLACES, ROW_SCALE, SCALE, ZERO_POINT
from quantlib.formats.weight_format import TENSOR, Segment

Segments = tuple[Segment, ...]


def row_block(
    tensors: Mapping[str, Tensor], segments: Segments, first: int, count: int
) -> dict[str, Tensor]:
    """The packed tensors of rows `first .. first + count - 1` of a packed matrix, by suffix.

    Views, but for zero points that do not begin at a word (count * zero_bits is no multiple of 32):
    those are packed anew.
    """
    block = {}
    for index, segment in enumerate(segments):
        tail, format = (f"_{index}" if index else ""), segment.format
        block[PACKED + tail] = tensors[PACKED + tail][first : first + count]
        if format.sparse:
            block[PLACES + tail] = tensors[PLACES + tail][first : first + count]
        whole = format.group_size == TENSOR
        scale = tensors[SCALE + tail]
        block[SCALE + tail] = scale if whole else scale[first : first + count]
        if format.two_level:
            block[ROW_SCALE + tail] = tensors[ROW_SCALE + tail][first : first + count]
        elif ROW_SCALE + tail in tensors:
            block[ROW_SCALE + tail] = tensors[ROW_SCALE + tail]
        if not format.symmetric:
            words = tensors[ZERO_POINT + tail]
            block[ZERO_POINT + tail] = (
                words if whole else _zero_block(words, format.zero_bits, first, count)
            )
    return block


def _zero_block(words: Tensor, bits: int, first: int, count: int) -> Tensor:
    start, stop = first * bits, (first + count) * bits
    if start % 32 == 0 and (stop % 32 == 0 or stop // 32 == words.shape[0] - 1):
        return words[start // 32 : -(-stop // 32)]
    rows = words.shape[0] * 32 // bits
    return pack_zeros(unpack_zeros(words, bits, rows)[first : first + count], bits)


def join_row_blocks(
    blocks: Sequence[Mapping[str, Tensor]], segments: Segments, rows: int
) -> dict[str, Tensor]:
    """The packed tensors of the matrices with these tensors, of `rows` rows each, one below the
    other: the inverse of `row_block`. What all rows share is that of the first."""
    joined = {}
    for index, segment in enumerate(segments):
        tail, format = (f"_{index}" if index else ""), segment.format
        whole = format.group_size == TENSOR
        joined[PACKED + tail] = _below(blocks, PACKED + tail)
        if format.sparse:
            joined[PLACES + tail] = _below(blocks, PLACES + tail)
        joined[SCALE + tail] = blocks[0][SCALE + tail] if whole else _below(blocks, SCALE + tail)
        if format.two_level:
            joined[ROW_SCALE + tail] = _below(blocks, ROW_SCALE + tail)
        elif ROW_SCALE + tail in blocks[0]:
            joined[ROW_SCALE + tail] = blocks[0][ROW_SCALE + tail]
        if not format.symmetric:
            words = [block[ZERO_POINT + tail] for block in blocks]
            joined[ZERO_POINT + tail] = (
                words[0] if whole else _join_zeros(words, format.zero_bits, rows)
            )
    return joined


def _below(blocks: Sequence[Mapping[str, Tensor]], suffix: str) -> Tensor:
    return torch.cat([block[suffix] for block in blocks])


def _join_zeros(words: Sequence[Tensor], bits: int, rows: int) -> Tensor:
    if rows * bits % 32 == 0:
        return torch.cat(list(words))
    return pack_zeros(torch.cat([unpack_zeros(block, bits, rows) for block in words]), bits)
