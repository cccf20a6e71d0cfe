"""Small floats, those outside OCP's specifications among them: every code, by every kernel."""

from __future__ import annotations

import pytest
import torch

from quantlib import formats
from quantlib.formats import QuantizedSegment, Scheme, Segment, dequantize, pack, quantize_rtn
from quantlib.formats.activation import fake_quantize
from quantlib.formats.elements import FLOAT_NAMES, OCP_FLOATS, code_book
from quantlib.formats.packing import packed_bytes
from quantlib.formats.weight import QuantizedWeight
from quantlib.kernels import dispatch, ops, reference
from quantlib.kernels.cpu.library import Library
from quantlib.kernels.layouts import can_tile, tile
from quantlib.kernels.packed import PackedWeight

OTHERS = [name for name, element in FLOAT_NAMES.items() if element not in OCP_FLOATS]
SCHEMES = [*OTHERS, "fp5e2m2g32", "fp7e4m2t", "fp7e2m4g64s5", "w4h" + OTHERS[-1] + "/8"]


def drawn(scheme: str) -> tuple[QuantizedWeight, PackedWeight]:
    weight = torch.randn(20, 75, generator=torch.Generator().manual_seed(1))
    whole = quantize_rtn(weight, Scheme.parse(scheme).segments(75))
    return whole, PackedWeight.from_tensors(
        pack(whole), whole.shape, Scheme.parse(scheme).segments(75)
    )


def of_every_code(name: str, columns: int) -> PackedWeight:
    """Row n has code n in column n of those, in turn, and zeros elsewhere; scales are 1."""
    form = Scheme.parse(name).weight
    assert form is not None
    rows = 1 << form.bits
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    every = torch.arange(rows)
    codes[every, every % columns] = every.to(torch.uint8)
    segment = Segment(0, columns, form)
    part = QuantizedSegment(segment, codes, torch.ones(rows, 1, dtype=torch.float16))
    weight = QuantizedWeight((rows, columns), (part,))
    return PackedWeight.from_tensors(pack(weight), weight.shape, [segment])


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_every_code_is_its_number(library: Library, isa: str, name: str) -> None:
    """Subnormal ones, the largest, infinities and NaNs, wherever they stand among four columns; one
    token, a few and panels of them, and looked up."""
    values = code_book(FLOAT_NAMES[name])
    for columns in (1, 37):
        tiled = tile(of_every_code(name, columns))
        weight = tiled.description
        for tokens in (1, 2, 7):
            ones = torch.ones(tokens, columns)
            found = library.linear(weight, ones, None, "exact", isa=isa)
            torch.testing.assert_close(
                found, values.expand(tokens, -1), rtol=0, atol=0, equal_nan=True
            )
        dense = library.dequantize(weight, isa=isa).sum(dim=1)
        torch.testing.assert_close(dense, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_they_are_multiplied_as_what_they_stand_for(scheme: str) -> None:
    whole, packed = drawn(scheme)
    x = torch.randn(3, 75, generator=torch.Generator().manual_seed(2))
    # two-level scales are rounded in another order
    torch.testing.assert_close(ops.dequantize(packed), dequantize(whole), rtol=2**-22, atol=0)
    rows = ops.embedding(torch.tensor([3, 19]), packed)
    assert torch.equal(rows, ops.dequantize(packed)[[3, 19]])
    expected = x @ dequantize(whole).T
    # sums of 75 products in float32, in another order
    torch.testing.assert_close(ops.linear(x, packed), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_reference_computes_them(
    library: Library, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """As they are, with inputs rounded in two ways, as rows, packed and tiled."""
    whole, packed = drawn(scheme)
    x = torch.randn(3, 75, generator=torch.Generator().manual_seed(2))
    rounding = Scheme.parse("w4a8").activations(75)
    expected = [
        reference.linear(x, whole),
        reference.linear(x, whole, activation_bits=8),
        reference.linear(x, whole, activations=rounding),
    ]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the reference was asked")

    monkeypatch.setattr(reference, "linear", refuse)
    monkeypatch.setattr(formats, "dequantize", refuse)
    assert can_tile(list(packed.tensors.values()))
    for weight in (packed, tile(packed)):
        found = [
            ops.linear(x, weight),
            ops.linear(x, weight, mode="int8"),
            ops.linear(x, weight, activations=rounding),
        ]
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)
        assert ops.embedding(torch.tensor([3]), weight).shape == (1, 75)
        assert ops.dequantize(weight).shape == (20, 75)


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


@pytest.mark.parametrize("name", OTHERS)
def test_a_gpu_sends_them_to_triton(name: str) -> None:
    """CUDA's kernels multiply integers alone; where they are forced, the reference does it."""
    _, packed = drawn(name)
    product = dispatch.Product(1, torch.float16, packed.layout)
    gpu = dispatch.Machine("cuda", cpu=False, cuda="", triton="")
    assert dispatch.choose(product, gpu) == dispatch.TRITON
    for forced, kernel in (("triton", dispatch.TRITON), ("cuda", dispatch.REFERENCE)):
        machine = dispatch.Machine("cuda", cpu=False, cuda="", triton="", forced=forced)
        assert dispatch.choose(product, machine) == kernel
