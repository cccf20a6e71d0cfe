"""How a weight of which two of every four columns are kept lies in memory for kernel (a).

Codes that are kept lie as those of a dense weight of half the columns (`layout.py`), and a lane has
two words more in each unit: the places of the 32 kept columns, 16 to a word, as mma.sp takes them
(`fragments.place_element`), for the first 16 rows of a strip in lanes 0 and 1 of every four and for
the others in lanes 2 and 3. Words of codes come first, then those of places, all of them in planes:

    memory: uint8 [slabs, strips, 2 units, 128 * (bits + 2) bytes]
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from quantlib.formats.sparse import AMONG, KEPT, SparseCodes
from quantlib.kernels.cuda import fragments
from quantlib.kernels.cuda.layout import (
    STRIP_ROWS,
    UNIT_COLUMNS,
    code_words,
    codes_of,
    from_planes,
    in_planes,
    matrix_of,
    units_of,
)

PLACE_WORDS = UNIT_COLUMNS // fragments.DEPTH
"""Of a lane, in a unit."""


def pack_sparse(sparse: SparseCodes, bits: int) -> Tensor:
    """Values below 2^bits and their places -> memory. Padding keeps columns 0 and 1 of each four,
    with code 0."""
    words = torch.cat([code_words(sparse.values, bits), _place_words(sparse.places)], -2)
    return in_planes(words)


def unpack_sparse(memory: Tensor, bits: int, shape: tuple[int, int]) -> SparseCodes:
    """The inverse of `pack_sparse`; shape is [N, K] of all columns."""
    words = from_planes(memory, bits + PLACE_WORDS)
    kept = shape[0], shape[1] * KEPT // AMONG
    return SparseCodes(codes_of(words[..., :bits, :], kept), _places_of(words[..., bits:, :], kept))


@lru_cache
def _positions() -> tuple[Tensor, Tensor]:
    """Row and kept column in a unit of each place: int64 [32 lanes, words, 16 places]."""
    shape = fragments.LANES, PLACE_WORDS, fragments.PLACES
    rows = torch.empty(shape, dtype=torch.int64)
    columns = torch.empty_like(rows)
    for lane in range(fragments.LANES):
        for index in range(fragments.PLACES):
            pair, row, column = fragments.place_element(lane, index)
            rows[lane, :, index] = pair * fragments.ROWS + row
            columns[lane, :, index] = column + torch.arange(PLACE_WORDS) * fragments.DEPTH
    return rows, columns


def _place_words(places: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> uint8 [slabs, strips, 2, lanes, words, 4 bytes]."""
    # Places of padding are 0 and 1: what stands there is added to those, and taken off before.
    ascending = torch.arange(places.shape[1]) % KEPT
    units = units_of((places - ascending).to(torch.uint8))
    units = (units + torch.arange(UNIT_COLUMNS) % KEPT).to(torch.uint8)
    rows, columns = _positions()
    own = units[..., rows, columns].unflatten(-1, (4, 4))  # [..., lanes, words, bytes, 4 places]
    shifts = torch.arange(4, dtype=torch.uint8) * 2
    return (own << shifts).sum(-1).to(torch.uint8)


def _places_of(words: Tensor, kept: tuple[int, int]) -> Tensor:
    shifts = torch.arange(4, dtype=torch.uint8) * 2
    own = (words[..., None] >> shifts & 3).flatten(-2)  # [..., lanes, words, 16]
    rows, columns = _positions()
    units = words.new_empty(*words.shape[:3], STRIP_ROWS, UNIT_COLUMNS)
    units[..., rows, columns] = own
    return matrix_of(units, kept)
