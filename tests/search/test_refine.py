"""Refinement on objectives whose truth is known: misjudged weights, interactions, noise."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from quantlib.errors import SearchError
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem
from quantlib.search.refine import Refined, refine
from quantlib.search.solve import solve

WINDOWS = 16


class Truth:
    """True KL: predicted losses times a factor per weight, plus interactions inside each layer."""

    def __init__(self, problem: Problem, spread: float, interaction: float, noise: float) -> None:
        generator = np.random.default_rng(7)
        self.problem = problem
        self.factor = np.exp(spread * generator.normal(size=len(problem.items)))
        self.interaction, self.noise = interaction, noise
        self.window = 1 + 0.3 * generator.normal(size=WINDOWS)
        self.generator = generator
        self.calls: list[Plan] = []

    def kl(self, plan: Plan) -> float:
        losses = self.factor * [
            choice.loss for choice in self.problem.chosen(self.problem.picks(plan.schemes))
        ]
        neighbours = np.sqrt(losses[1:] * losses[:-1])
        return float(losses.sum() + self.interaction * neighbours.sum())

    def __call__(self, plan: Plan) -> np.ndarray:
        self.calls.append(plan)
        # hard and easy windows, the same ones for every plan, and a little noise of their own
        own = 1 + self.noise * self.generator.normal(size=WINDOWS)
        return self.kl(plan) * self.window * own


def start(problem: Problem) -> Plan:
    return Plan.from_solution(problem, solve(problem, int(1.5 * problem.bytes(problem.smallest()))))


def run(problem: Problem, truth: Truth, trials: int, seed: int = 0) -> Refined:
    return refine(start(problem), problem, truth, trials, torch.Generator().manual_seed(seed))


def test_misjudged_weights_are_found_and_the_true_kl_falls(
    make_problem: Callable[..., Problem],
) -> None:
    problem = make_problem(layers=4)
    truth = Truth(problem, spread=0.7, interaction=0.3, noise=0.0)
    refined = run(problem, truth, trials=60)
    before, after = truth.kl(start(problem)), truth.kl(refined.plan)
    assert after < 0.95 * before
    assert refined.kl_after < refined.kl_before


@pytest.mark.parametrize("seed", range(4))
def test_refining_never_worsens_where_evaluation_is_exact(
    seed: int, make_problem: Callable[..., Problem]
) -> None:
    problem = make_problem(layers=2, seed=seed)
    truth = Truth(problem, spread=0.5, interaction=1.0, noise=0.0)
    refined = run(problem, truth, trials=25, seed=seed)
    kl = [truth.kl(start(problem))]
    for trial, plan in zip(refined.trials, truth.calls[1:], strict=True):
        if trial.accepted:
            kl.append(truth.kl(plan))
    assert kl == sorted(kl, reverse=True)
    assert truth.kl(refined.plan) == kl[-1]


def test_no_plan_ever_tried_exceeds_the_budget_or_is_tried_twice(problem: Problem) -> None:
    truth = Truth(problem, spread=0.5, interaction=0.5, noise=0.01)
    refined = run(problem, truth, trials=30)
    budget = start(problem).budget
    assert budget is not None
    assert all(plan.bytes <= budget for plan in truth.calls)
    assert all(problem.bytes(problem.picks(plan.schemes)) == plan.bytes for plan in truth.calls)
    tried = [json.dumps(plan.schemes) for plan in truth.calls]
    assert len(set(tried)) == len(tried)
    assert refined.plan.budget == budget
    assert refined.plan.predicted == {} or not any(t.accepted for t in refined.trials)


def test_noise_alone_is_hardly_ever_taken_for_progress(problem: Problem) -> None:
    # the prediction is the truth, so no exchange can help; each window is off by 5 %
    accepted = trials = 0
    for seed in range(4):
        truth = Truth(problem, spread=0.0, interaction=0.0, noise=0.05)
        refined = run(problem, truth, trials=15, seed=seed)
        accepted += sum(trial.accepted for trial in refined.trials)
        trials += len(refined.trials)
        assert truth.kl(refined.plan) < 1.05 * truth.kl(start(problem))
    # beyond two standard errors by chance: 3 % of trials (t with 15 degrees of freedom)
    assert accepted <= 0.1 * trials


def test_the_paired_error_sees_what_the_spread_of_windows_hides(problem: Problem) -> None:
    # windows differ by 30 %, exchanges change them by a few: unpaired errors would see nothing
    truth = Truth(problem, spread=0.7, interaction=0.0, noise=0.001)
    refined = run(problem, truth, trials=30)
    assert any(trial.accepted for trial in refined.trials)
    unpaired = refined.kl_before * 0.3 / np.sqrt(WINDOWS)
    assert np.median([trial.error for trial in refined.trials]) < 0.1 * unpaired


def test_trials_teach_so_predictions_get_better(make_problem: Callable[..., Problem]) -> None:
    problem = make_problem(layers=4)
    truth = Truth(problem, spread=0.7, interaction=0.0, noise=0.0)
    trials = run(problem, truth, trials=60).trials
    misses = [abs(trial.predicted - trial.measured) for trial in trials]
    third = len(misses) // 3
    assert third >= 5
    assert np.median(misses[-third:]) < 0.5 * np.median(misses[:third])


def test_the_same_seed_gives_the_same_journal_and_another_one_another(problem: Problem) -> None:
    def journal(seed: int) -> str:
        truth = Truth(problem, spread=0.5, interaction=0.5, noise=0.01)
        refined = run(problem, truth, trials=10, seed=seed)
        return json.dumps([trial.to_dict() for trial in refined.trials])

    assert journal(0) == journal(0) != journal(1)


def test_the_journal_tells_what_was_exchanged(problem: Problem) -> None:
    refined = run(problem, Truth(problem, 0.5, 0.0, 0.0), trials=10)
    for index, trial in enumerate(refined.trials):
        assert trial.index == index
        assert 1 <= len(trial.moves) <= 2
        assert all(before != after for _, before, after in trial.moves)
        assert trial.accepted == (trial.measured + 2 * trial.error < 0)


def test_windows_may_be_a_tensor_and_no_trials_leave_the_plan_as_it_is(problem: Problem) -> None:
    truth = Truth(problem, 0.5, 0.0, 0.0)
    plan = start(problem)
    generator = torch.Generator().manual_seed(0)
    refined = refine(plan, problem, lambda p: torch.tensor(truth(p)), 0, generator)
    assert refined.plan == plan
    assert refined.trials == ()
    assert refined.kl_before == refined.kl_after


def test_bad_evaluations_and_plans_over_budget_are_sentences(problem: Problem) -> None:
    plan, generator = start(problem), torch.Generator().manual_seed(0)
    for windows, message in (([0.1], "two or more"), ([0.1, float("nan")], "not finite")):
        with pytest.raises(SearchError, match=message):
            refine(plan, problem, lambda _, windows=windows: windows, 3, generator)
    counts = iter([4, 5])
    with pytest.raises(SearchError, match="same two or more windows"):
        refine(plan, problem, lambda _: np.full(next(counts), 0.1), 3, generator)
    over = Plan.of(problem, problem.best(), budget=plan.budget)
    with pytest.raises(SearchError, match="more than its budget"):
        refine(over, problem, lambda _: np.full(4, 0.1), 3, generator)
