"""Factors beside a rounded rest lower its loss, first where errors cost most."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantlib.errors import FormatError, RoundingError
from quantlib.formats import QuantizedWeight, Scheme, dequantize, dequantize_stored
from quantlib.rounding import RoundingOptions, round_group, round_low_rank

OPTIONS = RoundingOptions(passes=1)


def alone(weight: Tensor, hessian: Tensor, name: str) -> dict[str, QuantizedWeight]:
    layout = Scheme.parse(name).rest.segments(weight.shape[1])
    return {"w": round_group({"w": weight}, hessian, [layout], OPTIONS)["w", 0]}


def loss(value: Tensor, weight: Tensor, hessian: Tensor, importance: Tensor) -> float:
    error = (value - weight).double()
    return float(importance.double() @ ((error @ hessian.double()) * error).sum(1))


@pytest.mark.parametrize("name", ["w2g32z4s4+r8", "w3g32+r4w4", "mxfp4+r8", "w2g32zh4/4+r8"])
def test_factors_lower_the_loss(name: str, problem) -> None:
    weight, hessian = problem(48, 96)
    scheme = Scheme.parse(name)
    rest = alone(weight, hessian, name)
    found = round_low_rank({"w": weight}, hessian, scheme, rest, None, OPTIONS)["w"]
    assert found.scheme == scheme
    ones = torch.ones(48)
    with_factors = loss(dequantize_stored(found), weight, hessian, ones)
    assert with_factors < 0.95 * loss(dequantize(rest["w"]), weight, hessian, ones)


def test_factors_alone_hold_what_has_few_directions(problem) -> None:
    _, hessian = problem(4, 64)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 6, generator=generator) @ torch.randn(6, 64, generator=generator)
    scheme = Scheme.parse("r6w8")
    found = round_low_rank({"w": weight}, hessian, scheme, {}, None, OPTIONS)["w"]
    relative = float((dequantize_stored(found) - weight).norm() / weight.norm())
    assert relative < 0.03  # of 8 bits, twice, where one input may be ten times another


def test_outputs_that_matter_more_are_served_first(problem) -> None:
    weight, hessian = problem(32, 64)
    importance = torch.ones(32)
    importance[:4] = 1000.0
    rest = alone(weight, hessian, "w2g32+r6")
    scheme = Scheme.parse("w2g32+r6")
    even = round_low_rank({"w": weight}, hessian, scheme, rest, None, OPTIONS)["w"]
    uneven = round_low_rank({"w": weight}, hessian, scheme, rest, {"w": importance}, OPTIONS)["w"]
    own = [loss(dequantize_stored(w), weight, hessian, importance) for w in (even, uneven)]
    assert own[1] < 0.5 * own[0]


def test_members_are_rounded_as_if_they_were_alone(problem) -> None:
    first, hessian = problem(32, 64, seed=2)
    second, _ = problem(24, 64, seed=3)
    scheme = Scheme.parse("w3g32z+r4")
    layout = scheme.rest.segments(64)
    weights = {"a": first, "b": second}
    rests = {key[0]: w for key, w in round_group(weights, hessian, [layout], OPTIONS).items()}
    together = round_low_rank(weights, hessian, scheme, rests, None, OPTIONS)
    for name, weight in weights.items():
        own = {"w": rests[name]}
        lonely = round_low_rank({"w": weight}, hessian, scheme, own, None, OPTIONS)["w"]
        assert torch.equal(dequantize_stored(together[name]), dequantize_stored(lonely))


def test_without_data_directions_of_the_weight_count(problem) -> None:
    weight, _ = problem(32, 64)
    scheme = Scheme.parse("w2g32+r6")
    rest = alone(weight, torch.eye(64), "w2g32+r6")
    found = round_low_rank({"w": weight}, None, scheme, rest, None, OPTIONS)["w"]
    assert (dequantize_stored(found) - weight).norm() < (dequantize(rest["w"]) - weight).norm()


@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_weights_of_any_size_and_exact_ones_have_factors(size: float, problem) -> None:
    """Scales are float16; and a weight that is on the grid leaves nothing for the factors."""
    weight, hessian = problem(32, 64)
    scheme = Scheme.parse("w3g32+r4")
    rest = alone(weight, hessian, "w3g32+r4")
    small = {"w": weight * size}
    found = round_low_rank(
        small, hessian, scheme, alone(weight * size, hessian, "w3g32+r4"), None, OPTIONS
    )
    plain = float((dequantize(rest["w"]) - weight).norm())
    assert float((dequantize_stored(found["w"]) / size - weight).norm()) < plain
    exact = {"w": dequantize(rest["w"])}
    again = round_low_rank(exact, hessian, scheme, rest, None, OPTIONS)["w"]
    assert float((dequantize_stored(again) - exact["w"]).norm()) < 1e-3 * plain


def test_bad_input_is_refused(problem) -> None:
    weight, hessian = problem(32, 64)
    rest = alone(weight, hessian, "w2g32+r6")
    with pytest.raises(RoundingError, match="no factors"):
        round_low_rank({"w": weight}, hessian, Scheme.parse("w2g32"), rest)
    with pytest.raises(FormatError, match="32"):
        round_low_rank({"w": weight}, hessian, Scheme.parse("w2g32+r32"), rest)
    with pytest.raises(RoundingError, match="Hessian"):
        round_low_rank({"w": weight}, hessian[:32, :32], Scheme.parse("w2g32+r6"), rest)
