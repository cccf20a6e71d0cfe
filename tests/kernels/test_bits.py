"""Every instruction set gives the bits that `tile_reference` computes one operation at a time."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantlib.formats import QuantizedSegment, QuantizedWeight, Scheme, Segment, pack
from quantlib.kernels import layouts, tile_reference
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.packed import PackedWeight

from .schemes import EVERY, MIXED

SETTINGS = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)
any_scheme = st.sampled_from(EVERY)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, with NaNs in the same places. (0 and -0 are the same number.)"""
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(), expected.nan_to_num()
    )


@settings(max_examples=400)
@given(a=any_float, b=any_float, c=any_float)
def test_fma_rounds_once(a, b, c):
    found = tile_reference.fma(*(torch.tensor(v, dtype=torch.float32) for v in (a, b, c)))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    # The neighbours of a correctly rounded value are no nearer, and a tie goes to the even one.
    if not torch.isfinite(found):
        assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103
        return
    bits = found.view(torch.int32)
    error = abs(Fraction(float(found)) - exact)
    for direction in (torch.inf, -torch.inf):
        other = torch.nextafter(found, torch.tensor(direction))
        if torch.isfinite(other):
            distance = abs(Fraction(float(other)) - exact)
            assert error < distance or (error == distance and int(bits) % 2 == 0)


def check_bits(library, weight, packed, tokens: int, isas, act_group: int = 0) -> None:
    """All modes of a weight on these instruction sets."""
    tiled = layouts.tile(packed)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, weight.shape[1], generator=generator)
    bias = torch.randn(weight.shape[0], generator=generator)
    rows = tile_reference.dequantize(weight)
    for mode, group in (("exact", 0), ("int8", 0), ("int8", act_group)):
        expected = tile_reference.linear(x, weight, bias, mode, group)
        for isa in isas:
            found = library.linear(tiled.description, x, bias, mode, isa=isa, act_group=group)
            assert same_bits(found, expected), (isa, mode, group)
    for isa in isas:
        assert torch.equal(library.dequantize(tiled.description, isa=isa), rows), isa


@pytest.mark.parametrize("scheme", EVERY)
def test_every_format_on_every_instruction_set(library, draw, scheme):
    isas = list(filter(library.supports, cpu.ISAS[1:]))
    for rows, length, tokens in ((37, 100, 3), (16, 300, 1)):
        weight, packed = draw(rows, [(scheme, length)], seed=length)
        check_bits(library, weight, packed, tokens, isas, 128)


@pytest.mark.parametrize("parts", MIXED)
def test_mixed_segments_on_every_instruction_set(library, draw, parts):
    isas = list(filter(library.supports, cpu.ISAS[1:]))
    for tokens in (1, 5, 17):
        weight, packed = draw(70, parts, seed=tokens)
        check_bits(library, weight, packed, tokens, isas, 256)


@pytest.mark.parametrize("scheme", EVERY)
def test_no_number_of_tokens_changes_a_bit(library, draw, isa, scheme):
    """Kernels differ by the number of tokens: one, a few, a panel and the rest after panels. Panels
    begin at 49 tokens where 2 and 4 bits are all there is, elsewhere at 17."""
    _, packed = draw(70, [(scheme, 300), ("w4g128", 100)])
    tiled = layouts.tile(packed)
    x = torch.randn(49, 400, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(70, generator=torch.Generator().manual_seed(2))
    for mode in ("exact", "int8"):
        expected = library.linear(tiled.description, x, bias, mode, isa="portable")
        for tokens in (1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 16, 17, 19, 31, 32, 40, 48, 49):
            found = library.linear(tiled.description, x[:tokens], bias, mode, isa=isa)
            assert same_bits(found, expected[:tokens]), (mode, tokens)


@pytest.mark.parametrize("scheme", ["w4g128", "w8g32", "w5g64z", "w3g64z5s5", "w2g16s4", "mxfp4"])
@pytest.mark.parametrize("act_group", [16, 64, 128, 384])
def test_activation_groups_give_the_same_bits_for_any_number_of_tokens(
    library, draw, isa, scheme, act_group
):
    """Groups shorter and longer than what shares a scale of the weight; a strip of one block."""
    weight, packed = draw(48, [(scheme, 416), ("w4g64z", 90)])
    tiled = layouts.tile(packed)
    x = torch.randn(49, 506, generator=torch.Generator().manual_seed(act_group))
    expected = tile_reference.linear(x, weight, None, "int8", act_group)
    for tokens in (*range(1, 10), 13, 20, 49):
        found = library.linear(
            tiled.description, x[:tokens], None, "int8", isa=isa, act_group=act_group
        )
        assert same_bits(found, expected[:tokens]), tokens


@pytest.mark.parametrize("scheme", ["w2g64z4s4", "w4g32zs4", "w3g16s4", "w5g32zs5", "w4g64z5s5"])
@pytest.mark.parametrize("length", [512, 544, 1200, 2112])
def test_whole_sums_end_with_their_runs(library, draw, isa, scheme, length):
    """Runs of 512 columns, the last one shorter; also behind another segment."""
    weight, packed = draw(40, [("w8g64", 96), (scheme, length)], seed=length)
    tiled = layouts.tile(packed)
    x = torch.randn(20, 96 + length, generator=torch.Generator().manual_seed(1))
    expected = tile_reference.linear(x, weight, None, "int8")
    for tokens in (1, 2, 3, 8, 20):
        found = library.linear(tiled.description, x[:tokens], None, "int8", isa=isa)
        assert same_bits(found, expected[:tokens]), tokens


def test_the_largest_whole_sums_do_not_overflow(library, isa):
    """63 * 255 * 127 for 512 columns is 2^31 less three percent."""
    length = 1024
    segment = Segment(0, length, Scheme.parse("w8g64zs6").weight)
    shape = (40, length // 64)
    for code, zero, sign in product((0, 255), (0, 255), (1, -1)):
        part = QuantizedSegment(
            segment,
            torch.full((40, length), code, dtype=torch.uint8),
            torch.full(shape, 63, dtype=torch.uint8),
            torch.full((40,), 63.0).half(),
            torch.full(shape, zero, dtype=torch.uint8),
        )
        weight = QuantizedWeight((40, length), (part,))
        packed = PackedWeight.from_tensors(pack(weight), weight.shape, [segment])
        tiled = layouts.tile(packed)
        for tokens in (1, 5, 19):
            x = torch.full((tokens, length), 127.0 * sign)
            found = library.linear(tiled.description, x, None, "int8", isa=isa)
            assert torch.equal(found, tile_reference.linear(x, weight, None, "int8"))
            exact = 63.0 * (code - zero) * 127 * sign * length
            torch.testing.assert_close(found, torch.full_like(found, exact), rtol=3e-7, atol=0)


@SETTINGS
@given(
    parts=st.lists(st.tuples(any_scheme, st.integers(1, 400)), min_size=1, max_size=4),
    rows=st.integers(1, 100),
    tokens=st.integers(1, 52),
    threads=st.integers(1, 3),
    act_group=st.sampled_from([0, 128, 256, 384]),
    seed=st.integers(0, 1000),
)
def test_any_mixture_of_segments_and_shapes(
    library, draw, parts, rows, tokens, threads, act_group, seed
):
    _, packed = draw(rows, parts, seed=seed)
    tiled = layouts.tile(packed)
    columns = packed.shape[1]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    if seed % 4 == 0:
        x[seed % tokens, seed % columns] = (torch.nan, torch.inf, -torch.inf, 1e30)[seed // 4 % 4]
    for mode, group in (("exact", 0), ("int8", act_group)):
        expected = library.linear(
            tiled.description, x, None, mode, isa="portable", threads=1, act_group=group
        )
        for isa in filter(library.supports, cpu.ISAS[2:]):
            found = library.linear(
                tiled.description, x, None, mode, isa=isa, threads=threads, act_group=group
            )
            assert same_bits(found, expected), (isa, mode)


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_values_that_round_or_overflow_in_unusual_ways(library, draw, isa, mode):
    weight, packed = draw(37, [("w5g32", 64), ("mxfp6e2m3", 40)])
    x = torch.zeros(8, 104)
    x[0] = torch.linspace(-190, 190, 104).round() * 2**-149  # subnormal
    x[1] = 1e-45  # its scale underflows to zero
    x[2] = torch.linspace(-1e-38, 1e-38, 104)
    x[3] = torch.linspace(-1e30, 1e30, 104)
    x[4, 5] = -2.5
    x[5] = torch.arange(104) - 51.5  # quotients around one half
    x[6] = 3e38
    tiled = layouts.tile(packed)
    found = library.linear(tiled.description, x, None, mode, isa=isa)
    assert same_bits(found, tile_reference.linear(x, weight, None, mode))


def test_the_reference_in_pieces_is_the_reference(draw):
    """Within float32 sums: the definition of the kernels' arithmetic defines a linear."""
    from quantlib.kernels import reference

    for parts, (mode, bits) in product(MIXED, (("exact", 16), ("int8", 8))):
        weight, _ = draw(20, parts)
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
        expected = reference.linear(x.double(), weight, None, bits, torch.float64)
        found = tile_reference.linear(x, weight, None, mode)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-2)
