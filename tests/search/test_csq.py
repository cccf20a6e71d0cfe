"""CSQ: gates begin as the weight they were made of and end as integers, within their bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import SearchError
from quantlib.formats.weight import dequantize, pack, unpack
from quantlib.search.csq import (
    LARGEST,
    PLANES,
    BitGates,
    Csq,
    Settings,
    bits_of,
    within_target,
)
from quantlib.search.trained import loop as loops
from quantlib.search.trained.layers import Layers
from quantlib.search.trained.loop import Loop, Training

from .trained_models import PRODUCTS, accuracy, net, quarters, space

STEPS = 120
SEARCH = Settings(target=4.0, first=60, second=40)


def begun(file: Path, search: Settings = SEARCH, steps: int = STEPS) -> tuple[Loop, Csq]:
    search.check(steps)
    model = net()
    layers = Layers(model, space("w4a8", "w8a8"))
    method = Csq(layers, PRODUCTS, layers.space.uniform("w8a8"), search)
    return Loop(model, quarters(), method, Training(steps, 5e-3, 10), file, {}), method


@pytest.mark.parametrize("beta", [1.0, 7.0, 200.0])
def test_untouched_gates_are_the_weights_8_bit_rounding_at_every_temperature(beta: float) -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    gates = BitGates(weight)
    gates.beta = gates.plane_beta = beta
    step = weight.abs().amax(1, keepdim=True) / LARGEST
    expected = (weight / step).round() * step
    assert torch.allclose(gates(), expected, atol=1e-5)  # sums of float32 near 1


def test_gates_have_gradients_while_they_are_soft() -> None:
    gates = BitGates(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    gates().square().sum().backward()
    for parameter in gates.parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).any())


def test_bits_are_those_of_the_integer_that_holds_the_planes() -> None:
    def planes(*used: int) -> torch.Tensor:
        return torch.tensor([index in used for index in range(PLANES)])

    assert bits_of(planes(6)) == 2
    assert bits_of(planes(0, 6)) == 8
    assert bits_of(planes(4, 5, 6)) == 4
    assert bits_of(planes(3, 5)) == 4
    assert bits_of(planes()) == 2


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(2.0, 8.0))
def test_planes_are_fixed_within_the_target(seed: int, target: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    gates = {str(i): torch.randn(PLANES, generator=generator) for i in range(4)}
    weights = (torch.rand(4, generator=generator) + 0.1).tolist()
    shares = {str(i): weight / sum(weights) for i, weight in enumerate(weights)}
    used = within_target(gates, shares, target)
    assert sum(shares[n] * bits_of(row) for n, row in used.items()) <= target + 1e-9
    for name, row in used.items():
        assert bool(row.any())
        if bits_of(row) > 2:
            assert bool((gates[name][row] > 0).all()), "only what was learned is used"
    free = within_target(gates, shares, 8.0)
    positive = [n for n in gates if bool((gates[n] > 0).any())]
    assert all(torch.equal(free[n], gates[n] > 0) for n in positive)


def test_a_run_ends_as_an_exact_quantized_model(tmp_path: Path) -> None:
    run, method = begun(tmp_path / "state", replace(SEARCH, first=150, second=80), 300)
    run.run()
    assert accuracy(run.model) > 0.8  # chance is 0.25
    assert method.mean_bits <= SEARCH.target + 1e-9
    with torch.no_grad():
        for name, whole in method.quantized().items():
            segments = [part.segment for part in whole.segments]
            used = method.gates[name].used
            assert used is not None
            assert segments[0].format.bits == bits_of(used)
            stored = unpack(pack(whole), whole.shape, segments)
            assert torch.equal(dequantize(stored), method.gates[name]())


def test_the_penalty_pulls_bits_both_ways(tmp_path: Path) -> None:
    method = begun(tmp_path / "state")[1]
    method.before(0)
    soft = method.figures()["bits"]
    assert 4 < soft < 5  # half of the planes, and the sign
    for target, sign in ((2.0, 1), (8.0, -1)):
        method._search = replace(SEARCH, target=target)
        penalty = method.penalty()
        assert penalty is not None
        (gradient,) = torch.autograd.grad(penalty, method.gates["up.weight"].planes)
        assert bool((gradient * sign > 0).all())


def test_temperatures_rise_twice_and_end_hard(tmp_path: Path) -> None:
    run, method = begun(tmp_path / "state")
    betas: list[tuple[float, bool]] = []
    gates = method.gates["up.weight"]
    run.report = lambda *_: betas.append((gates.beta, gates.used is not None))
    run.run()
    assert betas[0] == (1.0, False)
    assert betas[59][0] > 150
    assert betas[60] == (1.0, True)
    assert betas[99][0] > 150
    assert betas[100:] == [(0.0, True)] * 20


@pytest.mark.parametrize("stop", [30, 80])
def test_a_killed_run_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole, method = begun(tmp_path / "whole")
    whole.run()
    monkeypatch.setattr(loops, "SECONDS_BETWEEN_FILES", -1.0)
    killed, _ = begun(tmp_path / "killed")

    def kill(step: int, _: Mapping[str, float]) -> None:
        if step == stop:
            raise KeyboardInterrupt

    killed.report = kill
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed, again = begun(tmp_path / "killed")
    resumed.run()
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.mean_bits == method.mean_bits


@pytest.mark.parametrize(
    ("search", "says"),
    [
        (replace(SEARCH, target=1.0), "out of reach"),
        (replace(SEARCH, target=9.0), "out of reach"),
        (replace(SEARCH, first=100), "do not fit into 120"),
        (replace(SEARCH, first=0), "do not fit into 120"),
    ],
)
def test_settings_that_cannot_be_are_refused(search: Settings, says: str, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=says):
        begun(tmp_path / "state", search)


def test_soft_bits_are_not_stored(tmp_path: Path) -> None:
    method = begun(tmp_path / "state")[1]
    with pytest.raises(SearchError, match="still soft"):
        method.quantized()
    with pytest.raises(SearchError, match="still soft"):
        method.gates["up.weight"].codes()
