"""The 2:4 form: nothing is lost, and what is no 2:4 weight is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.sparse import SparseCodes, compress, expand, unpack


def masked(rows: int, fours: int, seed: int) -> Tensor:
    """A random 2:4 mask [rows, 4 * fours]."""
    noise = torch.rand(rows, fours, 4, generator=torch.Generator().manual_seed(seed))
    kept = noise.topk(2, dim=2).indices
    return torch.zeros(noise.shape, dtype=torch.bool).scatter_(2, kept, True).flatten(1)


@given(
    rows=st.integers(1, 5),
    fours=st.integers(1, 9),
    bits=st.integers(2, 8),
    seed=st.integers(0, 99),
)
def test_packing_and_compressing_are_undone_exactly(
    rows: int, fours: int, bits: int, seed: int
) -> None:
    mask = masked(rows, fours, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    codes = torch.randint(0, 1 << bits, mask.shape, generator=generator, dtype=torch.uint8)
    zero = torch.tensor(1 << (bits - 1), dtype=torch.uint8)
    codes = torch.where(mask, codes, zero)
    packed = compress(codes, mask).packed(bits)
    again, places = expand(unpack(*packed, bits, codes.shape[1]), zero)
    assert torch.equal(again, codes)
    assert torch.equal(places, mask)


def test_the_form_takes_half_the_codes_and_two_bits_for_each() -> None:
    mask = masked(3, 16, 0)
    values, places = compress(torch.zeros(3, 64, dtype=torch.uint8), mask).packed(4)
    assert values.nbytes == 3 * 64 * 4 // 8 // 2
    assert places.nbytes == 3 * 64 * 2 // 8 // 2


def test_a_row_that_keeps_three_is_named() -> None:
    mask = masked(3, 4, 0)
    mask[1, 4:8] = torch.tensor([True, True, True, False])
    with pytest.raises(FormatError, match="row 1 keeps 3 of columns 4 to 7"):
        compress(torch.zeros(3, 16, dtype=torch.uint8), mask)


@pytest.mark.parametrize("places", [[0, 4], [1, 1], [2, 0]])
def test_places_that_no_mask_gives_are_refused(places: list[int]) -> None:
    sparse = SparseCodes(
        torch.zeros(1, 2, dtype=torch.uint8), torch.tensor([places], dtype=torch.uint8)
    )
    with pytest.raises(FormatError, match="ascending"):
        expand(sparse, torch.zeros((), dtype=torch.uint8))


def test_columns_that_are_no_multiple_of_four_are_refused() -> None:
    with pytest.raises(FormatError, match="multiple of 4"):
        compress(torch.zeros(1, 6, dtype=torch.uint8), torch.ones(1, 6, dtype=torch.bool))
