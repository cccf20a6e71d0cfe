"""Codes of a weight of which in every four columns two are zero, without those two.

The 2:4 form that sparse tensor cores read (PTX ISA, "Sparse matrix storage"): of every four
neighbouring columns of a row two are kept, `values`, and where they stood, `places`, two bits each,
ascending. A weight of b bits then takes (b + 2) / 2 bits instead of b, scales aside. Columns that
are missing from the last four count as zeros.

This is how formats whose `sparse` is set are stored (`weight.pack`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.errors import FormatError
from quantlib.formats.packing import pack_codes, unpack_codes

AMONG, KEPT = 4, 2
PLACE_BITS = 2


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """What is kept of codes [N, K].

    values: uint8 [N, K / 2], the kept codes, in the order of their columns.
    places: uint8 [N, K / 2], the column of each within its four: 0 to 3, ascending in each pair.
    """

    values: Tensor
    places: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of all codes."""
        return self.values.shape[0], self.values.shape[1] * AMONG // KEPT

    def packed(self, bits: int) -> tuple[Tensor, Tensor]:
        """(values, places) as dense streams of int32 words, a row each.

        Raises FormatError when a value does not fit `bits`.
        """
        return pack_codes(self.values, bits), pack_codes(self.places, PLACE_BITS)


def kept_columns(columns: int) -> int:
    """How many of so many columns are kept."""
    return -(-columns // AMONG) * KEPT


def largest_of_four(weight: Tensor) -> Tensor:
    """bool [N, K]: the two largest weights of every four of each row, by magnitude; of equal ones,
    the first."""
    rows, columns = weight.shape
    fours = _fours(weight.abs(), 0)
    first = fours.argsort(dim=2, descending=True, stable=True)[..., :KEPT]
    mask = torch.zeros(fours.shape, dtype=torch.bool, device=weight.device)
    return mask.scatter_(2, first, True).view(rows, -1)[:, :columns]


def kept_of(codes: Tensor, zero: int) -> SparseCodes | None:
    """Codes uint8 [N, K] less those that are `zero`, None where more than two of any four are not.

    Zeros fill up fours that have fewer others, the first ones: so the same codes are always kept.
    """
    rows = codes.shape[0]
    fours = _fours(codes, zero)
    used = fours != zero
    spare = KEPT - used.sum(2, keepdim=True, dtype=torch.int8)
    if bool((spare < 0).any()):
        return None
    mask = used | (~used & ((~used).cumsum(2, dtype=torch.int8) <= spare))
    return compress(fours.reshape(rows, -1), mask.view(rows, -1))


def _fours(matrix: Tensor, zero: int) -> Tensor:
    """A matrix [N, K] as [N, fours, 4], the last one filled up."""
    padded = functional.pad(matrix, (0, -matrix.shape[1] % AMONG), value=zero)
    return padded.view(matrix.shape[0], -1, AMONG)


def compress(codes: Tensor, mask: Tensor) -> SparseCodes:
    """Keep of codes uint8 [N, K] those where `mask` (bool [N, K]) is true.

    Raises FormatError unless every four columns of every row keep exactly two.
    """
    check_mask(mask)
    if codes.dtype != torch.uint8 or codes.shape != mask.shape:
        raise FormatError(
            f"sparse codes need codes uint8 and a mask of one shape, not {codes.dtype} "
            f"{list(codes.shape)} and {list(mask.shape)}"
        )
    rows, columns = codes.shape
    is_0, is_1, is_2, is_3 = mask.view(rows, -1, AMONG).unbind(2)
    first = torch.where(is_0, 0, torch.where(is_1, 1, 2))
    second = torch.where(is_3, 3, torch.where(is_2, 2, 1))
    places = torch.stack([first, second], dim=2)
    values = codes.view(rows, -1, AMONG).gather(2, places)
    kept = columns * KEPT // AMONG
    return SparseCodes(values.reshape(rows, kept), places.to(torch.uint8).reshape(rows, kept))


def expand(sparse: SparseCodes, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8 [N, K], mask bool [N, K]): the inverse of `compress`.

    zeros: the codes of zero, which dropped columns get: uint8, of a shape that expands to [N, K].
    Raises FormatError when places are not ascending pairs of columns 0 to 3.
    """
    rows, columns = sparse.shape
    places = sparse.places.view(rows, -1, KEPT).to(torch.int64)
    in_order = bool((places[..., 0] < places[..., 1]).all()) if places.numel() else True
    if not in_order or (places.numel() and int(places.max()) >= AMONG):
        raise FormatError(
            "the places of a sparse weight are not ascending pairs of 0 to 3: its file is damaged"
        )
    mask = torch.zeros(rows, columns // AMONG, AMONG, dtype=torch.bool, device=places.device)
    mask.scatter_(2, places, True)
    codes = zeros.expand(rows, columns).contiguous().view(rows, -1, AMONG)
    codes = codes.scatter(2, places, sparse.values.view(rows, -1, KEPT))
    return codes.view(rows, columns), mask.view(rows, columns)


def unpack(values: Tensor, places: Tensor, bits: int, columns: int) -> SparseCodes:
    """The inverse of `SparseCodes.packed` for codes of `columns` columns.

    Raises FormatError when there are not as many words as these fill.
    """
    kept = kept_columns(columns)
    return SparseCodes(unpack_codes(values, bits, kept), unpack_codes(places, PLACE_BITS, kept))


def check_mask(mask: Tensor) -> None:
    """Raise FormatError unless `mask` is a bool matrix that keeps two of every four columns."""
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] % AMONG:
        raise FormatError(
            f"a 2:4 mask is bool [N, K] with K a multiple of {AMONG}, not {mask.dtype} "
            f"{list(mask.shape)}"
        )
    counts = mask.view(mask.shape[0], -1, AMONG).sum(2)
    if not bool((counts == KEPT).all()):
        row, four = (counts != KEPT).nonzero()[0].tolist()
        raise FormatError(
            f"row {row} keeps {int(counts[row, four])} of columns {AMONG * four} to "
            f"{AMONG * four + AMONG - 1}: a 2:4 weight keeps two of every four"
        )
