"""Plain rounding is as near as its format allows, for every weight that has a format."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.formats import (
    QuantizedSegment,
    Scheme,
    Segment,
    code_book,
    decode_scales,
    dequantize,
    effective_scale,
    encode,
    group_blocks,
    quantize_rtn,
    store_scales,
)
from quantlib.formats import choose_scales as choose

INTEGERS = [f"w{bits}{rest}" for bits in range(2, 9) for rest in ("", "g32", "g128z", "tz", "z")]
FINE_ZEROS = ["w2g32z8", "w3g64z4s6", "w4z6", "w5tz7"]
COARSE_ZEROS = ["w8g32z4", "w6z3"]
TWO_LEVEL = [f"w{bits}g32{rest}" for bits in range(2, 9) for rest in ("s4", "zs6", "zs8")]
FLOATS = ["fp8", "fp8e5m2g32", "fp6t", "fp6e2m3g64", "fp4g32s6"]
SHARED = ["mxfp8", "mxfp8e5m2", "mxfp6", "mxfp6e2m3", "mxfp4", "nvfp4"]
EXPONENTS = ["w8e", "w4te", "w4g32e", "w3g64ze", "w2g16z4e"]
EVERY = [*INTEGERS, *EXPONENTS, *FINE_ZEROS, *COARSE_ZEROS, *TWO_LEVEL, *FLOATS, *SHARED]

shapes = st.tuples(
    st.integers(1, 4), st.one_of(st.sampled_from([1, 31, 33, 576]), st.integers(1, 150))
)


def random_weight(shape: tuple[int, int], seed: int, size: float = 1.0) -> torch.Tensor:
    """Normal weights, rows of different sizes; now and then a row of zeros or of one sign."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    kind = torch.randint(0, 6, (shape[0], 1), generator=generator)
    weight = torch.where(kind == 0, torch.zeros(()), torch.where(kind == 1, weight.abs(), weight))
    return weight * torch.exp(torch.randn(shape[0], 1, generator=generator)) * size


def rounded(weight: torch.Tensor, name: str) -> QuantizedSegment:
    return quantize_rtn(weight, Scheme.parse(name).segments(weight.shape[1])).segments[0]


def per_weight(part: QuantizedSegment, values: torch.Tensor) -> torch.Tensor:
    """[N, G] values, one per group, repeated for each weight of the group."""
    out = torch.empty(part.codes.shape, dtype=values.dtype)
    for block in group_blocks(part.segment.length, part.segment.format.group_size):
        block.view(out).copy_(values[:, block.groups, None].expand(out.shape[0], -1, block.size))
    return out


def representable(part: QuantizedSegment) -> torch.Tensor:
    """float64 [N, K, codes]: everything each weight could have been rounded to."""
    format = part.segment.format
    if format.is_integer:
        values = torch.arange(1 << format.bits, dtype=torch.float64).expand(*part.codes.shape, -1)
        zero = torch.tensor([[float(1 << (format.bits - 1))]], dtype=torch.float64)
        if part.zero is not None:
            zero = part.zero.to(torch.float64) * part.segment.format.zero_step
        values = values - per_weight(part, zero.expand(effective_scale(part).shape))[..., None]
    else:
        book = code_book(format.element).to(torch.float64)
        values = book[torch.isfinite(book)]
    return values * per_weight(part, effective_scale(part).to(torch.float64))[..., None]


@settings(deadline=None)
@given(st.sampled_from(EVERY), shapes, st.integers(0, 2**31), st.integers(-14, 10))
def test_every_code_is_a_nearest_one(
    name: str, shape: tuple[int, int], seed: int, exponent: int
) -> None:
    weight = random_weight(shape, seed, 2.0**exponent)
    part = rounded(weight, name)
    if part.segment.length * (1 << part.segment.format.bits) > 40_000:
        weight = weight[:1]
        part = rounded(weight, name)
    exact = weight.to(torch.float64)
    choices = representable(part)
    best = (choices - exact[..., None]).abs().amin(dim=2)
    segments = [part.segment]
    error = (dequantize(quantize_rtn(weight, segments)).to(torch.float64) - exact).abs()
    # A weight near the middle of two codes may go either way when the float32 quotient, or its sum
    # with the zero point, rounds onto the middle. Both are at most 2^8 steps large, or clip anyway.
    step = per_weight(part, effective_scale(part))
    slack = (2.0**-14 if part.segment.format.is_integer else 0) * step + 2.0**-22 * exact.abs()
    assert not (error > best + slack).any()
    assert torch.isfinite(error).all()


@settings(deadline=None)
@given(
    st.sampled_from([*INTEGERS, "w4z6", "w5tz7"]),
    shapes,
    st.integers(0, 2**31),
    st.integers(-4, 10),
)
def test_integers_are_within_half_a_step(
    name: str, shape: tuple[int, int], seed: int, exponent: int
) -> None:
    weight = random_weight(shape, seed, 2.0**exponent)
    part = rounded(weight, name)
    step = per_weight(part, effective_scale(part))
    error = (dequantize(quantize_rtn(weight, [part.segment])) - weight).abs()
    # Storing the scale in float16 may take 2^-11 off the range of 2^bits steps, all of it at an
    # end.
    bound = 0.5 + 2.0 ** (part.segment.format.bits - 11) + 1e-4
    assert not (error > bound * step).any()


@settings(deadline=None)
@given(st.sampled_from(EVERY), shapes, st.integers(0, 2**31))
def test_a_scale_is_zero_exactly_where_all_weights_are(
    name: str, shape: tuple[int, int], seed: int
) -> None:
    part = rounded(random_weight(shape, seed), name)
    weight = random_weight(shape, seed)
    blocks = group_blocks(shape[1], part.segment.format.group_size)
    empty = torch.cat([(block.view(weight) == 0).all(dim=2) for block in blocks], dim=1)
    if part.scale.shape[0] == 1:
        empty = empty.all(dim=0, keepdim=True).expand(shape[0], -1)
    if part.segment.format.scale != "e8m0":  # which has no zero: its codes are
        assert torch.equal(effective_scale(part) == 0, empty)
    if part.segment.format.zero_step == 1.0:  # finer zero points give up an exact zero
        zeros = dequantize(quantize_rtn(weight, [part.segment]))[weight == 0]
        assert torch.equal(zeros, torch.zeros_like(zeros))


@pytest.mark.parametrize("name", EVERY)
def test_a_group_of_denormals_is_not_a_group_of_zeros(name: str) -> None:
    weight = torch.zeros(2, 40)
    weight[:, ::8] = 2.0**-149
    assert (effective_scale(rounded(weight, name)) > 0).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-42, 1e-38, 1e-12, 1e-7, 3e4])
def test_extreme_weights_stay_finite_and_never_grow(name: str, size: float) -> None:
    weight = random_weight((3, 40), 0).clamp(-2, 2) * size
    values = dequantize(quantize_rtn(weight, Scheme.parse(name).segments(40)))
    assert torch.isfinite(values).all()
    # Two-level codes and float16 subnormals are coarse: a weight may double, but not more; below
    # half the smallest scale everything is zero.
    assert not (values.abs() > 2 * weight.abs().max() + 2.0**-24).any()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_weights_that_are_not_numbers_are_refused(name: str, value: float) -> None:
    weight = torch.ones(3, 40)
    weight[1, 35] = value
    format = Scheme.parse(name).weight
    scale, row_scale, zero = choose(torch.ones(3, 40), format)
    with pytest.raises(FormatError, match="row 1, column 35"):
        quantize_rtn(weight, Scheme.parse(name).segments(40))
    with pytest.raises(FormatError, match="row 1, column 35"):
        encode(weight, format, scale, row_scale, zero)


def test_a_refusal_names_the_weights_own_column_and_sees_overflow() -> None:
    weight = torch.ones(2, 64, dtype=torch.float64)
    weight[0, 40] = 1e300  # finite in float64, not in the float32 that rounding works in
    format = Scheme.parse("w4").weight
    with pytest.raises(FormatError, match="row 0, column 40"):
        quantize_rtn(weight, [Segment(0, 32, format), Segment(32, 32, format)])


@pytest.mark.parametrize("name", ["w4", "w4g32z", "w2t", "w4g32zs6", "fp4"])
def test_scales_beyond_float16_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="65504"):
        quantize_rtn(torch.full((2, 64), 3e6), Scheme.parse(name).segments(64))


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
def test_shared_exponents_hold_any_float32(name: str) -> None:
    weight = torch.tensor([[3e38, -2e38, 1e38, 0.0]])
    values = dequantize(quantize_rtn(weight, Scheme.parse(name).segments(4)))
    torch.testing.assert_close(values, weight, rtol=0.26, atol=0)  # e2m1's widest half-gap is 1/4


def squared_errors(bits: int) -> tuple[float, float, float]:
    """Of symmetric rounding of Gaussian groups of 32: ours, amax/(2^(b-1) - 1), amax/2^(b-1)."""
    weight = torch.randn(8192, 32, generator=torch.Generator().manual_seed(0))
    format, half = Scheme.parse(f"w{bits}").weight, 1 << (bits - 1)
    errors = []
    for scale in (None, weight.abs().amax(1) / (half - 1), weight.abs().amax(1) / half):
        stored = (
            choose(weight, format)[0] if scale is None else store_scales(scale[:, None], format)[0]
        )
        part = QuantizedSegment(Segment(0, 32, format), encode(weight, format, stored), stored)
        values = (part.codes.to(torch.float32) - half) * effective_scale(part)
        errors.append(float((values - weight).square().mean()))
    return errors[0], errors[1], errors[2]


def test_the_symmetric_scale_is_as_good_as_its_description_says() -> None:
    # 262,144 weights: the ratios of mean squares repeat to about 1 %.
    for bits, ratio in ((2, 2.43), (3, 1.48), (4, 1.16)):
        ours, usual, _ = squared_errors(bits)
        assert usual / ours == pytest.approx(ratio, rel=0.02)
    ours, _, clipping = squared_errors(2)
    assert clipping / ours == pytest.approx(0.86, rel=0.02)
    for bits in (5, 6, 8):
        ours, usual, clipping = squared_errors(bits)
        assert ours <= 1.1 * min(usual, clipping)


def test_a_zero_point_is_taken_with_the_stored_scale() -> None:
    # Four-bit scale codes are coarse: with the ideal scale, the zero point would be one off.
    weight = torch.tensor([[*[-0.75] * 16, *[0.2] * 16, *[-1.9] * 16, *[3.0] * 16]])
    format = Scheme.parse("w4g32zs4").weight
    scale, row_scale, zero = choose(weight, format)
    step = decode_scales(scale, row_scale, format)
    low = torch.tensor([[-0.75, -1.9]])
    assert torch.equal(zero, torch.round(-low / step).clamp(0, 15).to(torch.uint8))


def test_clip_shrinks_each_groups_range() -> None:
    weight = random_weight((4, 96), 3) + 0.01
    for name in ("w4g32", "w4g32z", "fp4g32"):
        format = Scheme.parse(name).weight
        full = decode_scales(*choose(weight, format)[:2], format)
        clip = torch.tensor([1.0, 0.5, 0.25]).expand(4, 3)
        clipped = decode_scales(*choose(weight, format, clip)[:2], format)
        torch.testing.assert_close(clipped, full * clip, rtol=2.0**-10, atol=0)


def test_mx_scales_follow_the_ocp_rule() -> None:
    # 2^(floor(log2 amax) - emax): 5.9 lies in [4, 8), e2m1's emax is 2, so the scale is 1 =
    # 2^(127-127).
    amax = torch.tensor([[5.9], [4.0], [7.99], [8.0], [3.99], [2.0**-130]])
    weight = torch.cat([amax, -amax / 3], dim=1)
    scale = choose(weight, Scheme.parse("mxfp4").weight)[0]
    assert scale.flatten().tolist() == [127, 127, 127, 128, 126, 0]


def test_nvfp4_scales_are_e4m3_multiples_of_the_tensors() -> None:
    weight = random_weight((4, 64), 1)
    weight[0, :16] = torch.linspace(-9, 9, 16)
    part = rounded(weight, "nvfp4")
    torch.testing.assert_close(part.row_scale, torch.tensor([9 / (6 * 448)]))
    assert part.scale[0, 0] == 0x7E  # 448: the group that sets the tensor's range
    exact = torch.stack([weight[:, i : i + 16].abs().amax(dim=1) / 6 for i in (0, 16, 32, 48)], 1)
    # e4m3 has 4 significant bits; groups here are well above its subnormals.
    torch.testing.assert_close(effective_scale(part), exact, rtol=2.0**-4, atol=0)


@pytest.mark.parametrize("name", ["w4g32", "fp8g32"])
def test_scales_below_float16s_smallest_stay_positive(name: str) -> None:
    format = Scheme.parse(name).weight
    unit = 2.0**-24
    ideal = torch.tensor([[0.0, unit / 100, unit, 1.4 * unit, 1.6 * unit, 1000.3 * unit, 1e-3]])
    stored = store_scales(ideal, format)[0].to(torch.float32)
    units = [0, 1, 1, 1, 2, 1000] if format.is_integer else [0, 1, 1, 2, 2, 1001]
    assert (stored[0, :6] / unit).tolist() == units
    assert stored[0, 6] == torch.tensor(1e-3).to(torch.float16)


@pytest.mark.parametrize("name", [f"w4g32s{bits}" for bits in range(4, 9)])
def test_two_level_codes_are_the_nearest(name: str) -> None:
    format = Scheme.parse(name).weight
    ideal = torch.rand(6, 50, generator=torch.Generator().manual_seed(0)) + 1e-6
    scale, row_scale = store_scales(ideal, format)
    assert scale.min() >= 1
    largest = (1 << format.scale_bits) - 1
    choices = row_scale.to(torch.float32)[:, None, None] * torch.arange(1, largest + 1) / largest
    best = (choices - ideal[..., None]).abs().amin(dim=2)
    error = (decode_scales(scale, row_scale, format) - ideal).abs()
    assert not (error > best + 1e-6).any()


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["w4g32", "w4g32s6", "mxfp4", "nvfp4"])
def test_scales_that_are_not_scales_are_refused(name: str, bad: float) -> None:
    with pytest.raises(FormatError, match="scale"):
        store_scales(torch.tensor([[1.0, bad]]), Scheme.parse(name).weight)


@pytest.mark.parametrize("name", ["w2g32", "w4g32s6", "mxfp6", "nvfp4", "fp8g32"])
def test_stored_scales_survive_being_stored_again(name: str) -> None:
    format = Scheme.parse(name).weight
    weight = random_weight((5, 100), 7)
    first = choose(weight, format)[:2]
    again = store_scales(decode_scales(*first, format), format)
    assert torch.equal(decode_scales(*again, format), decode_scales(*first, format))
