"""Min-max over tasks: exact where everything can be tried, and honest about its gap elsewhere."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import SearchError
from quantlib.search.pareto import pareto_front
from quantlib.search.problem import Choice, Item, Problem
from quantlib.search.solve import Solver, solve
from quantlib.search.tasks import COMBINED, Objective, task_cost

TASKS = ("text", "image", "decoder")
SUM = 1e-9
"""Relative tolerance of sums of floats in another order."""


def problem_of(
    drawn: list[list[tuple[int, tuple[float, ...]]]],
    scales: dict[str, float],
    balance: str = "minmax",
    limited: bool = False,
) -> Problem:
    """drawn: for every item, for every choice, its bytes and its loss in every task."""
    items = []
    for number, choices in enumerate(drawn):
        made = []
        for bits, (size, losses) in enumerate(choices, 2):
            costs = {task_cost(task): loss for task, loss in zip(scales, losses, strict=True)}
            costs |= {"bytes:vision": float(size if number % 2 else 0)} if limited else {}
            loss = math.fsum(scales[t] * x for t, x in zip(scales, losses, strict=True))
            made.append(Choice(f"w{bits}", size, loss, costs))
        items.append(Item(f"i{number}", (f"i{number}",), tuple(made)))
    objective = Objective({}, balance)
    return Problem(tuple(items), 3, task=COMBINED, objective=objective, scales=scales)


losses = st.floats(0, 10).map(lambda x: round(x, 3))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, int, float]:
    """A problem of two or three tasks, a budget between its extremes, and a limit on `vision`."""
    tasks = draw(st.sampled_from([2, 3]))
    choice = st.tuples(st.integers(0, 40), st.tuples(*[losses] * tasks))
    drawn = draw(st.lists(st.lists(choice, min_size=1, max_size=4), min_size=1, max_size=5))
    weights = draw(st.tuples(*[st.sampled_from([0.1, 1.0, 1.0, 7.0])] * tasks))
    scales = dict(zip(TASKS[:tasks], weights, strict=True))
    problem = problem_of(drawn, scales, limited=True)
    low, high = (problem.bytes(picks) for picks in (problem.smallest(), problem.best()))
    budget = draw(st.integers(low, max(low, high)))
    return problem, budget, float(draw(st.integers(0, 80)))


def every_allocation(problem: Problem) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(len(item.choices)) for item in problem.items))


@settings(max_examples=150, deadline=None)
@given(case=problems())
def test_no_allocation_within_the_budgets_has_a_smaller_largest_increase(
    case: tuple[Problem, int, float],
) -> None:
    problem, budget, vision = case
    limits = {"bytes:vision": vision}
    fitting = [p for p in every_allocation(problem) if problem.fits(p, budget, limits)]
    if not fitting:
        with pytest.raises(SearchError, match=r"impossible|no allocation"):
            solve(problem, budget, limits)
        return
    best = min(problem.value(picks) for picks in fitting)
    solution = solve(problem, budget, limits, relative_gap=0)
    assert solution.picks in fitting
    assert solution.loss <= best * (1 + 10 * SUM) + 1e-12
    # the bounds bound what is possible, and not only what was found
    assert solution.lp_bound <= best * (1 + SUM) + 1e-12
    assert solution.loss * (1 - solution.proven_gap) <= best * (1 + 1e-6) + 1e-9


@settings(max_examples=60, deadline=None)
@given(case=problems())
def test_no_exchange_of_two_items_lowers_the_sum_without_raising_the_largest(
    case: tuple[Problem, int, float],
) -> None:
    problem, budget, _ = case
    solution = solve(problem, budget, relative_gap=0)
    for picks in every_allocation(problem):
        changed = sum(a != b for a, b in zip(picks, solution.picks, strict=True))
        within = problem.bytes(picks) <= budget and problem.value(picks) <= solution.loss
        if changed <= 2 and within:
            assert problem.loss(solution.picks) <= problem.loss(picks) * (1 + SUM) + 1e-12


def test_bytes_that_the_worst_task_cannot_use_go_to_the_others() -> None:
    # the decoder has its own budget, which keeps it at 9 whatever else is bought
    vision = [[(4, (1.0, 0.0)), (8, (0.1, 0.0))]]
    decoder = [[(4, (0.0, 9.0)), (8, (0.0, 1.0))]]
    problem = problem_of(vision + decoder, {"text": 1.0, "image": 1.0}, limited=True)
    solution = solve(problem, 100, {"bytes:vision": 4.0})
    assert problem.task_losses(solution.picks) == {"text": 0.1, "image": 9.0}


def large(balance: str, seed: int = 0) -> Problem:
    """120 weights of three components, each of which matters to other tasks; 8 schemes each."""
    generator = np.random.default_rng(seed)
    drawn = []
    for index in range(120):
        size = 400_000 if index == 0 else int(generator.choice([10_000, 30_000, 80_000]))
        matters = [(1.0, 1.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)][index % 3]
        importance = 10 ** generator.uniform(-4, -2, 3) * matters
        choices = []
        for bits, group in itertools.product(range(2, 6), (32, 64)):
            loss = importance * 4.0 ** (4 - bits) * (1 + group / 200)
            choices.append((size * bits // 8 + size // group, tuple(map(float, loss))))
        drawn.append(choices)
    return problem_of(drawn, {"text": 1.0, "image": 0.3, "decoder": 4.0}, balance)


def test_the_worst_task_is_better_off_than_under_the_sum_and_the_sum_is_worse() -> None:
    summed, balanced = large("sum"), large("minmax")
    low, high = (summed.bytes(picks) for picks in (summed.smallest(), summed.best()))
    for share in (0.2, 0.5):
        budget = int(low + share * (high - low))
        by_sum = solve(summed, budget).picks
        solution = Solver(balanced).solve(budget)
        assert solution.optimal
        assert solution.proven_gap <= 1e-3
        assert solution.loss < balanced.value(by_sum)
        assert summed.loss(solution.picks) > summed.loss(by_sum)
        # with hundreds of choices nothing keeps one task far ahead of the others for nothing
        levels = [balanced.scales[t] * x for t, x in balanced.task_losses(solution.picks).items()]
        assert min(levels) > 0.9 * max(levels)


def test_a_front_shows_the_largest_increase_and_it_falls() -> None:
    problem = large("minmax", seed=1)
    low, high = (problem.bytes(picks) for picks in (problem.smallest(), problem.best()))
    front = pareto_front(problem, [int(low + share * (high - low)) for share in (0, 0.3, 0.6, 1)])
    assert len(front) > 2
    for point, after in itertools.pairwise(front):
        assert point.loss == problem.value(point.picks)
        assert after.loss < point.loss
        assert point.gap <= 5e-3, "what is proven is near enough for a picture"


def test_a_task_that_is_left_out_is_not_balanced_but_still_reported() -> None:
    drawn = [[(4, (1.0, 9.0)), (8, (0.5, 0.0))], [(4, (2.0, 0.0)), (8, (0.0, 9.0))]]
    problem = problem_of(drawn, {"text": 1.0, "image": 0.0})
    assert problem.balanced == ("text",)
    picks = solve(problem, 15).picks
    assert problem.task_losses(picks) == {"text": 1.0, "image": 18.0}
