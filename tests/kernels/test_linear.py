"""The C++ linear equals the references: every width, group, ragged K, token count, and ISA."""

from itertools import product

import pytest
import torch
from torch import Tensor

from quantlib.formats import QuantizedSegment, QuantizedWeight, Scheme, Segment, dequantize, pack
from quantlib.kernels import layouts, reference
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.packed import PackedWeight

from .schemes import FLOATS, FRACTIONAL_ZEROS, GROUPS, INTEGER_WIDTHS, MIXED, SHARED_BYTE, TWO_LEVEL

ROWS = 37  # crosses the blocks of 16 and the strips of 32 output rows, and ends inside one
LENGTHS = (1, 31, 64, 100, 576, 1536)
TOKENS = (1, 2, 7, 33)

MODE_BITS = (("exact", 16), ("int8", 8))

SUM_ERROR = 2e-6
"""Allowed error per unit of |x| |w|: float32 sums of up to 1536 terms in chains of 128, each
addition rounding by 6e-8, with some room. A wrong code, scale or zero point is thousands of it."""


def run(library: cpu.Library, packed: PackedWeight, x: Tensor, mode: str, **how) -> Tensor:
    """One call of the library with a packed weight."""
    tiled = layouts.tile(packed)
    return library.linear(tiled.description, x, None, mode, **how)


def integer_tokens(tokens: int, length: int, generator: torch.Generator) -> Tensor:
    """Activations that int8 rounding leaves alone: integers, and in each token 127 the largest."""
    x = torch.randint(-127, 128, (tokens, length), generator=generator).float()
    x[:, 0] = 127.0
    return x


def assert_close(found: Tensor, x: Tensor, weight: Tensor, expected: Tensor) -> None:
    """`found` is `expected` (float64) up to float32 sums of the products x * weight."""
    allowed = SUM_ERROR * (x.double().abs() @ weight.double().abs().T) + 1e-30
    worst = ((found.double() - expected).abs() / allowed).max().item()
    assert worst <= 1, f"{worst:.3g} times the allowed error"  # NaN fails too


@pytest.mark.parametrize("family", INTEGER_WIDTHS)
def test_int8_mode_gives_the_integer_sums_exactly(library, draw, isa, family):
    generator = torch.Generator().manual_seed(1)
    for group, length in product(GROUPS, LENGTHS):
        scheme = family.format(group)
        weight, packed = draw(ROWS, [(scheme, length)], seed=length, unit_scales=True)
        integers = dequantize(weight).double()
        x = integer_tokens(max(TOKENS), length, generator)
        expected = (x.double() @ integers.T).float()  # exact: integers below 2^24
        for tokens in TOKENS:
            found = run(library, packed, x[:tokens], "int8", isa=isa)
            assert torch.equal(found, expected[:tokens]), f"{scheme}, K = {length}, M = {tokens}"


@pytest.mark.parametrize("family", [*INTEGER_WIDTHS, *FRACTIONAL_ZEROS])
def test_both_modes_equal_the_float64_reference(library, draw, isa, family):
    generator = torch.Generator().manual_seed(2)
    for group, length in product(GROUPS, (31, 576)):
        check_against_reference(library, draw, isa, family.format(group), length, generator)


@pytest.mark.parametrize("scheme", [*TWO_LEVEL, *SHARED_BYTE, *FLOATS])
def test_every_scale_and_element_equals_the_float64_reference(library, draw, isa, scheme):
    generator = torch.Generator().manual_seed(3)
    for length in LENGTHS:
        check_against_reference(library, draw, isa, scheme, length, generator)


def check_against_reference(library, draw, isa, scheme, length, generator):
    weight, packed = draw(ROWS, [(scheme, length)], seed=length)
    matrix = dequantize(weight)
    x = torch.randn(max(TOKENS), length, generator=generator)
    for mode, bits in MODE_BITS:
        expected = reference.linear(x.double(), weight, None, bits, torch.float64)
        for tokens in TOKENS:
            found = run(library, packed, x[:tokens], mode, isa=isa)
            assert_close(found, x[:tokens], matrix, expected[:tokens])


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_codes_and_activations_neither_saturate_nor_overflow(library, isa, bits):
    """AVX2's 16-bit sums hold one pair of products of 7 bits, 32 of 2 bits, and none of 8 bits."""
    length, largest = 512, 2**bits - 1
    for group, sign, tokens in product((16, 64, 256, 0), (1, -1), (1, 8)):
        segment = Segment(0, length, Scheme.parse(f"w{bits}{f'g{group}' if group else ''}z").weight)
        shape = (ROWS, segment.format.groups(length))
        codes = torch.full((ROWS, length), largest, dtype=torch.uint8)
        part = QuantizedSegment(
            segment, codes, torch.ones(shape).half(), None, torch.zeros(shape).to(torch.uint8)
        )
        weight = QuantizedWeight((ROWS, length), (part,))
        packed = PackedWeight.from_tensors(pack(weight), weight.shape, [segment])
        x = torch.full((tokens, length), 127.0 * sign)
        expected = torch.full((tokens, ROWS), largest * 127.0 * sign * length)
        assert torch.equal(run(library, packed, x, "int8", isa=isa), expected)


def test_a_long_channel_does_not_overflow_32_bits(library, isa):
    """255 * 127 * 70000 is more than 2^31: one scale per channel must still be summed in pieces."""
    length = 70_000
    segment = Segment(0, length, Scheme.parse("w8z").weight)
    codes = torch.full((2, length), 255, dtype=torch.uint8)
    part = QuantizedSegment(
        segment, codes, torch.ones(2, 1).half(), None, torch.zeros(2, 1).to(torch.uint8)
    )
    weight = QuantizedWeight((2, length), (part,))
    packed = PackedWeight.from_tensors(pack(weight), weight.shape, [segment])
    for tokens in (1, 6):
        found = run(library, packed, torch.full((tokens, length), 127.0), "int8", isa=isa)
        expected = torch.full((tokens, 2), 255.0 * 127.0 * length)
        # 547 pieces are added one after the other, each sum rounded by up to 6e-8 of itself.
        torch.testing.assert_close(found, expected, rtol=547 * 6e-8, atol=0)


def test_a_mean_in_the_activations_costs_no_accuracy(library, draw, isa):
    """q*a and z*a nearly cancel here: subtracting them as floats would lose three digits."""
    for scheme, tokens in product(("w8", "w8g64", "w8g128z", "w4g64z6"), (1, 33)):
        weight, packed = draw(ROWS, [(scheme, 1536)], unit_scales=True)
        x = torch.full((tokens, 1536), 126.0)
        x[:, ::7] = 127.0
        expected = (x.double() @ dequantize(weight).double().T).float()
        found = run(library, packed, x, "int8", isa=isa)
        if "z6" in scheme:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.05)
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("parts", MIXED)
def test_segments_of_different_formats_are_one_sum(library, draw, isa, parts):
    weight, packed = draw(ROWS, parts)
    matrix, length = dequantize(weight), sum(part[1] for part in parts)
    for tokens, (mode, bits) in product(TOKENS, MODE_BITS):
        x = torch.randn(tokens, length, generator=torch.Generator().manual_seed(tokens))
        expected = reference.linear(x.double(), weight, None, bits, torch.float64)
        assert_close(run(library, packed, x, mode, isa=isa), x, matrix, expected)


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_the_number_of_threads_changes_no_bit(library, draw, isa, mode):
    # Large enough that every instruction set wakes its threads.
    _, packed = draw(1100, [("w4g64z6", 1024), ("w8", 512)])
    for tokens in (1, 4) if mode == "exact" else (1, 9):
        x = torch.randn(tokens, 1536, generator=torch.Generator().manual_seed(5))
        alone = run(library, packed, x, mode, isa=isa, threads=1)
        for threads in (2, 3):
            assert torch.equal(run(library, packed, x, mode, isa=isa, threads=threads), alone)


def test_outputs_too_large_for_the_caches_are_those_of_smaller_calls(library, draw, isa):
    """They are written past the caches: 36 MB of them here."""
    _, packed = draw(8208, [("w4g32", 32)])
    x = torch.randn(1100, 32, generator=torch.Generator().manual_seed(9))
    found = run(library, packed, x, "int8", isa=isa)
    for first in range(0, 1100, 100):
        some = slice(first, first + 100)
        assert torch.equal(run(library, packed, x[some], "int8", isa=isa), found[some])


def test_bias_is_added_once_to_each_output(library, draw, isa):
    _, packed = draw(ROWS, [("w4g64", 64)])
    tiled = layouts.tile(packed)
    bias = torch.arange(ROWS, dtype=torch.float32)
    for mode, tokens in product(("exact", "int8"), (1, 9)):
        found = library.linear(tiled.description, torch.zeros(tokens, 64), bias, mode, isa=isa)
        assert torch.equal(found, bias.expand(tokens, -1))


def test_activations_that_are_not_numbers_stay_visible_and_alone(library, draw, isa):
    weight, packed = draw(ROWS, [("w4g64", 100)])
    for bad, tokens in product((float("nan"), float("inf"), -float("inf")), (3, 9)):
        x = torch.randn(tokens, 100, generator=torch.Generator().manual_seed(6))
        x[1, 70] = bad
        found = run(library, packed, x, "int8", isa=isa)
        assert found[1].isnan().all()
        assert reference.linear(x, weight, activation_bits=8)[1].isnan().all()
        assert torch.isfinite(found[[0, 2]]).all()


def test_tiny_and_zero_activations_are_rounded_like_the_reference(library, draw, isa):
    weight, packed = draw(ROWS, [("w5g32", 64)])
    x = torch.zeros(7, 64)
    x[0] = torch.linspace(-190, 190, 64).round() * 2**-149  # its scale is not 1.5 but 1 subnormal
    x[1] = 1e-45  # its scale underflows to zero
    x[2] = torch.linspace(-1e-38, 1e-38, 64)
    x[3] = torch.linspace(-1e30, 1e30, 64)
    x[4, 5] = -2.5
    x[5] = torch.arange(64) - 31.5  # quotients around one half
    expected = reference.linear(x, weight, activation_bits=8)
    found = run(library, packed, x, "int8", isa=isa)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-45)


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_a_number_that_is_none_reaches_every_output_of_its_token(library, draw, isa, mode):
    """Also in the last columns of a ragged segment and with elements without an int8 mode."""
    for parts, column in product(([("w3g32z", 50), ("w8", 7)], [("fp8", 57)]), (0, 49, 56)):
        _, packed = draw(ROWS, parts)
        x = torch.randn(5, 57, generator=torch.Generator().manual_seed(7))
        clean = run(library, packed, x, mode, isa=isa)
        x[3, column] = torch.nan
        found = run(library, packed, x, mode, isa=isa)
        assert found[3].isnan().all()
        assert torch.equal(found[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


def test_huge_activations_overflow_to_infinity_and_no_further(library, draw, isa):
    weight, packed = draw(ROWS, [("w4g64", 128)])
    x = torch.full((2, 128), 3e38)
    x[1] = 1.0
    for mode, bits in MODE_BITS:
        found = run(library, packed, x, mode, isa=isa)
        assert not torch.isfinite(found[0]).all()
        expected = reference.linear(x.double(), weight, None, bits, torch.float64)
        assert_close(found[1:], x[1:], dequantize(weight), expected[1:])


@pytest.mark.parametrize("scheme", ["w4g64", "w8g128z", "mxfp4", "fp8"])
def test_activation_groups_have_scales_of_their_own(library, draw, isa, scheme):
    """A token whose columns differ in size keeps the small ones."""
    weight, packed = draw(ROWS, [(scheme, 300), ("w8", 200)])
    x = torch.randn(5, 500, generator=torch.Generator().manual_seed(8))
    x[:, 128:256] *= 1000
    matrix = dequantize(weight)
    for group in (128, 256, 512):
        found = run(library, packed, x, "int8", isa=isa, act_group=group)
        expected = reference.linear(x.double(), weight, None, 8, torch.float64, act_group=group)
        assert_close(found, x, matrix, expected)
    grouped = run(library, packed, x, "int8", isa=isa, act_group=128)
    small = x.clone()
    small[:, 128:256] = 0
    error = run(library, packed, small, "int8", isa=isa, act_group=128).double()
    error -= small.double() @ matrix.double().T
    # Rounded with the scale of the large columns, the small ones would be lost: an error of 1.
    assert error.abs().mean() <= 0.02 * (small @ matrix.T).abs().mean()
    assert torch.isfinite(grouped).all()
