"""Evolution: finds a formula that was hidden, screens what is no score, repeats itself exactly."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import SearchError, UsageError
from quantlib.search.evolve import Screening, Settings, evolve, is_score
from quantlib.search.expressions import Expression
from quantlib.search.proxies import KNOWN, TRAINING_FREE
from quantlib.search.rank import MeasuredPlans, qualities, rank_correlation

pytest.importorskip("deap", reason="DEAP is the extra `evolve`")

WEIGHTS, SCHEMES, PLANS = 12, 4, 60
HIDDEN = "mul(noise, mul(sqrt(weighted_rows), square(input_floor)))"
QUICK = Settings(population=40, generations=8, children=40, depth=5, seed=1)


def plans_of(seed: int, name: str = "plans") -> MeasuredPlans:
    """Plans whose losses follow HIDDEN, with 2 % of noise, at three budgets."""
    generator = np.random.default_rng(seed)
    layers = {
        column: np.repeat(generator.lognormal(0, 1, WEIGHTS), SCHEMES) for column in TRAINING_FREE
    }
    bits = np.tile(np.array([8.0, 6.0, 4.0, 2.0]), WEIGHTS)
    columns = {**layers, "bits": bits, "noise": 1.2 * 4.0**-bits}
    rows = SCHEMES * np.arange(WEIGHTS) + generator.integers(0, SCHEMES, (PLANS, WEIGHTS))
    truth = Expression.parse(HIDDEN, columns).evaluate(columns)
    losses = truth[rows].sum(1) * generator.lognormal(0, 0.02, PLANS)
    weights = np.repeat(np.arange(WEIGHTS), SCHEMES)
    budgets = np.repeat([10, 20, 30], PLANS // 3)
    return MeasuredPlans(name, columns, weights, rows, losses, 0.02 * losses, budgets)


def test_a_hidden_formula_is_found_and_ranks_a_model_it_never_saw() -> None:
    found = evolve([plans_of(0)], TRAINING_FREE, QUICK)
    best = found.members[0].expression
    held_out = plans_of(1)
    quality = qualities(held_out.scores(best.evaluate(held_out.columns)), held_out)
    assert quality["all"] > 0.9
    known = Expression.parse(KNOWN["weights"], TRAINING_FREE)
    assert (
        quality["all"]
        > qualities(held_out.scores(known.evaluate(held_out.columns)), held_out)["all"]
    )
    assert list(found.history) == sorted(found.history)
    assert 0 < found.passed < found.tried


def test_the_same_seed_finds_the_same_formulas_and_leaves_other_draws_alone() -> None:
    settings = Settings(population=15, generations=3, children=15, seed=4)
    random.seed(11)
    first = evolve([plans_of(0)], TRAINING_FREE, settings)
    after = random.random()
    random.seed(11)
    assert after == random.random()
    again = evolve([plans_of(0)], TRAINING_FREE, settings)
    assert [m.expression.text for m in first.members] == [m.expression.text for m in again.members]


def test_nobody_is_in_the_population_twice() -> None:
    members = evolve([plans_of(0)], TRAINING_FREE, QUICK).members
    assert len({member.screened.signature for member in members}) == len(members)


@pytest.mark.parametrize(
    "text",
    [
        "log(sub(noise, 1))",  # not defined
        "sub(noise, 1)",  # negative
        "noise",  # the same for every weight
        "weight_energy",  # the same in every scheme
        "mul(bits, weight_energy)",  # grows with bits
        "inverse(sub(bits, bits))",  # infinite
        "add(weight_energy, max(noise, 0.5))",  # the same in the finer schemes
    ],
)
def test_what_is_no_score_does_not_pass_the_screening(text: str) -> None:
    assert Screening(TRAINING_FREE).passes(Expression.parse(text, TRAINING_FREE)) is None


def test_formulas_that_mean_the_same_are_known_by_their_numbers() -> None:
    screening = Screening(TRAINING_FREE)
    texts = [
        "mul(noise, rows)",
        "mul(rows, noise)",
        "mul(mul(2, noise), rows)",
        "mul(noise, depth)",
    ]
    passed = [screening.passes(Expression.parse(text, TRAINING_FREE)) for text in texts]
    signatures = [one.signature for one in passed if one is not None]
    assert len(signatures) == 4
    assert len(set(signatures[:3])) == 1
    assert signatures[3] != signatures[0]


@given(st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3, unique=True))
def test_a_score_may_not_grow_where_noise_falls(values: list[float]) -> None:
    noise, weights = np.tile([0.1, 0.2, 0.3], 2), np.repeat([0, 1], 3)
    rising = np.concatenate([sorted(values), 2 * np.array(sorted(values))])
    assert is_score(rising, noise, weights)
    assert not is_score(rising[::-1].copy(), noise, weights)
    assert not is_score(rising * (weights > 0), noise, weights)  # one weight loses nothing


def test_rank_correlations_fall_back_and_say_when_there_is_none() -> None:
    rising = np.arange(20.0)
    assert rank_correlation(rising, rising**3) == pytest.approx(1.0)
    assert rank_correlation(-rising, rising) == pytest.approx(-1.0)
    few = np.array([1.0, 2.0, 3.0, 5.0, 4.0])
    assert rank_correlation(few, np.arange(5.0)) == pytest.approx(0.8)  # Kendall: 9 of 10 pairs
    assert math.isnan(rank_correlation(np.ones(20), rising))
    assert math.isnan(rank_correlation(np.full(20, np.nan), rising))


def test_equal_bytes_are_judged_without_what_sizes_tell() -> None:
    plans = plans_of(0)
    quality = qualities(plans.budgets.astype(float), plans)
    assert math.isnan(quality["equal_bytes"])
    perfect = qualities(plans.losses, plans)
    assert all(value == pytest.approx(1.0) for value in perfect.values())


def test_bad_requests_are_refused_with_a_sentence() -> None:
    with pytest.raises(SearchError, match="needs measured plans"):
        evolve([], TRAINING_FREE)
    with pytest.raises(SearchError, match="names of their own"):
        evolve([plans_of(0), plans_of(1)], TRAINING_FREE)
    with pytest.raises(SearchError, match="schemes apart"):
        evolve([plans_of(0)], ["rows", "columns"])
    with pytest.raises(UsageError, match="1 or more"):
        Settings(population=0)
    plans = plans_of(0)
    with pytest.raises(SearchError, match="not finite"):
        MeasuredPlans(
            "x", plans.columns, plans.weights, plans.plans, plans.losses * np.nan,
            plans.errors, plans.budgets,
        )  # fmt: skip
