"""Codes of a weight of which in every four columns two are zero, without those two.

The 2:4 form that sparse tensor cores read (PTX ISA, "Sparse matrix storage"): of every four
neighbouring columns of a row two are kept, `values`, and where they stood, `places`, two bits each,
ascending. A weight of b bits then takes (b + 2) / 2 bits instead of b, scales aside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    fours = mask.view(rows, -1, AMONG)
    # A stable sort of "dropped" puts the kept columns first, and leaves their order.
    places = (~fours).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :KEPT]
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
    mask = torch.zeros(rows, columns // AMONG, AMONG, dtype=torch.bool).scatter_(2, places, True)
    codes = zeros.expand(rows, columns).contiguous().view(rows, -1, AMONG)
    codes = codes.scatter(2, places, sparse.values.view(rows, -1, KEPT))
    return codes.view(rows, columns), mask.view(rows, columns)


def unpack(values: Tensor, places: Tensor, bits: int, columns: int) -> SparseCodes:
    """The inverse of `SparseCodes.packed` for codes of `columns` columns.

    Raises FormatError when there are not as many words as these fill.
    """
    kept = columns * KEPT // AMONG
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
