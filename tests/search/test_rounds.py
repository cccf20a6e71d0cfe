"""Exchanges tried several at a time: whoever measures them, the same plan is found."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from quantlib.errors import SearchError
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem
from quantlib.search.refine import Refined, refine, refine_in_rounds
from quantlib.search.solve import solve


def truth_of(problem: Problem, plan: Plan) -> np.ndarray:
    """KL of 8 windows: predicted losses times a factor per item; windows differ."""
    factor = np.exp(0.7 * np.random.default_rng(3).normal(size=len(problem.items)))
    losses = [choice.loss for choice in problem.chosen(problem.picks(plan.schemes))]
    return float(factor @ np.array(losses)) * np.linspace(0.8, 1.2, 8)


def start(problem: Problem) -> Plan:
    return Plan.from_solution(problem, solve(problem, int(1.5 * problem.bytes(problem.smallest()))))


def rounds(problem: Problem, trials: int, width: int, asked: list[int] | None = None) -> Refined:
    def evaluate(plans: Sequence[Plan]) -> list[np.ndarray]:
        if asked is not None:
            asked.append(len(plans))
        backwards = [truth_of(problem, plan) for plan in reversed(plans)]
        return backwards[::-1]  # measured in any order, returned in that of the question

    generator = torch.Generator().manual_seed(0)
    return refine_in_rounds(start(problem), problem, evaluate, trials, generator, width=width)


def test_rounds_of_one_are_what_refining_always_did(problem: Problem) -> None:
    generator = torch.Generator().manual_seed(0)
    one_by_one = refine(
        start(problem), problem, lambda plan: truth_of(problem, plan), 12, generator
    )
    assert rounds(problem, 12, 1) == one_by_one


def test_a_round_is_asked_at_once_and_the_last_one_is_shorter(problem: Problem) -> None:
    asked: list[int] = []
    refined = rounds(problem, 20, 8, asked)
    assert asked == [1, 8, 8, 4]  # the plan itself first
    assert len(refined.trials) == sum(asked[1:])
    assert [trial.index for trial in refined.trials] == list(range(20))


def test_of_a_round_at_most_one_exchange_is_kept_and_it_is_the_best(problem: Problem) -> None:
    asked: list[int] = []
    refined = rounds(problem, 32, 8, asked)
    kept, trials = 0, iter(refined.trials)
    for count in asked[1:]:  # fewer than 8 where the beliefs have no more to propose
        one_round = list(itertools.islice(trials, count))
        accepted = [trial for trial in one_round if trial.accepted]
        assert len(accepted) <= 1
        if accepted:
            kept += 1
            assert accepted[0].measured == min(trial.measured for trial in one_round)
    assert kept
    assert refined.kl_after < refined.kl_before
    assert refined.kl_after == pytest.approx(float(truth_of(problem, refined.plan).mean()))


def test_plans_of_a_round_differ_and_fit(problem: Problem) -> None:
    seen: list[str] = []

    def evaluate(plans: Sequence[Plan]) -> list[np.ndarray]:
        seen.extend(str(plan.schemes) for plan in plans)
        budget = start(problem).budget
        assert budget is not None
        assert all(plan.bytes <= budget for plan in plans)
        return [truth_of(problem, plan) for plan in plans]

    generator = torch.Generator().manual_seed(1)
    refine_in_rounds(start(problem), problem, evaluate, 16, generator, width=8)
    assert len(set(seen)) == len(seen)


def test_a_round_with_a_broken_plan_is_refused(problem: Problem) -> None:
    def evaluate(plans: Sequence[Plan]) -> list[np.ndarray]:
        found = [truth_of(problem, plan) for plan in plans]
        if len(found) > 1:
            found[-1][0] = np.nan
        return found

    generator = torch.Generator().manual_seed(1)
    with pytest.raises(SearchError, match="not finite"):
        refine_in_rounds(start(problem), problem, evaluate, 16, generator, width=8)
