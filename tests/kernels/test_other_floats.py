"""Floats that no kernel knows: stored like the others, computed by the torch reference."""

from __future__ import annotations

import pytest
import torch

from quantlib.errors import FormatError
from quantlib.formats import Scheme, dequantize, pack, quantize_rtn
from quantlib.formats.activation import fake_quantize
from quantlib.formats.elements import FLOAT_NAMES, OCP_FLOATS
from quantlib.formats.packing import packed_bytes
from quantlib.formats.weight import QuantizedWeight
from quantlib.kernels import dispatch, ops
from quantlib.kernels.layouts import can_tile, tile
from quantlib.kernels.packed import PackedWeight

OTHERS = [name for name, element in FLOAT_NAMES.items() if element not in OCP_FLOATS]


def drawn(scheme: str) -> tuple[QuantizedWeight, PackedWeight]:
    weight = torch.randn(20, 75, generator=torch.Generator().manual_seed(1))
    whole = quantize_rtn(weight, Scheme.parse(scheme).segments(75))
    return whole, PackedWeight.from_tensors(
        pack(whole), whole.shape, Scheme.parse(scheme).segments(75)
    )


@pytest.mark.parametrize("name", [*OTHERS, "fp5e2m2g32", "fp7e4m2t", "w4h" + OTHERS[-1] + "/8"])
def test_they_are_multiplied_as_what_they_stand_for(name: str) -> None:
    whole, packed = drawn(name)
    x = torch.randn(3, 75, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ops.dequantize(packed), dequantize(whole))
    assert torch.equal(ops.embedding(torch.tensor([3, 19]), packed), dequantize(whole)[[3, 19]])
    expected = x @ dequantize(whole).T
    # sums of 75 products in float32, in another order
    torch.testing.assert_close(ops.linear(x, packed), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_inputs_are_rounded_to_them(name: str) -> None:
    _, packed = drawn("w4")
    x = torch.randn(3, 75, generator=torch.Generator().manual_seed(2))
    segments = Scheme.parse(f"w4a{name}").activations(75)
    rounded = fake_quantize(x, segments)
    assert not torch.equal(rounded, x)
    expected = ops.linear(rounded, packed)
    torch.testing.assert_close(
        ops.linear(x, packed, activations=segments), expected, rtol=1e-5, atol=1e-5
    )


def test_they_take_the_bits_that_their_names_say() -> None:
    for name in OTHERS:
        _, packed = drawn(name)
        bits = int(name[2])
        assert packed.tensors["_packed"].nbytes == 20 * packed_bytes(75, bits)


def test_kernels_refuse_them_in_a_sentence() -> None:
    for name in OTHERS:
        _, packed = drawn(name)
        assert not can_tile(list(packed.tensors.values()), packed.segments)
        with pytest.raises(FormatError, match="computed by the torch reference"):
            tile(packed)


def test_no_machine_sends_them_to_a_kernel() -> None:
    _, packed = drawn("fp5e2m2")
    product = dispatch.Product(1, torch.float16, packed.layout)
    gpu = dispatch.Machine("cuda", cpu=False, cuda="", triton="")
    assert dispatch.choose(product, gpu) == dispatch.REFERENCE
    for forced in ("triton", "cuda"):
        machine = dispatch.Machine("cuda", cpu=False, cuda="", triton="", forced=forced)
        assert dispatch.choose(product, machine) == dispatch.REFERENCE
