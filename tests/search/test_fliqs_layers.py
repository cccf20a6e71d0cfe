"""Decisions over layers, what a choice makes of a model, and what it costs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantlib.errors import SearchError
from quantlib.formats.activation import fake_quantize
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize
from quantlib.search.trained.costs import FULL_BITS, SHORTFALLS, Costs, bops, milliseconds
from quantlib.search.trained.layers import Layers, Space, WidthDecision, decisions
from quantlib.search.trained.numbers import Candidate

from .trained_models import PRODUCTS, WEIGHTS, Net, net, pictures, space

X, _ = pictures(5, torch.Generator().manual_seed(1))


def test_what_shares_a_decision() -> None:
    def names(shared: str) -> list[tuple[str, int]]:
        return [(d.name, len(d.members)) for d in space("w4a4", "w8a8", shared=shared).numbers]

    assert names("group") == [("stem", 1), ("gate_up", 2), ("head", 1)]
    assert names("weight") == [(w.name, 1) for w in WEIGHTS]
    assert names("block") == [("stem", 1), ("block", 3)]
    assert names("model") == [("model", 4)]
    with pytest.raises(SearchError, match="'layer' cannot share"):
        names("layer")


def test_convolutions_get_the_options_that_suit_them() -> None:
    stem, *others = space("w4a4", "w4a4h8/4", "w8a8").numbers
    assert [o.name for o in stem.options] == ["w4a4", "w8a8"]
    assert all(len(decision.options) == 3 for decision in others)
    with pytest.raises(SearchError, match="stem is a convolution"):
        decisions(WEIGHTS, [Candidate.parse("w4a4h8/4"), Candidate.parse("w4a4h8/2")])


def test_a_model_without_layers_or_with_a_width_of_nothing_is_refused() -> None:
    with pytest.raises(SearchError, match="no linear"):
        Space(())
    with pytest.raises(SearchError, match="shares of the channels"):
        WidthDecision("w", (), (), (0.5, 1.5))


def test_layers_change_neither_parameters_nor_their_names() -> None:
    model, twin = net(), net()
    before = dict(model.named_parameters())
    layers = Layers(model, space("w4a4", "w8a8"))
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[name] for name, p in model.named_parameters())
    layers.choose(None)
    assert torch.equal(model.eval()(X), twin.eval()(X))


def test_a_choice_computes_what_its_schemes_say() -> None:
    model, twin = net().eval(), net().eval()
    layers = Layers(model, space("w4a4", "w3a5", "w8a8"))
    layers.choose((0, 1, 2))
    rounding = {"stem": "w4a4", "gate": "w3a5", "up": "w3a5", "head": "w8a8"}

    def round_input(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
            flat = inputs[0].flatten(1)
            segments = Scheme.parse(rounding[name]).activations(flat.shape[1])
            return fake_quantize(flat, segments).view(inputs[0].shape)

        return hook

    with torch.no_grad():
        for name, scheme in rounding.items():
            module = twin.get_submodule(name)
            module.register_forward_pre_hook(round_input(name))
            matrix = module.weight.flatten(1)
            whole = quantize_rtn(matrix, Scheme.parse(scheme).segments(matrix.shape[1]))
            module.weight.copy_(dequantize(whole).view(module.weight.shape))
        assert torch.equal(model(X), twin(X))


def test_a_width_leaves_out_the_last_hidden_channels() -> None:
    model, twin = net().eval(), net().eval()
    layers = Layers(model, space("w4a4", "w8a8", widths=(0.5, 1.0)))
    layers.choose(None)
    full = model(X)
    layers.of["head.weight"].inputs = 8
    with torch.no_grad():
        twin.head.weight[:, 8:] = 0
        assert torch.allclose(model(X), twin(X), atol=1e-6)  # zeros are added in another order
    layers.choose((0, 0, 0, 0))
    assert layers.of["head.weight"].inputs == 8
    layers.choose((0, 0, 0, 1))
    assert layers.of["head.weight"].inputs is None
    layers.choose(None)
    assert torch.equal(model(X), full)


def test_wider_columns_are_those_that_matter() -> None:
    model = net().eval()
    layers = Layers(model, space("w4a4h8/4", "w8a8", "w4a4"))
    with torch.no_grad():
        model.up.weight[:, 3] *= 20
        layers.order_columns(lambda: model(X))
        order = layers.of["up.weight"].order  # type: ignore[union-attr]
        assert order is not None
        assert int(order[-1]) == 3
        assert sorted(order.tolist()) == list(range(72))
        layers.choose((0, 1, 1))
        reordered = model(X)
        for name in ("gate", "up", "head"):
            layers.of[f"{name}.weight"].order = None  # type: ignore[union-attr]
        assert torch.allclose(model(X), reordered, atol=1e-5)  # all columns alike: sums' order only


def test_multiplications_are_counted() -> None:
    model = net().eval()
    layers = Layers(model, space("w4a4", "w8a8"))
    assert layers.count_products(lambda: model(X[:1])) == PRODUCTS
    with pytest.raises(SearchError, match=r"gate\.weight multiplies nothing"):
        layers.count_products(
            lambda: model.head(model.up(torch.zeros(1, 72))) * model.stem(X).sum()
        )


def priced(*names: str, widths: tuple[float, ...] = ()) -> Costs:
    return bops(space(*names, widths=widths), PRODUCTS)


def test_bit_operations_of_uniform_choices() -> None:
    costs = priced("w4a4", "w8a8", "w4a8")
    total = sum(PRODUCTS.values())
    for index, bits in enumerate((16, 64, 32)):
        assert costs.of((index,) * 3) == pytest.approx(bits * total)
    assert (costs.least, costs.most) == (16 * total, 64 * total)
    assert costs.whole == FULL_BITS * total
    assert costs.of((0, 1, 0)) == 16 * total + 48 * 2 * 1152


def test_a_width_takes_its_share_off_writers_and_readers() -> None:
    costs = priced("w4a4", "w8a8", widths=(0.5, 1.0))
    half, whole = costs.of((0, 0, 0, 0)), costs.of((0, 0, 0, 1))
    assert whole - half == 16 * (1152 + 1152 + 64) / 2
    assert costs.least == half


@pytest.mark.parametrize("share", [0.5, 4.0, 5.0, math.nan])
def test_a_target_out_of_reach_says_the_range(share: float) -> None:
    costs = priced("w4a4", "w8a8")
    with pytest.raises(SearchError, match=r"4\.826e\+04 BOPs"):
        costs.check_target(share * costs.least)
    costs.check_target(costs.least)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_the_likeliest_choice_within_a_target_is_exact(seed: int, between: float) -> None:
    costs = priced("w4a4", "w5a5", "w8a8")
    target = costs.least + between * (costs.most - costs.least)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.log_softmax(3 * torch.randn(3, 3, generator=generator), 1).tolist()
    found = costs.likeliest(scores, target, spend=False)
    within = [
        c for c in itertools.product(range(3), repeat=3) if costs.of(c) <= target * (1 + 1e-9)
    ]

    def score(choice: tuple[int, ...]) -> float:
        return sum(row[index] for row, index in zip(scores, choice, strict=True))

    assert costs.of(found) <= target * (1 + 1e-9)
    assert score(found) >= max(map(score, within)) - 1e-4  # the solver's relative gap is 1e-5


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_what_may_be_spent_is_spent_where_choices_allow(seed: int, between: float) -> None:
    costs = priced("w4a4", "w5a5", "w8a8")
    target = costs.least + between * (costs.most - costs.least)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.log_softmax(3 * torch.randn(3, 3, generator=generator), 1).tolist()
    found = costs.of(costs.likeliest(scores, target))
    every = [costs.of(choice) for choice in itertools.product(range(3), repeat=3)]
    assert found <= target * (1 + 1e-9)
    for shortfall in SHORTFALLS:
        if any((1 - shortfall) * target <= cost <= target for cost in every):
            assert found >= (1 - shortfall) * target * (1 - 1e-6)
            break


def test_widths_narrow_where_the_likeliest_is_too_dear() -> None:
    costs = priced("w4a4", "w8a8", widths=(0.5, 1.0))
    scores = [[-1.0, -0.1]] * 3 + [[-9.0, -0.01]]
    assert costs.likeliest(scores, costs.most) == (1, 1, 1, 1)
    assert costs.likeliest(scores, costs.least)[-1] == 0


def test_milliseconds_come_from_the_timing_table(tmp_path: Path) -> None:
    asked: list[str] = []

    def clock(op, threads: int, passes: int) -> list[float]:  # type: ignore[no-untyped-def]
        asked.append(op.key)
        return [op.rows * op.columns * int(op.scheme[1]) * 1e-9 * op.tokens]

    named = space("w4a8", "w8a8", "w4")
    shapes = Layers(Net(), named).shapes()
    costs = milliseconds(named, shapes, tokens=2, folder=tmp_path, clock=clock)
    assert "int8 16x72 w4 M=2" in asked
    assert "exact 16x72 w4 M=2" in asked
    assert costs.prices["up.weight"][:2] == pytest.approx((1e-6 * 72 * 16 * 8, 1e-6 * 72 * 16 * 16))
    asked.clear()
    milliseconds(named, shapes, tokens=2, folder=tmp_path, clock=clock)
    assert asked == [], "the table keeps them"
    assert costs.text(1.5) == "1.5 ms"


def test_floats_have_times_too(tmp_path: Path) -> None:
    """As they are, and with inputs rounded to integers."""
    found = space("e2m2", "fp7e2m4a8", "fp8e2m5", "w8a8")
    shapes = Layers(Net(), space("w4a4", "w8a8")).shapes()
    costs = milliseconds(found, shapes, folder=tmp_path, clock=lambda *_: [1e-6])
    assert all(len(prices) == 4 and min(prices) > 0 for prices in costs.prices.values())


def test_a_uniform_choice_by_its_name() -> None:
    named = space("w4a4", "e2m1", "w8a8", widths=(0.5, 1.0))
    assert named.uniform("fp4afp4") == named.uniform("e2m1") == (1, 1, 1, 1)
    with pytest.raises(SearchError, match="stem has no w5a5"):
        named.uniform("w5a5")


def test_a_uniform_choice_where_convolutions_have_no_zero_points() -> None:
    named = space("w4a4", "w4a4z", "w8a8")
    assert named.uniform("w4a4z", otherwise="w4a4") == (0, 1, 1)
    with pytest.raises(SearchError, match="stem has no w4a4z: w4a4, w8a8"):
        named.uniform("w4a4z")
    with pytest.raises(SearchError, match="stem has no w4a4z and no w5a5: w4a4, w8a8"):
        named.uniform("w4a4z", otherwise="w5a5")
