from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from quantlib.errors import SearchError
from quantlib.search.baselines import heuristic_first_last, ladder, random_allocation, uniform
from quantlib.search.build import build_problem
from quantlib.search.constraints import parse_rules, scheme_bits
from quantlib.search.problem import Picks, Problem
from quantlib.search.relaxation import undominated
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.solve import solve

Allocator = Callable[[Problem, int], Picks]
ALLOCATORS: dict[str, Allocator] = {
    "uniform": uniform,
    "heuristic": heuristic_first_last,
    "random": lambda problem, budget: random_allocation(problem, budget, seed=0),
}


def budgets(problem: Problem) -> list[int]:
    low, high = problem.bytes(problem.smallest()), problem.bytes(problem.best())
    return [int(low + share * (high - low)) for share in (0.05, 0.25, 0.5, 0.75)]


@pytest.mark.parametrize("name", ALLOCATORS)
def test_baselines_never_exceed_the_budget_and_use_it_up(
    name: str, make_problem: Callable[..., Problem]
) -> None:
    problem = make_problem(layers=8)
    for budget in budgets(problem):
        size = problem.bytes(ALLOCATORS[name](problem, budget))
        assert 0.97 * budget <= size <= budget  # the embedding of this small model is 14 % of it


@pytest.mark.parametrize("name", ALLOCATORS)
def test_the_solver_loses_less_than_every_baseline_at_equal_bytes(
    name: str, make_problem: Callable[..., Problem]
) -> None:
    problem = make_problem(layers=4, seed=1)
    for budget in budgets(problem):
        picks = ALLOCATORS[name](problem, budget)
        exact = solve(problem, budget)
        assert exact.loss < problem.loss(picks)
        assert solve(problem, problem.bytes(picks)).loss < problem.loss(picks)


def test_uniform_is_one_scheme_and_the_next_one_from_the_first_layer_on(
    make_problem: Callable[..., Problem],
) -> None:
    problem = make_problem(layers=8)
    budget = budgets(problem)[1]
    schemes = problem.schemes(uniform(problem, budget))
    rungs = ladder(problem)
    used = sorted(set(schemes.values()), key=rungs.index)
    assert len(used) == 2
    assert rungs.index(used[1]) == rungs.index(used[0]) + 1
    first_left = next(i for i, s in enumerate(schemes.values()) if s == used[0])
    raised = sum(s == used[1] for s in schemes.values())
    assert raised <= first_left + 5  # later ones only where the next in line was too large to fit


def test_the_ladder_climbs_in_bytes_and_falls_in_loss(problem: Problem) -> None:
    def level(scheme: str) -> Picks:
        return problem.picks(dict.fromkeys(problem.weights, scheme))

    rungs = ladder(problem)
    sizes = [problem.bytes(level(scheme)) for scheme in rungs]
    losses = [problem.loss(level(scheme)) for scheme in rungs]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)


def test_the_rule_of_thumb_favours_the_ends_and_the_down_projections(
    make_problem: Callable[..., Problem],
) -> None:
    problem = make_problem(layers=16)
    schemes = problem.schemes(heuristic_first_last(problem, budgets(problem)[1]))
    bits = {name: scheme_bits(scheme) for name, scheme in schemes.items()}
    base = Counter(bits[n] for n in bits if ".8." in n and "o_proj" in n).most_common(1)[0][0]
    for layer in range(16):
        end = layer in (0, 1, 14, 15)
        assert (bits[f"model.layers.{layer}.self_attn.q_proj.weight"] > base) == end
        for name in ("self_attn.v_proj", "mlp.down_proj"):
            assert bits[f"model.layers.{layer}.{name}.weight"] > base


@pytest.mark.parametrize("seed", range(10))
def test_random_allocations_fit_leave_no_step_that_fits_and_repeat(
    seed: int, problem: Problem
) -> None:
    budget = budgets(problem)[1]
    picks = random_allocation(problem, budget, seed)
    slack = budget - problem.bytes(picks)
    assert slack >= 0
    for item, pick in zip(problem.items, picks, strict=True):
        stair = sorted(undominated(item.choices), key=lambda index: item.choices[index].bytes)
        above = stair[stair.index(pick) + 1 :]
        if above:
            assert item.choices[above[0]].bytes - item.choices[pick].bytes > slack
    assert picks == random_allocation(problem, budget, seed)


def test_random_allocations_differ_and_so_do_their_losses(problem: Problem) -> None:
    budget = budgets(problem)[2]
    found = {random_allocation(problem, budget, seed) for seed in range(20)}
    assert len(found) == 20
    losses = [problem.loss(picks) for picks in found]
    assert max(losses) > 1.2 * min(losses)


def test_pinned_and_floored_items_keep_to_their_rules(table: Sensitivity, weights: Any) -> None:
    rules = parse_rules(floors=["v_proj=6"], pins=["lm_head=w8g64"])
    problem = build_problem(table, weights, fixed_bytes=0, rules=rules)
    for name, allocate in ALLOCATORS.items():
        schemes = problem.schemes(allocate(problem, budgets(problem)[1]))
        assert schemes["model.embed_tokens.weight"] == "w8g64", name
        assert all(scheme_bits(s) >= 6 for n, s in schemes.items() if "v_proj" in n)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_budget_below_the_smallest_is_refused(name: str, problem: Problem) -> None:
    smallest = problem.bytes(problem.smallest())
    assert problem.bytes(ALLOCATORS[name](problem, smallest)) == smallest
    with pytest.raises(SearchError, match=f"at least {smallest:,} bytes"):
        ALLOCATORS[name](problem, smallest - 1)
