"""The 2:4 form: nothing is lost, and what is no 2:4 weight is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats import (
    Scheme,
    dequantize,
    pack,
    packed_layout,
    payload_bytes,
    quantize_rtn,
)
from quantlib.formats import unpack as unpack_weight
from quantlib.formats.sparse import (
    SparseCodes,
    compress,
    expand,
    kept_of,
    largest_of_four,
    unpack,
)
from quantlib.formats.weight import PACKED, PLACES


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


SCHEMES = ("w4g128:2of4", "w3:2of4", "w2g16s4:2of4", "w8g32e:2of4", "w4t:2of4", "w4g64:2of4h8/8")


@pytest.mark.parametrize("name", [*SCHEMES, "w4g64s5:2of4a8", "w4g128:2of4a4zh8x3/16"])
def test_schemes_say_it_in_their_names(name: str) -> None:
    scheme = Scheme.parse(name)
    assert str(scheme) == name
    assert scheme.weight is not None
    assert scheme.weight.sparse
    assert Scheme.of(scheme.segments(256), scheme.activations(256)) == scheme
    assert not any(part.format.sparse for part in scheme.segments(256)[1:]), "wide ones are dense"


@pytest.mark.parametrize("name", ["w4z:2of4", "fp8:2of4", "mxfp4:2of4", "w4:2of4g128", "bf16:2of4"])
def test_formats_without_an_exact_zero_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        Scheme.parse(name)


@given(
    name=st.sampled_from(SCHEMES), rows=st.integers(1, 5), columns=st.integers(4, 150),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_tensors_of_a_checkpoint_are_the_weight(
    name: str, rows: int, columns: int, seed: int
) -> None:
    segments = Scheme.parse(name).segments(columns)
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight = quantize_rtn(dense, segments)
    tensors = pack(weight)
    found = {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()}
    assert found == packed_layout((rows, columns), segments)
    back = unpack_weight(tensors, (rows, columns), segments)
    for own, again in zip(weight.segments, back.segments, strict=True):
        assert torch.equal(own.codes, again.codes)
        assert torch.equal(own.scale, again.scale)


def test_rounding_to_nearest_keeps_the_two_largest_of_four() -> None:
    dense = torch.tensor([[1.0, -3.0, 2.0, 0.5, -1.0, 0.25, 0.0, 4.0]])
    found = dequantize(quantize_rtn(dense, Scheme.parse("w8:2of4").segments(8)))
    assert found.bool().tolist() == [[False, True, True, False, True, False, False, True]]
    # Half a step of 4 / 127.5, and float16's rounding of the scale.
    torch.testing.assert_close(found, dense * found.bool(), rtol=0, atol=0.017)


def test_none_that_is_dropped_is_larger_than_one_that_is_kept() -> None:
    dense = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    kept = largest_of_four(dense).unflatten(1, (16, 4))
    assert (kept.sum(2) == 2).all()
    fours = dense.abs().unflatten(1, (16, 4))
    smallest_kept = torch.where(kept, fours, torch.inf).amin(2)
    assert (smallest_kept >= torch.where(kept, 0, fours).amax(2)).all()


def test_a_pruned_weight_of_four_bits_takes_three() -> None:
    shape, segments = (64, 1024), Scheme.parse("w4g128:2of4").segments(1024)
    assert payload_bytes(shape, segments) == 64 * 1024 * 3 // 8 + 64 * 8 * 2


def test_what_was_not_pruned_cannot_be_packed() -> None:
    (dense,) = quantize_rtn(torch.ones(2, 8), Scheme.parse("w4").segments(8)).segments
    assert kept_of(dense.codes, 8) is None
    pruned = quantize_rtn(torch.ones(2, 8), Scheme.parse("w4:2of4").segments(8))
    pruned.segments[0].codes.copy_(dense.codes)
    with pytest.raises(FormatError, match="prune it first"):
        pack(pruned)


def test_damaged_places_are_found() -> None:
    segments = Scheme.parse("w4:2of4").segments(64)
    tensors = pack(quantize_rtn(torch.randn(2, 64), segments))
    assert set(tensors) >= {PACKED, PLACES}
    tensors[PLACES].zero_()
    with pytest.raises(FormatError, match="damaged"):
        unpack_weight(tensors, (2, 64), segments)
