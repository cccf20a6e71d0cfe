from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import UsageError
from quantlib.search.build import build_problem
from quantlib.search.constraints import Rule, parse_rules, scheme_bits
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Sensitivity


def constrained(table: Sensitivity, weights: Any, **rules: list[str]) -> Problem:
    return build_problem(table, weights, fixed_bytes=0, rules=parse_rules(**rules))


def candidates(problem: Problem) -> dict[str, set[str]]:
    return {item.name: {choice.scheme for choice in item.choices} for item in problem.items}


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("w3g64z", 3), ("fp8", 8), ("mxfp4", 4), ("nvfp4", 4), ("bf16", 16), ("f32", 32), ("w8a8", 8)],
)
def test_bits_of_a_scheme_are_those_of_its_codes(scheme: str, bits: int) -> None:
    assert scheme_bits(scheme) == bits


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("language_model", 28),  # a component
        ("embedding", 1),  # a kind
        ("model.layers.0.self_attn.q_proj", 1),  # a module
        ("model.layers.0.self_attn.q_proj.weight", 1),  # a weight
        ("model.layers.1.mlp_in", 2),  # a linear group
        ("down_proj", 4),  # the end of a name
        ("layers.0.*", 7),
        ("*.self_attn.?_proj", 16),
        ("lm_head", 1),  # an alias of the tied embedding
        ("re:.*layers\\.[01]\\..*", 14),
        ("re:.*(up|gate)_proj", 8),
        ("*", 29),
    ],
)
def test_a_pattern_matches_by_component_kind_group_or_name(
    pattern: str, matched: int, weights: Any
) -> None:
    rule = Rule.parse("floor", f"{pattern}=4")
    assert sum(rule.matches(weight) for weight in weights) == matched


def test_floors_ceilings_and_pins_restrict_what_they_match_and_nothing_else(
    table: Sensitivity, weights: Any
) -> None:
    problem = constrained(
        table, weights, floors=["down_proj=5"], ceilings=["v_proj=4"], pins=["lm_head=w8g64"]
    )
    everything = candidates(build_problem(table, weights, fixed_bytes=0))
    for name, schemes in candidates(problem).items():
        if "down_proj" in name:
            assert schemes == {s for s in everything[name] if scheme_bits(s) >= 5}
        elif "v_proj" in name:
            assert schemes == {s for s in everything[name] if scheme_bits(s) <= 4}
        elif "embed" in name:
            assert schemes == {"w8g64"}
        else:
            assert schemes == everything[name]


def test_a_floor_and_a_ceiling_on_one_weight_both_hold(table: Sensitivity, weights: Any) -> None:
    problem = constrained(table, weights, floors=["*=3"], ceilings=["q_proj=4"])
    for name, schemes in candidates(problem).items():
        bits = {scheme_bits(scheme) for scheme in schemes}
        assert bits == ({3, 4} if "q_proj" in name else {3, 4, 5, 6, 7, 8})


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"floors": ["q_proj=6"], "ceilings": ["self_attn.*=4"]}, ["q_proj=6", "self_attn.*=4"]),
        ({"floors": ["*=6"], "pins": ["o_proj=w4g64"]}, ["--floor *=6", "--pin o_proj=w4g64"]),
        ({"ceilings": ["*=3"], "pins": ["o_proj=w4g64"]}, ["--ceiling *=3", "--pin o_proj=w4g64"]),
        ({"pins": ["o_proj=w4g64", "*=w4g32"]}, ["--pin o_proj=w4g64", "--pin *=w4g32"]),
        ({"pins": ["o_proj=nvfp4"]}, ["--pin o_proj=nvfp4", "w4g64"]),
        ({"floors": ["o_proj=9"]}, ["--floor o_proj=9", "w8g64"]),
    ],
)
def test_contradictions_name_both_rules_and_where(
    rules: dict[str, list[str]], named: list[str], table: Sensitivity, weights: Any
) -> None:
    with pytest.raises(UsageError) as error:
        constrained(table, weights, **rules)
    for name in named:
        assert name in str(error.value)
    assert "model.layers" in str(error.value)


def test_three_rules_that_only_together_allow_nothing_are_all_named(
    table: Sensitivity, weights: Any
) -> None:
    only = {
        w: {s: e for s, e in row.items() if s in ("w4g64", "w8g64")}
        for w, row in table.rows.items()
    }
    small = Sensitivity(table.model, table.tasks, only)
    with pytest.raises(UsageError, match=r"--floor \*=5.*--ceiling \*=6"):
        constrained(small, weights, floors=["*=5"], ceilings=["*=6"])


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("down_prj", "down_proj"),
        ("languagemodel", "language_model"),
        ("vision", "its components are embeddings, language_model"),
        ("re:down_proj", "down_proj"),
        ("lm-head", "lm_head"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(
    pattern: str, hint: str, table: Sensitivity, weights: Any
) -> None:
    with pytest.raises(UsageError, match="matches no weight") as error:
        constrained(table, weights, floors=[f"{pattern}=8"])
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("floor", "vision"),
        ("floor", "vision="),
        ("floor", "=8"),
        ("floor", "vision=eight"),
        ("floor", "vision=0"),
        ("floor", "vision=nan"),
        ("ceiling", "vision=33"),
        ("pin", "lm_head=w9g64"),
        ("pin", "lm_head=8"),
        ("pin", "re:[=w8g64"),
        ("roof", "vision=8"),
    ],
)
def test_malformed_rules_are_usage_errors_that_repeat_them(kind: str, text: str) -> None:
    with pytest.raises(UsageError) as error:
        Rule.parse(kind, text)
    assert kind in str(error.value)


@given(text=st.text(max_size=20))
def test_any_text_is_a_rule_or_a_usage_error(text: str) -> None:
    try:
        rule = Rule.parse("floor", text)
    except UsageError:
        return
    again = Rule.parse("floor", str(rule).removeprefix("--floor "))
    assert again == rule


def test_an_impossible_budget_says_which_rule_makes_it_so(table: Sensitivity, weights: Any) -> None:
    from quantlib.errors import SearchError
    from quantlib.search.solve import solve

    free = build_problem(table, weights, fixed_bytes=0)
    smallest = free.bytes(free.smallest())
    floored = constrained(table, weights, floors=["down_proj=8"], ceilings=["q_proj=4"])
    extra = floored.bytes(floored.smallest()) - smallest
    with pytest.raises(SearchError, match=f"--floor down_proj=8 adds {extra:,}") as error:
        solve(floored, smallest)
    assert "ceiling" not in str(error.value)
