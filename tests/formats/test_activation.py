"""Rounded activations: what the codes are, how far they may be off, and what is not rounded."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats import (
    ActivationFormat,
    ActivationSegment,
    Scheme,
    WeightFormat,
    check_activations,
    choose_scales,
    code_book,
    decode_scales,
    encode,
    fake_quantize,
    quantize_activations,
    scale_columns,
    with_clips,
)
from quantlib.formats.activation import FLOAT_ACTIVATIONS, float8, quantize_float8
from quantlib.formats.elements import decode_float

INTEGERS = [ActivationFormat(bits, group=group) for bits in (2, 4, 5, 8) for group in (0, 32)]
INTEGERS += [ActivationFormat(bits, False, group=g) for bits in (2, 4, 7) for g in (0, 32)]
FLOATS = [ActivationFormat(element=name) for name in FLOAT_ACTIVATIONS]
ULP = 2.0**-22
"""Two roundings of float32, relative."""


def one(format: ActivationFormat, length: int) -> tuple[ActivationSegment, ...]:
    """A single segment."""
    return (ActivationSegment(0, length, format),)


def tokens(count: int, columns: int, seed: int = 0) -> Tensor:
    """Tokens of very different sizes, not centred, with an outlier column."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator) + 0.3
    x[:, columns // 2] *= 20
    return x * torch.logspace(-3, 3, count)[:, None]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, nan included."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


formats = st.sampled_from(INTEGERS + FLOATS)
integer_formats = st.sampled_from(INTEGERS)
seeds = st.integers(0, 1000)


@pytest.mark.parametrize("format", INTEGERS + FLOATS, ids=str)
def test_names_read_back(format: ActivationFormat) -> None:
    assert ActivationFormat.parse(str(format)) == format


@given(format=integer_formats, seed=seeds, columns=st.integers(1, 70))
def test_integers_are_within_half_a_step_and_use_their_range(
    format: ActivationFormat, seed: int, columns: int
) -> None:
    x = tokens(5, columns, seed)
    segments = one(format, columns)
    codes, scales = quantize_activations(x, segments)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    largest = (1 << format.bits) - 1 if not format.symmetric else (1 << (format.bits - 1)) - 1
    assert int(codes.to(torch.int32).abs().max()) <= largest
    rounded = fake_quantize(x, segments)
    for index, part in enumerate(scale_columns(segments)):
        error = (rounded[:, part] - x[:, part]).abs().amax(dim=1)
        step = scales[:, index]
        assert bool((error <= step * (0.5 + 2 * largest * ULP)).all())
        used = codes[:, part].to(torch.int32)
        if format.symmetric:
            assert bool((used.abs().amax(dim=1) == largest).all())
        else:
            reach = used.amax(dim=1).clamp(min=0) - used.amin(dim=1).clamp(max=0)
            assert bool((reach >= largest - 1).all())


@given(format=integer_formats, seed=seeds, columns=st.integers(1, 70), clip=st.floats(0.3, 1.0))
def test_an_integer_product_of_the_codes_is_the_product_of_the_rounded_numbers(
    format: ActivationFormat, seed: int, columns: int, clip: float
) -> None:
    segments = with_clips(one(format, columns), [clip])
    x = tokens(4, columns, seed)
    weight = torch.randint(-128, 128, (6, columns), generator=torch.Generator().manual_seed(seed))
    codes, scales = quantize_activations(x, segments)
    total = torch.zeros(4, 6, dtype=torch.float64)
    for index, part in enumerate(scale_columns(segments)):
        product = codes[:, part].to(torch.int64) @ weight[:, part].T
        total += product.double() * scales[:, index, None].double()
    rounded = fake_quantize(x, segments)
    expected = rounded.double() @ weight.T.double()
    # One float32 rounding of code * scale per term.
    slack = rounded.double().abs() @ weight.T.double().abs() * 2.0**-24 + 1e-300
    assert bool(((total - expected).abs() <= slack).all())


@given(format=formats, seed=seeds)
def test_rounding_what_is_rounded_changes_nothing(format: ActivationFormat, seed: int) -> None:
    if format.element == "nvfp4":
        return  # its group scales are rounded themselves, and so is the second token scale
    once = fake_quantize(tokens(5, 70, seed), one(format, 70))
    twice = fake_quantize(once, one(format, 70))
    # The second scale may differ from the first in its last bit, the codes are the same.
    assert torch.allclose(once, twice, rtol=ULP, atol=0)
    if format.is_mx:
        assert torch.equal(once, twice)


@given(format=formats, seed=seeds)
def test_tokens_do_not_see_each_other(format: ActivationFormat, seed: int) -> None:
    x = tokens(6, 70, seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    segments = one(format, 70)
    together = fake_quantize(x, segments)
    assert torch.equal(fake_quantize(x[order], segments), together[order])
    alone = torch.cat([fake_quantize(token, segments)[None] for token in x])
    assert torch.equal(alone, together)
    assert torch.equal(fake_quantize(x.view(2, 3, 70), segments), together.view(2, 3, 70))


@given(format=formats, seed=seeds, power=st.integers(-20, 20))
def test_rounding_scales_with_powers_of_two(
    format: ActivationFormat, seed: int, power: int
) -> None:
    x = tokens(3, 40, seed)
    segments = one(format, 40)
    scaled = fake_quantize(x * 2.0**power, segments)
    assert torch.equal(scaled, fake_quantize(x, segments) * 2.0**power)


@pytest.mark.parametrize("format", INTEGERS + FLOATS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_its_columns_nan_and_no_others(
    format: ActivationFormat, bad: float
) -> None:
    x = tokens(3, 64)
    segments = (ActivationSegment(0, 40, format), ActivationSegment(40, 24, ActivationFormat(8)))
    expected = fake_quantize(x, segments)
    x[1, 2] = bad
    rounded = fake_quantize(x, segments)
    spoiled = format.group if format.group and format.element != "nvfp4" else 40
    expected[1, :spoiled] = math.nan
    assert same(rounded, expected)
    if format.is_integer:
        codes, scales = quantize_activations(x, segments)
        assert not codes[1, :spoiled].any()
        assert scales[1, 0].isnan()


@pytest.mark.parametrize("format", INTEGERS + FLOATS, ids=str)
def test_zeros_stay_zeros_and_the_smallest_numbers_stay_finite(format: ActivationFormat) -> None:
    x = torch.zeros(3, 48)
    x[1] = 1e-45
    x[2, 0] = 3e38
    rounded = fake_quantize(x, one(format, 48))
    assert not rounded[0].any()
    assert bool(rounded.isfinite().all())
    assert bool((rounded[1].abs() <= 8e-45).all())


def test_a_range_beyond_float32_is_not_finite() -> None:
    x = torch.tensor([[3e38, -3e38]])
    assert fake_quantize(x, one(ActivationFormat(4, False), 2)).isnan().all()
    assert torch.equal(fake_quantize(x, one(ActivationFormat(4), 2)).sign(), x.sign())


@pytest.mark.parametrize("format", INTEGERS + FLOATS, ids=str)
def test_a_clip_factor_saturates_what_lies_beyond(format: ActivationFormat) -> None:
    x = tokens(4, 64)
    segments = with_clips(one(format, 64), [0.5])
    rounded = fake_quantize(x, segments)
    # MX scales round down to a power of two, so that up to twice the clipped range is kept; an
    # asymmetric range is shifted to a whole code, by half a step at most; NVFP4's scales round up
    # by a sixteenth.
    slack = {"int": 0.5 / ((1 << format.bits) - 1), "nvfp4": 2.0**-4}.get(format.element, ULP)
    limit = 0.5 * (2.0 if format.is_mx else 1.0) * (1 + slack)
    assert bool((rounded.abs().amax(dim=1) <= x.abs().amax(dim=1) * limit).all())
    assert not torch.equal(rounded, fake_quantize(x, one(format, 64)))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8", "mxfp8e5m2"])
def test_mx_activations_are_mx_weights(name: str) -> None:
    x = tokens(6, 80)
    format = Scheme.parse(name).weight
    assert format is not None
    scale, row_scale, _ = choose_scales(x, format)
    codes = encode(x, format, scale, row_scale)
    steps = decode_scales(scale, row_scale, format).repeat_interleave(32, dim=1)[:, :80]
    expected = decode_float(codes, format.element) * steps
    assert torch.equal(fake_quantize(x, one(ActivationFormat(element=name), 80)), expected)


def test_a_token_in_nvfp4_is_a_tensor_of_its_own() -> None:
    x, format = tokens(6, 80), WeightFormat("e2m1", 16, scale="e4m3")
    for token in x.split(1):
        scale, row_scale, _ = choose_scales(token, format)
        codes = encode(token, format, scale, row_scale)
        steps = decode_scales(scale, row_scale, format).repeat_interleave(16, dim=1)
        expected = decode_float(codes, "e2m1") * steps
        found = fake_quantize(token, one(ActivationFormat(element="nvfp4"), 80))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["fp8", "fp8e5m2", "fp6", "fp4"])
def test_floats_per_token_are_values_of_their_element(name: str) -> None:
    x = tokens(4, 64)
    format = ActivationFormat(element=name)
    rounded = fake_quantize(x, one(format, 64))
    book = code_book(format.float_element)
    largest = book[book.isfinite()].max()
    steps = (rounded * (largest / x.abs().amax(dim=1, keepdim=True)))[:, :, None]
    nearest = (steps - book[book.isfinite()]).abs().amin(dim=2)
    assert bool((nearest <= largest * ULP).all())
    assert torch.allclose(rounded.abs().amax(dim=1), x.abs().amax(dim=1), rtol=ULP, atol=0)


@settings(max_examples=40)
@given(seed=seeds)
def test_asymmetric_codes_are_better_where_a_token_lies_on_one_side(seed: int) -> None:
    x = tokens(4, 64, seed).abs()
    errors = [
        float((fake_quantize(x, one(ActivationFormat(4, symmetric), 64)) / x - 1).square().mean())
        for symmetric in (True, False)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("form", ["fp8", "fp8e5m2", "mxfp8", "mxfp8e5m2"])
def test_codes_of_8_bit_floats_times_their_scales_are_the_rounded_numbers(form: str) -> None:
    x = tokens(5, 100) * torch.tensor([[1e-4], [1.0], [300.0], [0.0], [1.0]])
    x[4, 3] = torch.inf
    segments = one(replace(ActivationFormat.parse(form), clip=0.8), 100)
    codes, scales = quantize_float8(x, segments)
    assert codes.dtype == float8(segments)
    assert codes.dtype.itemsize == 1
    wide = [part.stop - part.start for part in scale_columns(segments)]
    by_column = scales.repeat_interleave(torch.tensor(wide), dim=1)
    expected = fake_quantize(x, segments)
    torch.testing.assert_close(codes.float() * by_column, expected, rtol=0, atol=0, equal_nan=True)
    assert expected[4].isnan().any()


def test_other_formats_have_no_codes_of_8_bit_floats() -> None:
    mixed = (
        ActivationSegment(0, 32, ActivationFormat.parse("fp8")),
        ActivationSegment(32, 32, ActivationFormat.parse("fp8e5m2")),
    )
    for segments in (mixed, one(ActivationFormat(8), 64), one(ActivationFormat.parse("fp6"), 64)):
        assert float8(segments) is None
        with pytest.raises(FormatError, match="no codes of 8-bit floats"):
            quantize_float8(tokens(1, 64), segments)


def test_unrounded_segments_are_left_alone_and_no_segments_round_nothing() -> None:
    x = tokens(2, 64)
    mixed = (
        ActivationSegment(0, 32, ActivationFormat(4)),
        ActivationSegment(32, 32, ActivationFormat()),
    )
    rounded = fake_quantize(x, mixed)
    assert torch.equal(rounded[:, 32:], x[:, 32:])
    assert not torch.equal(rounded, x)
    assert torch.equal(fake_quantize(x, ()), x)
    assert fake_quantize(x.bfloat16(), ()).dtype == torch.float32
    assert scale_columns(mixed) == [slice(0, 32)]


def test_groups_begin_anew_with_each_segment() -> None:
    form = ActivationFormat(8, group=32)
    segments = (ActivationSegment(0, 40, form), ActivationSegment(40, 33, form))
    starts = [(part.start, part.stop) for part in scale_columns(segments)]
    assert starts == [(0, 32), (32, 40), (40, 72), (72, 73)]
    x = tokens(3, 73)
    expected = [fake_quantize(x[:, a:b], one(ActivationFormat(8), b - a)) for a, b in starts]
    assert torch.equal(fake_quantize(x, segments), torch.cat(expected, dim=1))


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1}, {"bits": 9}, {"bits": 8, "symmetric": False}, {"bits": 16, "symmetric": False},
        {"bits": 4, "clip": 0.0}, {"bits": 4, "clip": 1.5}, {"bits": 4, "clip": math.nan},
        {"bits": 4, "group": 24}, {"bits": 4, "group": -16}, {"bits": 16, "group": 32},
        {"element": "fp5"}, {"element": "mxfp4", "symmetric": False},
    ],
)  # fmt: skip
def test_formats_that_do_not_exist_are_refused_with_a_sentence(fields: dict) -> None:
    with pytest.raises(FormatError, match=r"\w+ \w+"):
        ActivationFormat(**fields)


def test_segments_that_do_not_fit_are_refused() -> None:
    form = ActivationFormat(4)
    for segments in (
        (),
        (ActivationSegment(0, 32, form),),
        (ActivationSegment(0, 40, form), ActivationSegment(32, 32, form)),
        (ActivationSegment(0, 0, form), ActivationSegment(0, 64, form)),
    ):
        with pytest.raises(FormatError, match="segments"):
            check_activations(64, segments)
    with pytest.raises(FormatError, match="cover 32 of 64"):
        fake_quantize(torch.zeros(2, 64), one(form, 32))
    with pytest.raises(FormatError, match="no integer codes"):
        quantize_activations(torch.zeros(2, 64), one(ActivationFormat(element="mxfp4"), 64))
    with pytest.raises(FormatError, match="clip factors"):
        with_clips(one(form, 64), [1.0, 1.0])
