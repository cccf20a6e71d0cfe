"""Weights of several matrices: names, bytes, packing, and what they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from quantlib.errors import FormatError
from quantlib.formats import (
    CompositeWeight,
    Scheme,
    dequantize,
    dequantize_stored,
    pack_stored,
    parts_of,
    quantize_rtn,
    safetensors_file_bytes,
    stored_bytes,
    stored_layout,
    true_bits,
    unpack_stored,
)

ALONE = ["r12w8", "r5w4"]
LOW_RANK = ["w3g64z4+r8", "w4+r3w4", "w4g32zs4a8h8/8+r16", "mxfp4+r1"]
ROWS = ["w6g32@1/8+w4g32@3/8+w3g32z4s4d24", "w8@1/2+w2g32z4s4", "w4g32d20", "mxfp4@1/3+w3g16d16"]
OTHERS = ["w4g32zs6", "w3g64e", "w4a4zh8/8"]


def drawn(name: str, rows: int, columns: int, seed: int = 0) -> CompositeWeight:
    """A weight whose matrices are random ones, rounded to the nearest."""
    generator = torch.Generator().manual_seed(seed)
    scheme = Scheme.parse(name)
    parts = {
        prefix: quantize_rtn(torch.randn(part.shape, generator=generator), part.segments)
        for prefix, part in parts_of(scheme, (rows, columns)).items()
    }
    block = None
    if len(scheme.rows) > 1:
        counts = [parts[f"_rows{i}"].shape[0] for i in range(len(scheme.rows))]
        block = torch.arange(len(counts), dtype=torch.uint8).repeat_interleave(torch.tensor(counts))
        block = block[torch.randperm(rows, generator=generator)]
    return CompositeWeight(scheme, (rows, columns), parts, block)


@pytest.mark.parametrize("name", [*LOW_RANK, *ALONE, *ROWS])
def test_a_name_that_is_read_is_written_the_same(name: str) -> None:
    scheme = Scheme.parse(name)
    assert str(scheme) == name
    assert scheme.is_composite
    with pytest.raises(FormatError, match="several matrices"):
        scheme.segments(64)


@pytest.mark.parametrize(
    "name",
    [
        "w4+r0",
        "w4+r4w3",
        "r4",
        "r4w3",
        "r4w8a8",
        "w4+r4+r5",
        "w4+",
        "bf16+r4",
        "w4@1/2",
        "w4@1/2+w3@1/2",
        "w4@3/4+w3@1/2+w2",
        "w4a8@1/2+w3",
        "w4@1/2+w3a8",
        "w4@1/9+w4@1/9+w4@1/9+w4@1/9+w3",
        "w4d0",
    ],
)
def test_what_makes_no_sense_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        Scheme.parse(name)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([*LOW_RANK, *ALONE, *ROWS]), st.integers(40, 70), st.integers(0, 99))
def test_packing_is_lossless_and_as_large_as_announced(name: str, rows: int, seed: int) -> None:
    weight = drawn(name, rows, 64, seed)
    tensors = pack_stored(weight)
    layout = stored_layout(weight.shape, weight.scheme)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == layout
    assert stored_bytes(weight.shape, weight.scheme) == sum(t.nbytes for t in tensors.values())
    assert true_bits(weight.scheme, weight.shape)[0] * rows * 64 / 8 == pytest.approx(
        stored_bytes(weight.shape, weight.scheme)
    )
    assert len(save(dict(tensors))) == safetensors_file_bytes(layout)
    back = unpack_stored(tensors, weight.shape, weight.scheme)
    assert torch.equal(dequantize_stored(back), dequantize_stored(weight))


@pytest.mark.parametrize("name", OTHERS)
def test_other_schemes_are_what_they_were(name: str) -> None:
    scheme = Scheme.parse(name)
    weight = quantize_rtn(torch.randn(6, 64), scheme.segments(64))
    back = unpack_stored(pack_stored(weight), (6, 64), scheme)
    assert torch.equal(dequantize_stored(back), dequantize(weight))


@pytest.mark.parametrize("name", LOW_RANK)
def test_factors_are_added_to_the_rest(name: str) -> None:
    weight = drawn(name, 48, 64)
    rest, down, up = (dequantize(weight.parts[part]) for part in ("", "_down", "_up"))
    expected = rest.double() + up.double() @ down.double()
    found = dequantize_stored(weight).double()
    # A dot product of `rank` float32 products.
    bound = 1e-6 * (rest.abs() + up.abs() @ down.abs())
    assert not ((found - expected).abs() > bound).any()


@pytest.mark.parametrize("name", ALONE)
def test_factors_alone_are_their_product(name: str) -> None:
    weight = drawn(name, 48, 64)
    assert set(weight.parts) == {"_down", "_up"}
    expected = dequantize(weight.parts["_up"]) @ dequantize(weight.parts["_down"])
    assert torch.equal(dequantize_stored(weight), expected)
    with pytest.raises(FormatError, match="no rest"):
        _ = weight.scheme.rest


def test_every_row_is_its_blocks() -> None:
    weight = drawn("w8@1/4+w4@1/4+w3g16d16", 41, 32)
    assert weight.block is not None
    dense = dequantize_stored(weight)
    seen = [0, 0, 0]
    for row, index in enumerate(weight.block.tolist()):
        values = dequantize(weight.parts[f"_rows{index}"])[seen[index]]
        if index == 2:
            values = dequantize(weight.parts["_basis2"]) @ values
        torch.testing.assert_close(dense[row], values, rtol=1e-5, atol=1e-6)
        seen[index] += 1
    assert seen == [10, 10, 21]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("w4+r32", (32, 64)), ("w4g32d64", (50, 64)), ("w4g32d80", (50, 64)), ("w4@1/2+w3", (1, 8))],
)
def test_shapes_that_have_no_room_are_refused(name: str, shape: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match=name.split("@")[0].replace("+", r"\+")):
        parts_of(Scheme.parse(name), shape)


def test_a_damaged_file_is_noticed() -> None:
    weight = drawn("w8@1/2+w4", 40, 32)
    tensors = pack_stored(weight)
    with pytest.raises(FormatError, match="damaged"):
        unpack_stored(tensors | {"_block": ~tensors["_block"] & 0x7F}, (40, 32), weight.scheme)
    with pytest.raises(FormatError, match="expected"):
        unpack_stored(tensors | {"_block": tensors["_block"][:-1]}, (40, 32), weight.scheme)
    with pytest.raises(FormatError, match="_block"):
        unpack_stored({k: t for k, t in tensors.items() if k != "_block"}, (40, 32), weight.scheme)
    with pytest.raises(FormatError, match="matrices"):
        CompositeWeight(Scheme.parse("w8@1/2+w3"), (40, 32), weight.parts, weight.block)
