"""How a weight lies in memory for kernel (a), `src/decode_gemm.cu`: bijections, and their inverses.

Codes [N, K] are padded to strips of 32 rows and slabs of 64 columns. A strip of a slab is two units
of 32 columns, a unit the 32 codes of each of 32 lanes, which are `bits` words of 32 bits:

    memory: uint8 [slabs, strips, 2 units, 128 * bits bytes]

A lane's 32 codes are 16 pairs: pair number 8 s + 4 b + r is register r of the left operand (two
columns side by side, `fragments.left_element`) of 16 rows b and 16 columns s of the unit. Each word
has the even columns' codes in its low half and the odd columns' in its high half, with the same
layout: see `pieces`. A unit's words lie in planes of four, two and one word per lane (three bits:
two, then one), so that a lane reads each plane at once.

Scales, with or without zero points, are float16 [groups, N padded, 1 or 2], with rows in the order
in which lanes take them: of each 16 rows, row 0 and 8, then 1 and 9, and so on (with zero points:
the two scales, then the two zero points).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.errors import FormatError
from quantlib.kernels.cuda import fragments

STRIP_ROWS, SLAB_COLUMNS, UNIT_COLUMNS = 32, 64, 32
PAIRS = 16
"""Of codes, in a lane's part of a unit."""
WIDTHS = range(2, 9)


@dataclass(frozen=True)
class Piece:
    """Bits of a code in one word: from the code's bit `first`, `count` of them, at bit `position`
    of each 16-bit half of word `word`."""

    word: int
    first: int
    count: int
    position: int


@lru_cache
def pieces(bits: int) -> tuple[tuple[Piece, ...], ...]:
    """Where each of the 16 codes of a half lies: `src/dequantize.h` reads the same.

    The first codes lie whole, as many to a word as fit, from bit 0 up; the others in what is left
    at the top of the words, taken as one string of bits, word after word.
    """
    if bits not in WIDTHS:
        raise FormatError(f"integer weights have 2 to 8 bits, not {bits}")
    whole = 16 // bits
    found: list[tuple[Piece, ...]] = [
        (Piece(code // whole, 0, bits, code % whole * bits),) for code in range(whole * bits)
    ]
    spare = [(word, bit) for word in range(bits) for bit in range(whole * bits, 16)]
    for begin in range(0, len(spare), bits):
        own = spare[begin : begin + bits]
        words = sorted({word for word, _ in own})
        runs = [[index for index, place in enumerate(own) if place[0] == word] for word in words]
        found.append(
            tuple(
                Piece(word, run[0], len(run), own[run[0]][1])
                for word, run in zip(words, runs, strict=True)
            )
        )
    return tuple(found)


@lru_cache
def unit_places() -> tuple[Tensor, Tensor]:
    """Row and column in a unit (32 x 32) of each code: int64 [32 lanes, 16 pairs, 2 sides]."""
    rows = torch.empty(fragments.LANES, PAIRS, 2, dtype=torch.int64)
    columns = torch.empty_like(rows)
    for lane in range(fragments.LANES):
        for pair in range(PAIRS):
            step, block, register = pair // 8, pair // 4 % 2, pair % 4
            for side in range(2):
                row, column = fragments.left_element(lane, register, side)
                rows[lane, pair, side] = block * fragments.ROWS + row
                columns[lane, pair, side] = step * fragments.DEPTH + column
    return rows, columns


def planes(bits: int) -> tuple[range, ...]:
    """The words of a lane that lie side by side, plane by plane."""
    sizes = [4] * (bits // 4) + [size for size in (2, 1) if bits % 4 & size]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [N, K], each below 2^bits -> uint8 [slabs, strips, 2, 128 * bits]. Padding has code
    0."""
    return in_planes(code_words(codes, bits))


def code_words(codes: Tensor, bits: int) -> Tensor:
    """The same as words by lane: uint8 [slabs, strips, 2, lanes, bits, 4 bytes]."""
    if codes.dim() != 2 or codes.dtype != torch.uint8 or not codes.numel():
        raise FormatError(f"codes are a uint8 matrix [N, K], not {codes.dtype} {list(codes.shape)}")
    at_rows, at_columns = unit_places()
    # [slabs, strips, 2, lanes, pairs, sides]
    own = units_of(codes)[..., at_rows, at_columns].to(torch.int32)
    halves = own.new_zeros(*own.shape[:-2], bits, 2)
    for pair, parts in enumerate(pieces(bits)):
        for piece in parts:
            field = own[..., pair, :] >> piece.first & (1 << piece.count) - 1
            halves[..., piece.word, :] |= field << piece.position
    # Little end first: byte 0 and 1 of a word are its low half.
    split = torch.stack([halves & 0xFF, halves >> 8], -1).to(torch.uint8)
    return split.flatten(-2)


def units_of(codes: Tensor) -> Tensor:
    """A matrix [N, K] in units, padded with zeros: [slabs, strips, 2, 32 rows, 32 columns]."""
    rows, columns = codes.shape
    padded = functional.pad(codes, (0, -columns % SLAB_COLUMNS, 0, -rows % STRIP_ROWS))
    units = padded.unflatten(0, (-1, STRIP_ROWS)).unflatten(2, (-1, 2, UNIT_COLUMNS))
    return units.permute(2, 0, 3, 1, 4)


def matrix_of(units: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `units_of`."""
    matrix = units.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
    return matrix[: shape[0], : shape[1]].contiguous()


def in_planes(words: Tensor) -> Tensor:
    """Words of lanes [..., lanes, count, 4 bytes] as they lie in memory: [..., 128 * count]."""
    own = planes(words.shape[-2])
    return torch.cat([words[..., p.start : p.stop, :].flatten(-3) for p in own], -1).contiguous()


def from_planes(memory: Tensor, count: int) -> Tensor:
    """The inverse of `in_planes`."""
    parts, start = [], 0
    for plane in planes(count):
        size = fragments.LANES * len(plane) * 4
        part = memory[..., start : start + size]
        parts.append(part.unflatten(-1, (fragments.LANES, len(plane), 4)))
        start += size
    return torch.cat(parts, -2)


def unpack_codes(memory: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack_codes`: uint8 [N, K]."""
    return codes_of(from_planes(memory, bits), shape)


def codes_of(words: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `code_words`: uint8 [N, K]."""
    bytes_ = words.to(torch.int32).unflatten(-1, (2, 2))
    halves = bytes_[..., 0] | bytes_[..., 1] << 8  # [..., lanes, bits, 2]
    own = words.new_zeros(*words.shape[:3], fragments.LANES, PAIRS, 2, dtype=torch.int32)
    for pair, parts in enumerate(pieces(words.shape[-2])):
        for piece in parts:
            field = halves[..., piece.word, :] >> piece.position & (1 << piece.count) - 1
            own[..., pair, :] |= field << piece.first
    at_rows, at_columns = unit_places()
    units = words.new_empty(*words.shape[:3], STRIP_ROWS, UNIT_COLUMNS)
    units[..., at_rows, at_columns] = own.to(torch.uint8)
    return matrix_of(units, shape)


def pack_meta(scale: Tensor, zero: Tensor | None) -> Tensor:
    """Scales and zero points [N, G] -> float16 [G, N padded to 32, 1 or 2], as the module says."""
    both = [scale] if zero is None else [scale, zero]
    rows = -(-scale.shape[0] // STRIP_ROWS) * STRIP_ROWS
    stacked = torch.stack([part.to(torch.float16) for part in both])  # [1 or 2, N, G]
    padded = functional.pad(stacked, (0, 0, 0, rows - scale.shape[0]))
    # [parts, 16s of rows, row or 8 below, 8, G] -> [G, 16s, 8, parts, row or 8 below]
    split = padded.unflatten(1, (-1, 2, 8))
    return split.permute(4, 1, 3, 0, 2).reshape(scale.shape[1], rows, len(both)).contiguous()


def unpack_meta(memory: Tensor, rows: int) -> list[Tensor]:
    """The inverse of `pack_meta`: scales, and zero points if there are any, float16 [N, G]."""
    groups, padded, parts = memory.shape
    split = memory.reshape(groups, padded // 16, 8, parts, 2).permute(3, 1, 4, 2, 0)
    return [part.reshape(padded, groups)[:rows].contiguous() for part in split]
