"""Dynamic fixed point: integers whose scale is one exponent, of a group, a channel or all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.formats import (
    Scheme,
    dequantize,
    effective_scale,
    pack,
    payload_bytes,
    quantize_rtn,
    unpack,
)

NAMES = ["w8te", "w8e", "w6g128e", "w4g32e", "w3g64ze", "w2g16z4e"]


@pytest.mark.parametrize("name", NAMES)
def test_every_scale_is_a_power_of_two_and_no_weight_saturates(name: str) -> None:
    weight = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    segments = Scheme.parse(name).segments(200)
    quantized = quantize_rtn(weight, segments)
    (part,) = quantized.segments
    mantissa, _ = torch.frexp(effective_scale(part))
    assert torch.equal(mantissa, torch.full_like(mantissa, 0.5))
    step = float(effective_scale(part).max())
    # Half a step of the widest group; a zero point is off by up to half of its own step.
    off = 0.0 if part.zero is None else part.segment.format.zero_step / 2
    bound = step * (0.5 + off + 1e-6)
    assert not float((dequantize(quantized) - weight).abs().max()) > bound


@settings(deadline=None, max_examples=30)
@given(st.integers(-120, 100), st.integers(2, 8))
def test_integers_times_a_power_of_two_come_back_exactly(exponent: int, bits: int) -> None:
    """As long as both ends of the range are there: nothing but the exponent is stored."""
    half = 1 << (bits - 1)
    codes = torch.arange(-half, half, dtype=torch.float32)
    weight = torch.ldexp(codes, torch.tensor(exponent))[None]
    segments = Scheme.parse(f"w{bits}te").segments(weight.shape[1])
    assert torch.equal(dequantize(quantize_rtn(weight, segments)), weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_takes_one_byte_and_packing_is_lossless(name: str) -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    segments = Scheme.parse(name).segments(96)
    plain = Scheme.parse(name.replace("e", "")).segments(96)
    quantized = quantize_rtn(weight, segments)
    (part,) = quantized.segments
    assert payload_bytes((8, 96), plain) - payload_bytes((8, 96), segments) == part.scale.numel()
    back = unpack(pack(quantized), (8, 96), segments)
    assert torch.equal(dequantize(back), dequantize(quantized))


@pytest.mark.parametrize("name", ["w4g32s4e", "fp8e", "fp4g64e", "w9e", "w4ge"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        Scheme.parse(name)
