from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.models.rows import Weight
from quantlib.search.build import build_problem
from quantlib.search.factors import SHARES, Trial, fit_factors, part_of, plans_alone
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Entry, Sensitivity
from quantlib.search.solve import solve

TRUE = {"encoder": 4.0, "decoder": 1.5, "embeddings": 0.5}
SIZES = (0.01, 0.003, 0.001)


def measured(sums: Mapping[str, float], slope: float = 1.2, miss: float = 1.0) -> Trial:
    """A trial whose loss is what the true factors make of the sums."""
    total = sum(TRUE[name] * value for name, value in sums.items())
    loss = 2.0 * total**slope * miss
    return Trial(sums, loss, 0.05 * loss)


def alone(slope: float = 1.2, miss: float = 1.0) -> list[Trial]:
    """Every component at three sizes of its loss, the others at nearly nothing. miss: of the first
    of them."""
    tried = [dict.fromkeys(TRUE, 1e-5) | {name: size} for name in TRUE for size in SIZES]
    return [measured(sums, slope, miss if not index else 1.0) for index, sums in enumerate(tried)]


def ratios(found: Mapping[str, float]) -> dict[str, float]:
    """Factors over their geometric mean, which is all that decides where bytes go."""
    middle = math.exp(sum(map(math.log, found.values())) / len(found))
    return {name: value / middle for name, value in found.items()}


@given(slope=st.floats(0.9, 1.4))
def test_components_that_are_measured_alone_tell_their_factors(slope: float) -> None:
    found = ratios(fit_factors(alone(slope)))
    for name, factor in ratios(TRUE).items():
        # the prior takes a twentieth of a logarithm of 1.1; what is left is measured in tens of
        # per cent
        assert found[name] == pytest.approx(factor, rel=0.15), name


def test_the_common_factor_is_left_to_the_line() -> None:
    """So that what tasks weigh against each other stays as it was."""
    middle = math.prod(fit_factors(alone()).values()) ** (1 / len(TRUE))
    assert middle == pytest.approx(1, rel=0.05)


def test_plans_that_vary_everything_together_tell_nothing() -> None:
    together = [measured(dict.fromkeys(TRUE, size)) for size in (0.03, 0.01, 0.003, 0.001)]
    assert fit_factors(together) == pytest.approx(dict.fromkeys(TRUE, 1.0), rel=1e-3)


def test_one_odd_plan_moves_a_factor_less_than_it_is_off() -> None:
    clean, odd = (ratios(fit_factors(alone(miss=miss)))["encoder"] for miss in (1.0, 5.0))
    # the mean of three logarithms would move by a third of log 5; within the prior and the line, a
    # factor of 1.5
    assert clean * 0.8 < odd < clean * 1.5


def test_a_component_nobody_measured_gets_the_common_factor() -> None:
    trials = [t._replace(sums={**t.sums, "projector": 1e-6}) for t in alone()]
    assert fit_factors(trials)["projector"] == pytest.approx(1, rel=0.05)


def test_too_little_gives_no_factors() -> None:
    assert fit_factors([]) == {}
    assert fit_factors(alone()[:3]) == {}
    one = [Trial({"encoder": s, "unheard": 0.0}, s, 0.0) for s in (0.1, 0.2, 0.3, 0.4)]
    assert fit_factors(one) == {}
    assert fit_factors([t._replace(measured=0.0) for t in alone()]) == {}


def test_a_plan_without_a_measurable_loss_is_left_out() -> None:
    nothing = Trial(dict.fromkeys(TRUE, 1e-9), 0.0, 0.0)
    assert fit_factors([*alone(), nothing]) == fit_factors(alone())


def components(weights: list[Weight]) -> dict[str, str]:
    return {weight.name: weight.component for weight in weights}


def test_each_plan_spares_all_components_but_one(problem: Problem, weights: list[Weight]) -> None:
    named = components(weights)
    best = problem.schemes(problem.best())
    plans = plans_alone(problem, named)
    changed = [{named[name] for name in plan if plan[name] != best[name]} for plan in plans]
    assert changed == [{"embeddings"}] * len(SHARES) + [{"language_model"}] * len(SHARES)
    assert all(set(plan) == set(best) for plan in plans)


def test_what_is_not_to_be_tried_keeps_its_best(problem: Problem, weights: list[Weight]) -> None:
    tried = {name: part for name, part in components(weights).items() if part == "embeddings"}
    best = problem.schemes(problem.best())
    for plan in plans_alone(problem, tried):
        assert {name for name in plan if plan[name] != best[name]} == set(tried)
    assert plans_alone(problem, {}) == []


def test_corrected_losses_find_the_better_plan(table: Sensitivity, weights: list[Weight]) -> None:
    """A table whose embedding is priced five times too high: plans alone show it, and the plan of
    the corrected table loses less by the true one."""
    named = components(weights)
    wrong = table.corrected(lambda name, *_: 5.0 if named[name] == "embeddings" else 1.0)

    def loss(plan: Mapping[str, str], of: Sensitivity) -> dict[str, float]:
        sums = dict.fromkeys(named.values(), 0.0)
        for name, scheme in plan.items():
            sums[named[name]] += of.entry(name, scheme).loss["kl"]
        return sums

    def planned(of: Sensitivity) -> Mapping[str, str]:
        asked = build_problem(of, weights, fixed_bytes=0)
        low, high = asked.bytes(asked.smallest()), asked.bytes(asked.best())
        return asked.schemes(solve(asked, (low + high) // 3).picks)

    trials = [
        Trial(loss(plan, wrong), sum(loss(plan, table).values()), 0.0)
        for plan in plans_alone(build_problem(wrong, weights, fixed_bytes=0), named)
    ]
    factors = fit_factors(trials)
    right = wrong.corrected(lambda name, *_: factors[named[name]])
    before, after, least = (sum(loss(planned(of), table).values()) for of in (wrong, right, table))
    assert least <= after < before
    assert after - least <= 0.1 * (before - least)


def test_correcting_multiplies_losses_and_their_errors(table: Sensitivity) -> None:
    first, second = table.weights[:2]
    found = table.corrected(lambda name, scheme, task: 3.0 if name == first else 1.0)
    for scheme, entry in table.rows[first].items():
        assert found.entry(first, scheme).loss["kl"] == 3 * entry.loss["kl"]
        assert found.entry(first, scheme).error["kl"] == 3 * entry.error["kl"]
        assert found.entry(first, scheme).bytes == entry.bytes
    assert found.rows[second] == table.rows[second]
    assert found.digest() != table.digest()
    assert table.corrected(lambda *_: 1.0) == table


def test_factors_are_numbers_that_keep_losses_positive() -> None:
    generator = np.random.default_rng(0)
    wild = [t._replace(measured=t.measured * float(generator.lognormal(0, 2))) for t in alone()]
    assert all(math.isfinite(f) and f > 0 for f in fit_factors(wild).values())


def test_what_is_tried_alone_is_rounded_and_the_others_stay_as_they_are(
    table: Sensitivity, weights: list[Weight]
) -> None:
    rows = {
        name: {**row, "bf16": Entry(10**6, {"kl": 0.0}, {"kl": 0.0})}
        for name, row in table.rows.items()
    }
    problem = build_problem(replace(table, rows=rows), weights, fixed_bytes=0)
    named = components(weights)
    plans = plans_alone(problem, named)
    for plan in plans:
        rounded = {named[name] for name, scheme in plan.items() if scheme != "bf16"}
        assert len(rounded) == 1
        assert all(plan[name] != "bf16" for name in plan if {named[name]} == rounded)
    assert len(plans) == 2 * len(SHARES)


BLOCKS = "w6g64@1/8+w3g32"


def test_blocks_of_rows_are_tried_apart_from_rows_that_are_alike(
    table: Sensitivity, weights: list[Weight]
) -> None:
    problem = build_problem(_with_blocks(table, weights, 0.2), weights, fixed_bytes=0)
    named = components(weights)
    [embedding] = [name for name, part in named.items() if part == "embeddings"]
    best = problem.schemes(problem.best())
    tried = [plan[embedding] for plan in plans_alone(problem, named) if plan != best]
    alike = [scheme for scheme in tried if scheme not in (BLOCKS, best[embedding])]
    assert len(set(alike)) >= 2
    assert tried.count(BLOCKS) == 1
    assert part_of("embeddings", BLOCKS) != part_of("embeddings", "w3g32") == "embeddings"
    assert part_of("embeddings", "bf16") == "embeddings"


WIDER = "w6g64@1/8+w4g32"


def test_blocks_are_one_part_where_their_narrowest_has_as_many_bits() -> None:
    assert part_of("embeddings", BLOCKS) == part_of("embeddings", "w8g64@1/64+w4g32@1/8+w3g32z4s4")
    assert part_of("embeddings", BLOCKS) != part_of("embeddings", WIDER)
    assert part_of("embeddings", BLOCKS) != part_of("audio_tower", BLOCKS)
    assert "3 bits" in part_of("embeddings", BLOCKS)


def test_a_word_that_was_never_heard_says_nothing_of_wider_blocks(
    table: Sensitivity, weights: list[Weight]
) -> None:
    """Blocks of 3 bits lose twenty times what is predicted, those of 4 as much as rows that are
    alike: both are tried, and only the first get dearer."""
    named = components(weights)
    hopeful = _with_blocks(_with_blocks(table, weights, 0.5), weights, 0.4, WIDER)
    true = _with_blocks(hopeful, weights, 10.0)
    plans = plans_alone(build_problem(hopeful, weights, fixed_bytes=0), named)
    assert {BLOCKS, WIDER} <= {scheme for plan in plans for scheme in plan.values()}
    factors = fit_factors(
        [
            Trial(_sums(plan, hopeful, named), sum(_sums(plan, true, named).values()), 0.0)
            for plan in plans
        ]
    )
    narrow, wide = (factors[part_of("embeddings", scheme)] for scheme in (BLOCKS, WIDER))
    assert narrow > 5 * wide
    assert 0.67 < wide / factors["embeddings"] < 1.5


def test_every_candidate_of_few_blocks_is_tried(table: Sensitivity, weights: list[Weight]) -> None:
    twice = "w8g64@1/8+w3g32"
    known = _with_blocks(_with_blocks(table, weights, 0.5), weights, 0.4, twice, more=100)
    plans = plans_alone(build_problem(known, weights, fixed_bytes=0), components(weights))
    assert {BLOCKS, twice} <= {scheme for plan in plans for scheme in plan.values()}


def test_hopeful_prices_of_blocks_do_not_raise_those_of_plain_rows(
    table: Sensitivity, weights: list[Weight]
) -> None:
    """Blocks whose loss is predicted at a tenth of what it is: their factor says so, and the others
    stay as they are to each other."""
    named = components(weights)
    true, hopeful = (_with_blocks(table, weights, share) for share in (0.5, 0.05))

    plans = plans_alone(build_problem(hopeful, weights, fixed_bytes=0), named)
    factors = fit_factors(
        [
            Trial(_sums(plan, hopeful, named), sum(_sums(plan, true, named).values()), 0.0)
            for plan in plans
        ]
    )
    blocks = factors.pop(part_of("embeddings", BLOCKS))
    # one plan against a prior of a factor of e takes a part of the tenth back
    assert blocks > 4 * max(factors.values())
    assert max(factors.values()) < 1.5 * min(factors.values())


def _sums(
    plan: Mapping[str, str], of: Sensitivity, component_of: Mapping[str, str]
) -> dict[str, float]:
    """Part -> sum of its losses in a plan."""
    found: dict[str, float] = {}
    for name, scheme in plan.items():
        part = part_of(component_of[name], scheme)
        found[part] = found.get(part, 0.0) + of.entry(name, scheme).loss["kl"]
    return found


def _with_blocks(
    table: Sensitivity, weights: list[Weight], share: float, scheme: str = BLOCKS, more: int = 0
) -> Sensitivity:
    """The table with one candidate more of the embedding: in blocks of rows, at the bytes of
    w4g32 (and `more`) and `share` of its loss."""
    rows = dict(table.rows)
    for name, part in components(weights).items():
        if part == "embeddings":
            plain = rows[name]["w4g32"]
            loss = {task: share * value for task, value in plain.loss.items()}
            rows[name] = {**rows[name], scheme: Entry(plain.bytes + more, loss, loss)}
    return replace(table, rows=rows)
