"""Rounding many members to many layouts in one call is rounding each alone, and never gives
numbers that cannot be stored."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantlib.errors import FormatError, RoundingError
from quantlib.formats import QuantizedWeight, Scheme, Segment, dequantize, pack, unpack
from quantlib.rounding import RoundingOptions, round_group, round_integers
from quantlib.rounding.grid import RowGrid
from quantlib.rounding.hessian import damped, inverse_factor
from quantlib.rounding.integer import ROW_TILE
from quantlib.rounding.sweep import Span, descend, gptq_sweep

MakeProblem = Callable[..., tuple[Tensor, Tensor]]
MakeLayout = Callable[..., tuple[Segment, ...]]
ErrorOf = Callable[..., float]

# fmt: off
SCHEMES = ("w2g32z4s4", "w3g32", "w4g32zs6", "w8g32", "w4g64z", "w3g16s4", "w5", "w3z4", "w2",
           "w4g32e", "w3ze")
# fmt: on


def parts_of(weight: QuantizedWeight) -> list[Tensor]:
    """Everything a quantized weight holds."""
    tensors = []
    for part in weight.segments:
        tensors += [part.codes, part.scale, part.row_scale, part.zero]
    return [tensor for tensor in tensors if tensor is not None]


def assert_same(left: QuantizedWeight, right: QuantizedWeight) -> None:
    assert left.shape == right.shape
    for a, b in zip(parts_of(left), parts_of(right), strict=True):
        assert torch.equal(a, b)


def members(problem, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    """Three weights of unequal heights, none a multiple of the tile, that read one input."""
    weight, hessian = problem(5 + 70 + 130, columns)
    return dict(zip("abc", weight.split([5, 70, 130]), strict=True)), hessian


def test_many_members_and_layouts_at_once_equal_each_alone_to_the_bit(
    problem: MakeProblem, layout: MakeLayout
) -> None:
    weights, hessian = members(problem, 100)
    layouts = [layout(scheme, 100) for scheme in SCHEMES]
    together = round_integers(weights, hessian, layouts)
    for (name, weight), (index, one) in itertools.product(weights.items(), enumerate(layouts)):
        (alone,) = round_integers({name: weight}, hessian, [one]).values()
        assert_same(together[name, index], alone)


@pytest.mark.parametrize("rows", [1, ROW_TILE, 200, 1000])
def test_the_row_limit_changes_no_bit(
    problem: MakeProblem,
    layout: MakeLayout,
    rows: int,
) -> None:
    weights, hessian = members(problem, 72)
    layouts = [layout(scheme, 72) for scheme in ("w2g32z4s4", "w3g32", "w3")]
    whole = round_integers(weights, hessian, layouts)
    chunked = round_integers(weights, hessian, layouts, RoundingOptions(rows=rows))
    assert list(whole) == list(chunked)
    for key, value in whole.items():
        assert_same(value, chunked[key])


def test_the_result_dequantizes_to_what_the_sweeps_computed(
    problem: MakeProblem, layout: MakeLayout
) -> None:
    """To the bit: effective scales and zero points are the checkpoint's, and codes are read back
    without a slip."""
    for scheme in SCHEMES:
        weight, hessian = problem(ROW_TILE, 100, seed=1)
        (part,) = layout(scheme, 100)
        grid = RowGrid.build([part.format], ROW_TILE)
        span = Span(0, 100, part.format.group_size or 100, grid)
        moment = damped(hessian, 0.01)
        result, states = gptq_sweep(weight.T.contiguous(), inverse_factor(moment), [span])
        for _ in range(2):
            descend(weight.T.contiguous(), result, moment, [span], states)
        options = RoundingOptions(passes=2)
        (rounded,) = round_integers({"w": weight}, hessian, [(part,)], options).values()
        assert torch.equal(dequantize(rounded), result.T), scheme


def test_segments_of_different_widths_share_one_sweep(
    problem: MakeProblem,
    layout: MakeLayout,
    error_of: ErrorOf,
) -> None:
    """8 bits for the first 40 inputs, then 3 and 2: better than 3 and 2 throughout, and each
    segment's error is compensated by those behind it."""
    weight, hessian = problem(48, 120)
    mixed = layout(("w8g32", 40), ("w3g16z", 50), ("w2g32z4s4", 30))
    options = RoundingOptions(passes=0)
    rounded = round_integers({"w": weight}, hessian, [mixed, layout("w2g16z", 120)], options)
    assert [part.segment for part in rounded["w", 0].segments] == list(mixed)
    assert error_of(rounded["w", 0], weight, hessian) < error_of(rounded["w", 1], weight, hessian)
    # Rounding the segments apart, blind to each other, must be worse than one sweep over all.
    apart = torch.cat(
        [
            dequantize(_alone(weight, hessian, part.start, part.length, str(part.format), options))
            for part in mixed
        ],
        dim=1,
    )
    joint = error_of(rounded["w", 0], weight, hessian)
    assert joint < 0.9 * error_of(apart, weight, hessian)


def _alone(weight, hessian, start, length, scheme, options) -> QuantizedWeight:
    own = slice(start, start + length)
    segments = Scheme.parse(scheme).segments(length)
    columns = {"w": weight[:, own]}
    (rounded,) = round_integers(columns, hessian[own, own], [segments], options).values()
    return rounded


@pytest.mark.parametrize("scheme", ["w4g64", "w3g32z4s4", "w2g128z", "w8"])
def test_a_ragged_last_group_is_rounded_like_any_other(
    problem: MakeProblem,
    layout: MakeLayout,
    scheme: str,
) -> None:
    """80 columns: groups of 64 + 16, 32 + 32 + 16, one of 80. It survives packing, too."""
    weight, _ = problem(9, 80)
    segments = layout(scheme, 80)
    (rounded,) = round_integers({"w": weight}, torch.eye(80), [segments]).values()
    error = (dequantize(rounded) - weight).square().mean(0)
    assert float(error[64:].mean()) < 1.5 * float(error[:64].mean())
    assert_same(unpack(pack(rounded), (9, 80), segments), rounded)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros(
    problem: MakeProblem,
    layout: MakeLayout,
    scheme: str,
) -> None:
    _, hessian = problem(1, 48)
    zeros = torch.zeros(3, 48)
    (rounded,) = round_integers({"w": zeros}, hessian, [layout(scheme, 48)]).values()
    assert torch.equal(dequantize(rounded), zeros)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e-7])
def test_denormals_and_weights_below_float16_are_finite_and_near(
    problem: MakeProblem,
    layout: MakeLayout,
    scheme: str,
    size: float,
) -> None:
    """A scale is at least 2^-24 (two-level: 2^-24 / 15), so the error is at most half of it."""
    weight, hessian = problem(6, 48)
    (rounded,) = round_integers({"w": weight * size}, hessian, [layout(scheme, 48)]).values()
    error = (dequantize(rounded) - weight * size).abs().max()
    assert float(error) <= 2.0**-24 + 3 * size  # a clipped weight of 3 sigma, at worst


@pytest.mark.parametrize("scheme", SCHEMES)
def test_large_weights_are_rounded_as_well_as_small_ones(
    problem: MakeProblem,
    layout: MakeLayout,
    scheme: str,
    error_of: ErrorOf,
) -> None:
    weight, hessian = problem(6, 48)
    segments = layout(scheme, 48)
    errors = []
    for size in (1.0, 2.0**12):
        (rounded,) = round_integers({"w": weight * size}, hessian, [segments]).values()
        errors.append(error_of(rounded, weight * size, hessian) / size**2)
    # A power of two moves float16 scales exactly; only their subnormals could differ.
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize("scheme", ["w2g32", "w4g32z", "w3g32s6", "w3"])
def test_a_scale_beyond_float16_is_a_sentence(
    problem: MakeProblem,
    layout: MakeLayout,
    scheme: str,
) -> None:
    weight, hessian = problem(4, 48)
    weight[2, 7] = 1e9
    with pytest.raises(RoundingError, match="beyond float16's 65504"):
        round_integers({"w": weight}, hessian, [layout("w8g32", 48), layout(scheme, 48)])


def test_inputs_that_never_fired_are_rounded_to_nearest(
    problem: MakeProblem, layout: MakeLayout
) -> None:
    """Zero rows of the Hessian: those weights neither pay for others nor get their errors."""
    weight, hessian = problem(8, 64)
    dead = torch.tensor([3, 17, 40, 63])
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    (rounded,) = round_integers({"w": weight}, hessian, [layout("w4g32z", 64)]).values()
    (part,) = rounded.segments
    scale = part.scale.float().repeat_interleave(32, 1)
    zero = part.zero.float().repeat_interleave(32, 1)
    nearest = (weight / scale + zero).round().clamp(0, 15)
    assert torch.equal(part.codes[:, dead].float(), nearest[:, dead])
    assert not torch.equal(part.codes.float(), nearest)  # the others are compensated


def test_one_token_is_enough(problem: MakeProblem, layout: MakeLayout) -> None:
    """A Hessian of rank one, as a rare expert has: damping makes it a problem like any other."""
    weight, _ = problem(8, 64)
    token = torch.randn(64, generator=torch.Generator().manual_seed(5))
    (rounded,) = round_integers(
        {"w": weight}, torch.outer(token, token), [layout("w3g32", 64)]
    ).values()
    plain = round_group({"w": weight}, None, [layout("w3g32", 64)])["w", 0]
    output = [float(((dequantize(q) - weight) @ token).square().sum()) for q in (rounded, plain)]
    assert output[0] < 0.01 * output[1]


def test_float64_and_bfloat16_weights_are_taken_as_they_are(
    problem: MakeProblem, layout: MakeLayout
) -> None:
    weight, hessian = problem(4, 32)
    weight = weight.bfloat16()
    segments = [layout("w4g32", 32)]
    expected = round_integers({"w": weight.float()}, hessian, segments)["w", 0]
    for dtype in (torch.bfloat16, torch.float64):
        found = round_integers({"w": weight.to(dtype)}, hessian, segments)
        assert_same(found["w", 0], expected)


def test_arguments_are_left_as_they_were(problem: MakeProblem, layout: MakeLayout) -> None:
    weight, hessian = problem(8, 48)
    before = weight.clone(), hessian.clone()
    round_group({"w": weight}, hessian, [layout("w3g32z", 48), layout("mxfp4", 48)])
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scheme", ["w4g32", "fp4g32"])
def test_a_damaged_weight_is_a_sentence(
    problem: MakeProblem,
    layout: MakeLayout,
    bad: float,
    scheme: str,
) -> None:
    weight, hessian = problem(4, 48)
    weight[1, 5] = bad
    with pytest.raises(RoundingError, match="holds inf or nan"):
        round_group({"w": weight}, hessian, [layout(scheme, 48)])


def test_what_does_not_fit_is_a_sentence(problem: MakeProblem, layout: MakeLayout) -> None:
    weight, hessian = problem(4, 48)
    with pytest.raises(RoundingError, match=r"q_proj is .*4, 48.* and its Hessian .*32, 32"):
        round_group({"q_proj": weight}, hessian[:32, :32], [layout("w4", 48)])
    with pytest.raises(FormatError, match="cover 32 of the weight's 48"):
        round_group({"w": weight}, hessian, [layout("w4", 32)])
    with pytest.raises(RoundingError, match="mxfp4 is not an integer format"):
        round_integers({"w": weight}, hessian, [layout("mxfp4", 48)])
    with pytest.raises(RoundingError, match="w4t is not an integer format with scales per group"):
        round_integers({"w": weight}, hessian, [layout("w4t", 48)])
