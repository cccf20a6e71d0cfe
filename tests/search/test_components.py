"""Byte budgets of components: exact, together with any other budget, and never overspent."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import SearchError, UsageError
from quantlib.models.rows import Weight
from quantlib.search.build import build_problem
from quantlib.search.components import (
    component_cost,
    component_costs,
    component_fixed,
    component_limits,
    component_text,
    is_component,
)
from quantlib.search.problem import Choice, Item, Problem
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.solve import solve


@dataclass(frozen=True)
class Part:
    name: str
    bytes: int


PARTS = (Part("vision", 1000), Part("vision_head", 500), Part("decoder", 4000))


def test_sizes_and_shares_of_a_component_and_of_several_together() -> None:
    found = component_limits(["vision=2kB", "decoder=30%", "vision*=10%"], PARTS)
    assert found == {"bytes:vision": 2000.0, "bytes:decoder": 1200.0, "bytes:vision*": 150.0}
    assert all(map(is_component, found))
    assert not is_component("decode_ms@256")
    assert component_text("bytes:vision", 2000.0) == "2.00 kB for vision"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["audio=2MB"], "its components are vision, vision_head, decoder"),
        (["vision"], "write COMPONENT=SIZE"),
        (["=2MB"], "write COMPONENT=SIZE"),
        (["vision=much"], "is not a size"),
        (["vision=0"], "must be positive"),
        (["vision=1kB", "vision=2kB"], "two budgets"),
    ],
)
def test_mistakes_are_sentences(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        component_limits(texts, PARTS)


def test_weights_of_other_components_cost_nothing_of_it_and_kept_ones_do(
    table: Sensitivity, weights: list[Weight]
) -> None:
    sizes = {name: {s: e.bytes for s, e in row.items()} for name, row in table.rows.items()}
    costs = component_costs(component_cost("embed*"), weights, sizes)
    assert costs[weights[0].name, "w4g32"] == sizes[weights[0].name]["w4g32"]
    assert {costs[w.name, "w4g32"] for w in weights[1:]} == {0.0}
    kept = {"embeddings": 10, "language_model": 7}
    assert component_fixed("bytes:embeddings", kept) == 10.0
    assert component_fixed("bytes:*", kept) == 17.0


def limited(table: Sensitivity, weights: list[Weight], name: str, fixed: float = 0.0) -> Problem:
    sizes = {weight: {s: e.bytes for s, e in row.items()} for weight, row in table.rows.items()}
    cost = component_cost(name)
    costs = {cost: component_costs(cost, weights, sizes)}
    return build_problem(table, weights, fixed_bytes=0, costs=costs, fixed_costs={cost: fixed})


def test_a_component_keeps_to_its_budget_and_the_rest_gets_what_it_frees(
    table: Sensitivity, weights: list[Weight]
) -> None:
    problem = limited(table, weights, "embeddings")
    cost = component_cost("embeddings")
    budget = (problem.bytes(problem.smallest()) + problem.bytes(problem.best())) // 2
    free = solve(problem, budget)
    used = problem.cost(cost, free.picks)
    tight = solve(problem, budget, {cost: used - 1})
    assert tight.costs[cost] < used
    assert 0.995 * budget < tight.bytes <= budget, "what it frees is spent elsewhere"
    assert tight.loss > free.loss
    loose = solve(problem, budget, {cost: used})
    assert loose.loss == pytest.approx(free.loss, rel=2e-4)  # within both gaps


def test_what_is_impossible_says_what_is_possible_and_why(
    table: Sensitivity, weights: list[Weight]
) -> None:
    problem = limited(table, weights, "embeddings", fixed=500.0)
    with pytest.raises(SearchError, match="100 bytes for embeddings is impossible") as error:
        solve(problem, None, {component_cost("embeddings"): 100.0})
    assert "500 bytes (500 bytes) no scheme changes (what stays in 16 bits)" in str(error.value)
    assert "embed_tokens" in str(error.value)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Problem, int, dict[str, float]]:
    """Up to five items in two components, a budget, and a budget for each component."""
    items = []
    choice = st.tuples(st.integers(1, 30), st.floats(0, 5).map(lambda x: round(x, 2)))
    for index, drawn in enumerate(
        draw(st.lists(st.lists(choice, min_size=1, max_size=4), min_size=1, max_size=5))
    ):
        choices = tuple(
            Choice(
                f"w{bits}",
                size,
                loss,
                {"bytes:a": float(size * (index % 2)), "bytes:b": float(size * (1 - index % 2))},
            )
            for bits, (size, loss) in enumerate(drawn, 2)
        )
        items.append(Item(f"i{index}", (f"i{index}",), choices))
    limits = {name: float(draw(st.integers(0, 90))) for name in ("bytes:a", "bytes:b")}
    return Problem(tuple(items), 1), draw(st.integers(1, 120)), limits


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_the_optimum_under_component_budgets_is_what_brute_force_finds(
    case: tuple[Problem, int, dict[str, float]],
) -> None:
    problem, budget, limits = case
    every = itertools.product(*(range(len(item.choices)) for item in problem.items))
    fitting = [picks for picks in every if problem.fits(picks, budget, limits)]
    if not fitting:
        with pytest.raises(SearchError, match=r"impossible|no allocation"):
            solve(problem, budget, limits)
        return
    solution = solve(problem, budget, limits, relative_gap=0)
    assert solution.picks in fitting
    assert solution.loss <= min(map(problem.loss, fitting)) + 1e-9  # sums of floats
