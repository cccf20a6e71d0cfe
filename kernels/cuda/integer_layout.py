"""How weights and tokens lie in memory for kernel (b), `src/segmented_gemm.cu`: bijections, and
their inverses.

A segment of a weight [N, K] is padded to tiles of 16 rows and to whole *steps*, 64 bytes of a token
each (`Kind.step_columns`), with codes 0, which have a sign here. In memory a tile's steps follow
each other:

    uint8 [row tiles, steps, strip bytes]

A strip is two chunks, each the left operand of one matrix instruction: of every lane its four
registers, `fragments.left_integer`. Where weights are nibbles and tokens bytes (`MIXED`), a byte
has one code of the first chunk in its low half and the code at the same place of the second chunk
in its high half.

Tokens lie in rows of 64 bytes a step: bytes, or nibbles with the even column in the low half.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.errors import FormatError
from quantlib.kernels.cuda import fragments

ROW_TILE, STEP_BYTES, CHUNKS = 16, 64, 2


@dataclass(frozen=True)
class Kind:
    """What is multiplied with what; `number` is `src/segments.h`'s.

    weight_bits, token_bits: as they are stored. unsigned: tokens are 0..15, with zero points.
    """

    number: int
    weight_bits: int
    token_bits: int
    unsigned: bool = False

    @property
    def step_columns(self) -> int:
        """Columns of a step."""
        return STEP_BYTES * 8 // self.token_bits

    @property
    def chunk_columns(self) -> int:
        """Columns of a matrix instruction."""
        return self.step_columns // CHUNKS

    @property
    def strip_bytes(self) -> int:
        """Of 16 rows of the weight and one step."""
        return ROW_TILE * self.step_columns * self.weight_bits // 8


BYTES, NIBBLES = Kind(0, 8, 8), Kind(1, 4, 4)
UNSIGNED, MIXED = Kind(2, 4, 4, unsigned=True), Kind(3, 4, 8)
KINDS = (BYTES, NIBBLES, UNSIGNED, MIXED)


@lru_cache
def strip_places(token_bits: int) -> tuple[Tensor, Tensor]:
    """Row and column in a strip of each code: int64 [2 chunks, 32 lanes, 4 registers, elements]."""
    each = 32 // token_bits
    rows = torch.empty(CHUNKS, fragments.LANES, fragments.LEFT_REGISTERS, each, dtype=torch.int64)
    columns = torch.empty_like(rows)
    for chunk in range(CHUNKS):
        for lane in range(fragments.LANES):
            for register in range(fragments.LEFT_REGISTERS):
                for index in range(each):
                    place = fragments.left_integer(lane, register, index, token_bits)
                    rows[chunk, lane, register, index] = place[0]
                    columns[chunk, lane, register, index] = place[1] + chunk * 8 * each
    return rows, columns


def pack_weight(codes: Tensor, kind: Kind) -> Tensor:
    """int8 [N, K], within `kind.weight_bits` -> uint8 [row tiles, steps, strip bytes]."""
    if codes.dim() != 2 or codes.dtype != torch.int8 or not codes.numel():
        raise FormatError(f"codes are an int8 matrix [N, K], not {codes.dtype} {list(codes.shape)}")
    rows, columns = codes.shape
    padded = functional.pad(codes, (0, -columns % kind.step_columns, 0, -rows % ROW_TILE))
    strips = padded.unflatten(0, (-1, ROW_TILE)).unflatten(2, (-1, kind.step_columns))
    at_rows, at_columns = strip_places(kind.token_bits)
    own = strips.movedim(2, 1)[..., at_rows, at_columns]  # [tiles, steps, chunks, 32, 4, each]
    if kind.weight_bits == 8:
        return own.contiguous().view(torch.uint8).flatten(2)
    low, high = own.unbind(2) if kind is MIXED else (own[..., 0::2], own[..., 1::2])
    return _two_nibbles(low, high).flatten(2)


def unpack_weight(memory: Tensor, kind: Kind, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack_weight`: int8 [N, K]."""
    at_rows, at_columns = strip_places(kind.token_bits)
    tiles, steps = memory.shape[:2]
    if kind.weight_bits == 8:
        own = memory.contiguous().view(torch.int8).reshape(tiles, steps, *at_rows.shape)
    else:
        halves = _nibbles_of(memory)
        parts = [half.reshape(tiles, steps, -1, *at_rows.shape[1:3], 4) for half in halves]
        own = torch.cat(parts, 2) if kind is MIXED else torch.stack(parts, -1).flatten(-2)
    strips = torch.empty(tiles, steps, ROW_TILE, kind.step_columns, dtype=torch.int8)
    strips[..., at_rows, at_columns] = own
    return strips.movedim(1, 2).flatten(2).flatten(0, 1)[: shape[0], : shape[1]].contiguous()


def pack_tokens(codes: Tensor, kind: Kind) -> Tensor:
    """int8 [M, K] (0..15 for unsigned nibbles) -> uint8 [M, 64 * steps]."""
    padded = functional.pad(codes, (0, -codes.shape[1] % kind.step_columns))
    if kind.token_bits == 8:
        return padded.contiguous().view(torch.uint8)
    return _two_nibbles(padded[:, 0::2], padded[:, 1::2])


def unpack_tokens(memory: Tensor, kind: Kind, columns: int) -> Tensor:
    """The inverse of `pack_tokens`: int8 [M, K]."""
    if kind.token_bits == 8:
        return memory.contiguous().view(torch.int8)[:, :columns].contiguous()
    codes = torch.stack(_nibbles_of(memory), -1).flatten(1)[:, :columns]
    return codes & 15 if kind.unsigned else codes


def pair_rows(meta: Tensor) -> Tensor:
    """[..., rows], a multiple of 16 -> the same with the rows of each 16 in the order in which
    lanes take them: row 0 and 8, then 1 and 9, and so on."""
    return meta.unflatten(-1, (-1, 2, 8)).transpose(-1, -2).flatten(-3).contiguous()


def _two_nibbles(low: Tensor, high: Tensor) -> Tensor:
    return (low.to(torch.uint8) & 15) | (high.to(torch.uint8) & 15) << 4


def _nibbles_of(memory: Tensor) -> list[Tensor]:
    """Low and high halves of bytes, with their sign: int8."""
    signed = memory.to(torch.int8)
    return [(signed << 4) >> 4, signed >> 4]
