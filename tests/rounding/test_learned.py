"""Learned rounding starts at the solution it is given, never ends worse on what judges it, and
improves it on a block that is not linear; for every format, with what can be stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats import (
    QuantizedWeight,
    Scheme,
    Segment,
    dequantize,
    pack,
    quantize_rtn,
    unpack,
)
from quantlib.rounding import LearningOptions, learn, round_group
from quantlib.rounding.learned import WeightVariables

# fmt: off
SCHEMES = ["w4", "w2g32z4s4", "w3g32z", "w4g32s5", "w4tz", "w8g64zs6", "fp8", "fp4g32", "fp6t",
           "mxfp4", "mxfp6", "nvfp4"]
# fmt: on
MakeLayout = Callable[..., tuple[Segment, ...]]
WIDTH, HIDDEN, TOKENS = 48, 64, 32
SHAPES = {"up": (HIDDEN, WIDTH), "down": (32, HIDDEN)}


class Block:
    """down(tanh(up(x))) on correlated inputs: 12 windows to fit, 6 that judge."""

    windows = 12

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        mixing = (mixing + 0.5 * torch.eye(WIDTH)) * torch.linspace(1, 0.1, WIDTH)
        self.inputs = torch.randn(18, TOKENS, WIDTH, generator=generator) @ mixing
        self.originals = {
            name: torch.randn(shape, generator=generator) / shape[1] ** 0.5
            for name, shape in SHAPES.items()
        }
        self.goal = self(self.originals, self.inputs)
        self.seen: list[list[int]] = []

    def __call__(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ weights["up"].T) @ weights["down"].T

    def gradients(self, weights: Mapping[str, Tensor], windows: Tensor) -> dict[str, Tensor]:
        self.seen.append(windows.tolist())
        leaves = {name: value.clone().requires_grad_(True) for name, value in weights.items()}
        error = self(leaves, self.inputs[windows]) - self.goal[windows]
        found = torch.autograd.grad(error.square().mean(), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    def held_out(self, weights: Mapping[str, Tensor]) -> Tensor:
        error = self(weights, self.inputs[self.windows :]) - self.goal[self.windows :]
        return error.square().mean((1, 2))

    def start(self, scheme: str) -> dict[str, QuantizedWeight]:
        """Every weight by GPTQ on its own inputs."""
        first = self.inputs[: self.windows].reshape(-1, WIDTH)
        second = torch.tanh(first @ self.originals["up"].T)
        out = {}
        for (name, weight), x in zip(self.originals.items(), (first, second), strict=True):
            layout = Scheme.parse(scheme).segments(weight.shape[1])
            (out[name],) = round_group({name: weight}, x.T @ x, [layout]).values()
        return out


def dense(weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    return {name: dequantize(weight) for name, weight in weights.items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_before_the_first_step_it_is_the_start(scheme: str, layout: MakeLayout) -> None:
    """Also where the weight was moved by compensation, and in a group of zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 96, generator=generator)
    weight[3, :64] = 0
    start = quantize_rtn(weight, layout(scheme, 96))
    for moved in (weight, weight + 0.3 * torch.randn(12, 96, generator=generator)):
        current = WeightVariables(start, moved).quantized()
        assert torch.equal(dequantize(current), dequantize(start))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_state_can_be_stored(scheme: str, layout: MakeLayout) -> None:
    """However far offsets and clip factors have been driven."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 96, generator=generator)
    weight[3, :64] = 0
    parts = layout(scheme, 96)
    variables = WeightVariables(quantize_rtn(weight, parts), weight)
    for _ in range(12):
        variables.step(torch.randn(12, 96, generator=generator), 0.2, 0.2)
        current = variables.quantized()
        stored = unpack(pack(current), (12, 96), parts)
        assert torch.equal(dequantize(stored), dequantize(current))
        if scheme not in ("w4", "w4tz", "fp8", "fp6t"):  # one scale for more than the zeros
            # MX has no scale of zero; its smallest is 2^-127, and its largest float 7.5 or 28.
            assert float(dequantize(current)[3, :64].abs().max()) < 2.0**-122


@pytest.mark.parametrize("scheme", ["w4g32", "w3g32z", "fp8", "fp4g32"])
def test_a_step_moves_codes_against_the_gradient(scheme: str, layout: MakeLayout) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator)
    start = quantize_rtn(weight, layout(scheme, 64))
    variables = WeightVariables(start, weight)
    gradient = torch.randn(8, 64, generator=generator)
    for _ in range(3):
        variables.step(gradient, 0.15, 0.0)
    change = dequantize(variables.quantized()) - dequantize(start)
    assert bool((change * gradient <= 0).all())
    assert 0.1 < float((change != 0).double().mean()) < 0.9
    assert torch.equal(variables.quantized().segments[0].scale, start.segments[0].scale)


@pytest.mark.parametrize("scheme", ["w4g32", "w4g32z8", "w3g32z", "fp8"])
def test_a_range_that_is_too_wide_is_learned(scheme: str, layout: MakeLayout) -> None:
    """Scales a quarter too large, codes free: the plain squared error falls."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator)
    start = quantize_rtn(1.25 * weight, layout(scheme, 64))
    variables = WeightVariables(start, dequantize(start))
    errors = []
    for _ in range(30):
        difference = dequantize(variables.quantized()) - weight
        errors.append(float(difference.square().sum()))
        variables.step(difference, 0.0, 0.01)
    assert errors[-1] < 0.3 * errors[0]


@pytest.mark.parametrize("scheme", ["w2g32z4s4", "w3g32z", "fp4g32", "w4t"])
def test_it_improves_gptq_on_windows_it_has_not_fitted(scheme: str) -> None:
    logs = 0.0
    for seed in range(3):
        block = Block(seed)
        start = block.start(scheme)
        found = learn(start, block.originals, block, LearningOptions(100))
        before = float(block.held_out(dense(start)).mean())
        logs += math.log(float(found.losses.mean()) / before) / 3
    assert math.exp(logs) < 0.97


@pytest.mark.parametrize("scheme", ["w6g64zs6", "w4", "mxfp4"])
def test_it_is_never_worse_and_says_what_it_returns(scheme: str) -> None:
    """A rate that breaks everything returns the start; the losses are those of the weights."""
    block = Block(0)
    start = block.start(scheme)
    before = float(block.held_out(dense(start)).mean())
    for options in (LearningOptions(4, rate=20.0), LearningOptions(30), LearningOptions(0)):
        found = learn(start, block.originals, block, options)
        assert torch.equal(found.losses, block.held_out(dense(found.weights)))
        assert float(found.losses.mean()) <= before
        if found.step == 0:
            assert all(found.weights[name] is start[name] for name in start)
    assert learn(start, block.originals, block, LearningOptions(0)).step == 0


def test_windows_are_drawn_by_the_seed_and_all_come_before_one_comes_again() -> None:
    orders = []
    for seed in (0, 0, 1):
        block = Block(0)
        start = block.start("w4")
        found = learn(start, block.originals, block, LearningOptions(8, batch=3, seed=seed))
        for epoch in (block.seen[:4], block.seen[4:]):
            assert sorted(window for batch in epoch for window in batch) == list(range(12))
        orders.append((block.seen, dequantize(found.weights["up"])))
    assert orders[0][0] == orders[1][0]
    assert torch.equal(orders[0][1], orders[1][1])
    assert orders[0][0] != orders[2][0]


def test_a_block_that_overflows_is_a_sentence() -> None:
    block = Block(0)
    start = block.start("w4")
    block.goal[0] = torch.inf
    with pytest.raises(RoundingError, match="gradient of the block is inf or nan"):
        learn(start, block.originals, block, LearningOptions(12))
