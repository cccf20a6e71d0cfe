"""Rotation and rounding of inputs in Triton's interpreter, or on a GPU: the reference's numbers,
and its very codes."""

import pytest
import torch

from quantlib.errors import FormatError
from quantlib.formats.activation import ActivationFormat, ActivationSegment, quantize
from quantlib.kernels.cpu.forms import BlockRotation
from quantlib.kernels.triton import inputs as kernels
from quantlib.transforms import hadamard


def inputs(tokens, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator)


def rotation(size, still=0):
    rows, _ = hadamard.split(size)
    return BlockRotation(size, hadamard._dense(rows).float() if rows > 1 else None, still)


def quantized(x, activations, device, rotation=None):
    """Codes and scales, as the kernel of a device makes them."""
    codes, scales = kernels.quantize(x.to(device), activations, rotation)
    return codes.cpu(), scales.cpu()


def segments(*parts):
    found, start = [], 0
    for form, length in parts:
        found.append(ActivationSegment(start, length, ActivationFormat.parse(form)))
        start += length
    return tuple(found)


@pytest.mark.parametrize(
    ("size", "columns", "still"),
    [(64, 64, 0), (16, 96, 16), (128, 300, 8), (96, 96, 0), (192, 400, 16), (24, 48, 0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_are_rotated_as_the_reference_does(device, size, columns, still, dtype):
    x = inputs(3, columns).to(dtype)
    found = kernels.rotate(x.to(device), rotation(size, still)).cpu()
    turned = columns - still
    wide = hadamard.rotate(x[:, :turned].double(), size)
    assert found.dtype == dtype
    assert torch.equal(found[:, turned:], x[:, turned:])
    # A sum of `size` numbers of magnitude `mass`, scaled; where blocks overlap, twice, with a
    # rounding to the dtype between; and one rounding at the end.
    info = torch.finfo(dtype)
    mass = 2 * x.double().norm(dim=1, keepdim=True)
    bound = mass * (2 * size * 2.0**-24 + 2 * info.eps)
    assert ((found[:, :turned].double() - wide).abs() <= bound).all()


@pytest.mark.parametrize("form", ["8", "4z", "8g128", "4zg64", "3g48", "7zg16"])
def test_codes_and_scales_are_the_formats_own_bits(device, form):
    x = inputs(6, 200)
    x[1] = 0
    x[2, 3] = torch.inf
    x[3, 199] = torch.nan
    x[4] *= 1e-42  # subnormal
    activations = segments((form, 136), ("8", 64))
    codes, scales = quantized(x, activations, device)
    wanted, wanted_scales = quantize(x, activations)
    torch.testing.assert_close(scales, wanted_scales, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes, wanted)


def test_clipping_and_16_bit_inputs(device):
    x = inputs(4, 96).to(torch.bfloat16)
    form = ActivationFormat(4, symmetric=False, clip=0.9)
    activations = (ActivationSegment(0, 96, form),)
    codes, scales = quantized(x, activations, device)
    wanted, wanted_scales = quantize(x, activations)
    assert torch.equal(codes, wanted)
    assert torch.equal(scales, wanted_scales)


CASES = [
    (64, 0, [("8g16", 128)]),
    (128, 0, [("4z", 128)]),
    (128, 16, [("4zg64", 256), ("8", 16)]),
    (96, 16, [("4zg16", 192), ("8", 16)]),  # a dense part of 12
    (96, 0, [("8", 192)]),  # a scale of two blocks: rotated first
    (64, 0, [("8g128", 160)]),  # blocks that overlap: rotated first
]


@pytest.mark.parametrize(("size", "still", "parts"), CASES)
def test_rotating_and_rounding_at_once(device, size, still, parts):
    """Codes differ by one where the rotated number lies between two, and scales by rounding."""
    activations = segments(*parts)
    x = inputs(4, sum(length for _, length in parts))
    codes, scales = quantized(x, activations, device, rotation(size, still))
    turned = x.clone()
    last = x.shape[1] - still
    turned[:, :last] = hadamard.rotate(x[:, :last].double(), size).float()
    wanted, wanted_scales = quantize(turned, activations)
    torch.testing.assert_close(scales, wanted_scales, rtol=2 * size * 2.0**-24, atol=0)
    assert (codes.int() - wanted.int()).abs().max() <= 1
    assert (codes != wanted).float().mean() < 0.01


def test_blocks_on_a_device_are_the_rotation_they_are_made_of(device):
    """As dispatch gives them: with parts that lie on the device, and a factor of their own."""
    x, dense = inputs(3, 192), hadamard._dense(12).float()
    own = kernels.Blocks(dense.to(device), 8, 96**-0.5)
    found = kernels.rotate(x.to(device), own).cpu()
    assert torch.equal(found, kernels.rotate(x.to(device), BlockRotation(96, dense)).cpu())
    twice = kernels.Blocks(dense.to(device), 8, 2 * 96**-0.5)
    assert torch.equal(kernels.rotate(x.to(device), twice).cpu(), 2 * found)


def test_what_is_too_large_for_a_program_is_a_sentence(interpreter):
    with pytest.raises(FormatError, match="rotate in torch"):
        kernels.rotate(torch.zeros(1, 1 << 15), BlockRotation(1 << 15))
    with pytest.raises(FormatError, match="do not divide 100 columns"):
        kernels.rotate(torch.zeros(1, 100), rotation(24))
    with pytest.raises(FormatError, match="no integer codes"):
        kernels.quantize(torch.zeros(1, 64), segments(("fp8", 64)))
