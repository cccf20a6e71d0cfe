"""Measured losses and the exact choice by them: one decision at a time, nothing left behind."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from quantlib.errors import SearchError
from quantlib.search.fliqs import Policy, Settings
from quantlib.search.trained.costs import bops
from quantlib.search.trained.layers import Layers
from quantlib.search.trained.loop import Training, judge_of
from quantlib.search.trained.measured import (
    best_of_random,
    first_logits,
    least_lost,
    losses,
    wide_ends,
)

from .trained_models import PRODUCTS, net, quarters, space

FOUR = 16.0 * sum(PRODUCTS.values())


def test_fewer_bits_lose_more_and_the_model_is_as_it_was() -> None:
    model = net()
    layers = Layers(model, space("w2a2", "w4a4", "w8a8"))
    judge = judge_of(model, quarters(), Training(steps=4, rate=1e-3))
    before = judge(0)
    table = losses(layers, judge, batches=4)
    assert [len(row) for row in table] == [3, 3, 3]
    two, _, eight = (sum(column) for column in zip(*table, strict=True))
    assert two > abs(eight)
    assert judge(0) == before


def test_an_option_is_measured_with_everything_else_as_it_is() -> None:
    """Whatever the judge sees, one decision is rounded: the width decision, too."""
    model = net()
    layers = Layers(model, space("w4a4", "w8a8", widths=(0.5, 1.0)))
    seen: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def judge(_: int) -> float:
        rounded = tuple(n for n, layer in layers.of.items() if layer.candidate is not None)
        cut = tuple(n for n, layer in layers.of.items() if layer.inputs is not None)
        seen.append((rounded, cut))
        return 0.0

    losses(layers, judge, batches=1)
    groups = [("stem.weight",), ("gate.weight", "up.weight"), ("head.weight",)]
    one_at_a_time = [(group, ()) for group in groups for _ in range(2)]
    assert seen == [((), ()), *one_at_a_time, ((), ("head.weight",)), ((), ())]


def test_the_choice_loses_least_of_all_that_can_be_paid() -> None:
    costs = bops(space("w2a2", "w4a4", "w8a8"), PRODUCTS)
    drawn = torch.rand(3, 3, generator=torch.Generator().manual_seed(5)).tolist()
    table = [sorted(row, reverse=True) for row in drawn]

    def lost(choice: tuple[int, ...]) -> float:
        return sum(row[index] for row, index in zip(table, choice, strict=True))

    payable = [c for c in itertools.product(range(3), repeat=3) if costs.of(c) <= FOUR]
    assert lost(least_lost(table, costs, FOUR)) == min(map(lost, payable))


def test_the_best_of_random_choices_is_one_of_them_and_spends_the_target() -> None:
    layers = Layers(net(), space("w3a3", "w3a5", "w4a4", "w4a5"))
    costs = bops(layers.space, PRODUCTS)
    seen: list[tuple[str, ...]] = []

    def judge(_: int) -> float:
        seen.append(tuple(str(layer.candidate) for layer in layers.of.values()))
        return float(len(seen))  # whatever comes last is best

    generator = torch.Generator().manual_seed(2)
    best = best_of_random(layers, judge, costs, FOUR, generator, draws=5, batches=1)
    assert len(seen) == 5
    assert len(set(seen)) > 1
    assert all(layer.candidate is None for layer in layers.of.values())
    layers.choose(best)
    assert tuple(str(layer.candidate) for layer in layers.of.values()) == seen[-1]
    assert 0.9 * FOUR <= costs.of(best) <= FOUR


def test_a_cost_out_of_reach_is_refused() -> None:
    costs = bops(space("w4a4", "w8a8"), PRODUCTS)
    with pytest.raises(SearchError, match="cannot be reached"):
        least_lost([[0.2, 0.1]] * 3, costs, FOUR / 2)


def test_wide_ends_leave_the_rest_the_dearest_candidate_that_is_allowed() -> None:
    costs = bops(space("w2a4", "w3a4", "w4a4", "w8a8"), PRODUCTS)
    total = sum(PRODUCTS.values())
    first, *inner, last = PRODUCTS.values()
    with_threes = 64 * (first + last) + 12 * sum(inner)
    assert wide_ends(costs, with_threes, "w8a8") == (3, 1, 3)
    assert wide_ends(costs, with_threes - 1, "w8a8") == (3, 0, 3)
    assert wide_ends(costs, 64 * total, "w8a8") == (3, 3, 3)
    with pytest.raises(SearchError, match="add narrower ones"):
        wide_ends(costs, 9 * total, "w8a8")
    with pytest.raises(SearchError, match="has no w6a6"):
        wide_ends(costs, 64 * total, "w6a6")


@pytest.mark.parametrize("entropy", [0.3, 0.6])
def test_a_policy_that_begins_with_losses_prefers_what_pays(entropy: float) -> None:
    """Its likeliest options cost no more than allowed, and it is as undecided as it is told to be;
    losses and costs in other units change nothing."""
    costs = bops(space("w2a2", "w3a4", "w4a4", "w4a6", "w8a8"), PRODUCTS)
    drawn = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)).tolist()
    table = [sorted(row, reverse=True) for row in drawn]
    logits = first_logits(table, costs, FOUR, entropy)
    likeliest = tuple(max(range(5), key=row.__getitem__) for row in logits)
    assert costs.least < costs.of(likeliest) <= FOUR * (1 + 1e-9)
    policy = Policy((5, 5, 5), Settings(FOUR, 0), logits)
    assert policy.entropy == pytest.approx(entropy, abs=1e-3)
    prices = {name: tuple(1e6 * price for price in row) for name, row in costs.prices.items()}
    dear = replace(costs, prices=prices)
    scaled = [[1e-3 * lost for lost in row] for row in table]
    again = first_logits(scaled, dear, 1e6 * FOUR, entropy)
    for row, other in zip(logits, again, strict=True):
        assert [a - row[0] for a in row] == pytest.approx([b - other[0] for b in other], rel=1e-3)


def test_options_that_cost_the_same_are_searched_by_their_losses() -> None:
    costs = bops(space("w4a4", "w4afp4", "fp4afp4"), PRODUCTS)
    table = [[0.3, 0.2, 0.1], [0.1, 0.3, 0.2], [0.2, 0.1, 0.3]]
    logits = first_logits(table, costs, FOUR)
    assert [max(range(3), key=row.__getitem__) for row in logits] == [2, 0, 1]
    assert least_lost(table, costs, FOUR) == (2, 0, 1)
    with pytest.raises(SearchError, match="cannot be reached"):
        first_logits(table, costs, 0.99 * FOUR)


def test_a_policy_cannot_begin_with_losses_of_widths_or_of_another_space() -> None:
    wide = bops(space("w2a2", "w4a4", "w8a8", widths=(0.5, 1.0)), PRODUCTS)
    with pytest.raises(SearchError, match="begin undecided"):
        first_logits([[0.2, 0.1, 0.0]] * 3 + [[0.1, 0.0]], wide, FOUR)
    with pytest.raises(SearchError, match="first logits"):
        Policy((2, 2), Settings(FOUR, 0), [[0.0, 1.0]])
