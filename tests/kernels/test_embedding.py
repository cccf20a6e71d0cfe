"""Rows of a packed weight are the rows of the dequantized one, bit for bit."""

import pytest
import torch

from quantlib.errors import DataError
from quantlib.formats import QuantizedSegment, QuantizedWeight, Scheme, Segment, dequantize, pack
from quantlib.kernels import layouts, ops, reference, tile_reference
from quantlib.kernels.packed import PackedWeight

SCHEMES = ["w4g64", "w3g32z", "w6g16zs6", "w8z4", "w5t", "w7tz", "fp8", "fp6g32", "nvfp4", "mxfp4"]
SCHEMES += ["fp5e3m1g16", "fp7e2m4", "fp8e2m5t"]
LENGTHS = (1, 31, 64, 100, 576)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantized_rows_equal_the_reference(library, draw, isa, scheme):
    ids = torch.tensor([36, 0, 5, 5, 31, 32])
    for length in LENGTHS:
        weight, packed = draw(37, [(scheme, length)])
        tiled = layouts.tile(packed)
        matrix = dequantize(weight)
        if "s" in scheme:  # the same scale by another rounding
            torch.testing.assert_close(
                library.dequantize(tiled.description, isa=isa), matrix, rtol=2**-22, atol=0
            )
            matrix = tile_reference.dequantize(weight)
        assert torch.equal(library.dequantize(tiled.description, isa=isa), matrix)
        assert torch.equal(library.dequantize(tiled.description, ids, isa=isa), matrix[ids])
        rows = range(30, 37)
        assert torch.equal(library.dequantize(tiled.description, rows, isa=isa), matrix[30:])


def test_scales_at_the_ends_of_float16_are_exact(library, isa):
    scales = torch.tensor([[0.0], [2**-24], [2**-14 - 2**-24], [2**-14], [65504.0]])
    codes = torch.arange(256).to(torch.uint8).expand(5, -1).contiguous()
    segment = Segment(0, 256, Scheme.parse("w8").weight)
    weight = QuantizedWeight((5, 256), (QuantizedSegment(segment, codes, scales.half()),))
    packed = PackedWeight.from_tensors(pack(weight), (5, 256), [segment])
    expected = (torch.arange(256) - 128) * scales
    tiled = layouts.tile(packed)
    assert torch.equal(library.dequantize(tiled.description, isa=isa), expected)


def test_the_number_of_threads_changes_no_bit(library, draw, isa):
    weight, packed = draw(2000, [("w5g32z6", 600)])
    tiled = layouts.tile(packed)
    for threads in (1, 2, 3):
        found = library.dequantize(tiled.description, isa=isa, threads=threads)
        assert torch.equal(found, dequantize(weight))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_embedding_looks_up_ids_of_any_shape_and_integer_type(draw, scheme):
    weight, packed = draw(300, [(scheme, 72), ("w8", 24)])
    ids = torch.randint(0, 300, (2, 5), generator=torch.Generator().manual_seed(0))
    expected = reference.embedding(ids, weight)
    found = ops.embedding(ids, packed)
    torch.testing.assert_close(found, expected, rtol=2**-22, atol=0)
    if ops.backend() != "reference":
        assert torch.equal(ops.embedding(ids, layouts.tile(packed)), found)
    assert torch.equal(ops.embedding(ids.to(torch.int32), packed), found)
    assert torch.equal(ops.embedding(ids.t(), packed), found.transpose(0, 1))
    half = ops.embedding(ids, packed, torch.bfloat16)
    assert torch.equal(half, found.bfloat16())


def test_no_ids_give_no_rows(draw):
    _, packed = draw(10, [("w4", 8)])
    found = ops.embedding(torch.zeros(2, 0, dtype=torch.int64), packed, torch.float16)
    assert found.shape == (2, 0, 8)
    assert found.dtype == torch.float16


@pytest.mark.parametrize("bad", [10, -1, 2**40])
def test_an_id_that_is_no_row_is_a_sentence(draw, bad):
    _, packed = draw(10, [("w4", 8)])
    with pytest.raises(DataError, match=r"outside 0\.\.9.*tokenizer"):
        ops.embedding(torch.tensor([1, bad]), packed)
