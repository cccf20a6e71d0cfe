from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from quantlib.errors import SearchError
from quantlib.search.calibrate import Calibration
from quantlib.search.pareto import pareto_front, spread_budgets
from quantlib.search.problem import Choice, Item, Problem
from quantlib.search.solve import solve


def test_a_front_grows_in_bytes_falls_in_loss_and_spans_what_is_possible(problem: Problem) -> None:
    front = pareto_front(problem)
    sizes = [point.bytes for point in front]
    losses = [point.loss for point in front]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)
    assert front[0].bytes == problem.bytes(problem.smallest())
    assert front[-1].loss == problem.loss(problem.best())
    assert all(point.bytes <= point.budget for point in front)
    assert all(point.gap >= 0 for point in front)


def test_points_of_a_front_are_solutions_of_their_budgets(problem: Problem) -> None:
    budgets = [int(f * problem.bytes(problem.smallest())) for f in (1.3, 1.7, 2.2)]
    for budget, point in zip(budgets, pareto_front(problem, budgets), strict=True):
        assert point.budget == budget
        assert point.bytes == problem.bytes(point.picks)
        # a front may stop at a gap of 1e-4
        assert point.loss <= solve(problem, budget).loss * (1 + 1.1e-4)


def test_impossible_and_useless_budgets_are_left_out(problem: Problem) -> None:
    smallest, largest = problem.bytes(problem.smallest()), problem.bytes(problem.best())
    front = pareto_front(problem, [smallest - 1, smallest, largest, 2 * largest])
    assert [point.budget for point in front] == [smallest, largest]
    with pytest.raises(SearchError, match=f"{smallest:,}"):
        pareto_front(problem, [smallest - 1])


def test_a_calibrated_front_has_kl_with_intervals(problem: Problem) -> None:
    calibration = Calibration.fit([(s, 1.2 * s, 0.01 * s) for s in (0.1, 0.3, 0.9)])
    for point in pareto_front(problem, calibration=calibration):
        assert point.kl is not None
        assert point.kl_low is not None
        assert point.kl_high is not None
        assert point.kl_low < point.kl < point.kl_high
    assert pareto_front(problem)[0].kl is None


def test_budgets_spread_evenly_in_ratio(make_problem: Callable[..., Problem]) -> None:
    problem = make_problem(8)
    budgets = spread_budgets(problem, 12)
    ratios = [b / a for a, b in itertools.pairwise(budgets)]
    assert len(budgets) == 12
    assert max(ratios) / min(ratios) < 1.001  # whole bytes
    single = Problem((Item("a", ("a",), (Choice("w4", 10, 0.1),)),))
    assert spread_budgets(single) == [10]
    assert len(pareto_front(single)) == 1


def test_a_front_respects_further_limits() -> None:
    choices = (Choice("w2", 2, 1.0, {"ms": 5.0}), Choice("w8", 8, 0.1, {"ms": 1.0}))
    problem = Problem(tuple(Item(name, (name,), choices) for name in "abc"))
    front = pareto_front(problem, limits={"ms": 11.0})
    assert [point.bytes for point in front] == [12, 18, 24]
    with pytest.raises(SearchError, match="limits"):
        pareto_front(problem, limits={"ms": 2.0})
