from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from quantlib.errors import SearchError, UsageError
from quantlib.search.build import build_problem
from quantlib.search.constraints import parse_rules
from quantlib.search.problem import Choice, Item, Problem, fuse
from quantlib.search.sensitivity import Entry, Sensitivity
from quantlib.search.solve import solve


def without(table: Sensitivity, dropped: Mapping[str, set[str]]) -> Sensitivity:
    """The table without some schemes of some weights."""
    rows = {
        weight: {s: e for s, e in row.items() if s not in dropped.get(weight, set())}
        for weight, row in table.rows.items()
    }
    return Sensitivity(table.model, table.tasks, rows)


def test_every_weight_is_an_item_of_its_own_and_keeps_the_order_of_the_model(
    problem: Problem, weights: Any
) -> None:
    names = tuple(weight.name for weight in weights)
    assert tuple(item.name for item in problem.items) == problem.weights == names
    assert list(problem.schemes(problem.smallest())) == list(names)


def test_members_of_a_fused_group_share_a_scheme_for_vllm_and_add_up(
    table: Sensitivity, weights: Any, groups: Any
) -> None:
    problem = build_problem(table, weights, fixed_bytes=0, engine="vllm", groups=groups)
    qkv = next(item for item in problem.items if item.name == "model.layers.0.attn_in")
    assert [member.rsplit(".", 2)[-2] for member in qkv.members] == ["q_proj", "k_proj", "v_proj"]
    for choice in qkv.choices:
        entries = [table.entry(member, choice.scheme) for member in qkv.members]
        assert choice.bytes == sum(entry.bytes for entry in entries)
        assert choice.loss == pytest.approx(sum(entry.loss["kl"] for entry in entries), rel=1e-12)
        assert choice.shares() == tuple((entry.bytes, entry.loss["kl"]) for entry in entries)
    schemes = problem.schemes(solve(problem, int(1.5 * problem.bytes(problem.smallest()))).picks)
    for weight in weights:
        mates = {schemes[other.name] for other in weights if other.group == weight.group}
        assert len(mates) == 1


def test_sharing_costs_something_and_only_fused_groups_pay_it(
    table: Sensitivity, weights: Any, groups: Any
) -> None:
    free = build_problem(table, weights, fixed_bytes=0)
    fused = build_problem(table, weights, fixed_bytes=0, engine="vllm", groups=groups)
    unfused = build_problem(table, weights, fixed_bytes=0, engine="vllm", groups=[])
    budget = int(1.5 * free.bytes(free.smallest()))
    assert len(fused.items) < len(free.items) == len(unfused.items)
    assert solve(free, budget).loss < solve(fused, budget).loss
    assert solve(free, budget).picks == solve(unfused, budget).picks


def test_a_fused_group_has_the_schemes_that_all_its_members_have(
    table: Sensitivity, weights: Any
) -> None:
    layer = "model.layers.0.self_attn"
    q, k, v = (f"{layer}.{name}_proj.weight" for name in "qkv")
    few = without(table, {q: {"w2g32"}, v: {"w3g64z"}})
    problem = build_problem(few, weights, fixed_bytes=0, engine="vllm")
    qkv = next(item for item in problem.items if q in item.members)
    schemes = {choice.scheme for choice in qkv.choices}
    assert schemes == set(table.rows[k]) - {"w2g32", "w3g64z"}
    disjoint = without(table, {q: set(list(table.rows[q])[::2]), k: set(list(table.rows[k])[1::2])})
    with pytest.raises(SearchError, match="no candidate in common"):
        build_problem(disjoint, weights, fixed_bytes=0, engine="vllm")


def test_a_rule_on_one_member_binds_the_whole_fused_group(table: Sensitivity, weights: Any) -> None:
    rules = parse_rules(pins=["layers.0.*.v_proj=w8g64"])
    problem = build_problem(table, weights, fixed_bytes=0, engine="vllm", rules=rules)
    schemes = problem.schemes(problem.smallest())
    pinned = [name for name, scheme in schemes.items() if scheme == "w8g64"]
    assert [name.split(".")[-2] for name in pinned] == ["q_proj", "k_proj", "v_proj"]
    clash = parse_rules(pins=["layers.0.*.v_proj=w8g64", "layers.0.*.q_proj=w4g64"])
    with pytest.raises(UsageError, match="contradict"):
        build_problem(table, weights, fixed_bytes=0, engine="vllm", rules=clash)


def test_the_table_and_the_model_must_have_the_same_weights(
    table: Sensitivity, weights: Any
) -> None:
    fewer = Sensitivity(table.model, table.tasks, dict(list(table.rows.items())[:-2]))
    with pytest.raises(SearchError, match=r"and 1 more.*was never measured"):
        build_problem(fewer, weights, fixed_bytes=0)
    with pytest.raises(SearchError, match="is not a weight of this model"):
        build_problem(table, weights[1:], fixed_bytes=0)


def test_unknown_engines_and_tasks_are_usage_errors(table: Sensitivity, weights: Any) -> None:
    with pytest.raises(UsageError, match="quantlib, vllm"):
        build_problem(table, weights, fixed_bytes=0, engine="tpu")
    with pytest.raises(UsageError, match="it has kl"):
        build_problem(table, weights, fixed_bytes=0, task="wer")


def test_another_task_is_another_objective(table: Sensitivity, weights: Any) -> None:
    rows = {
        weight: {
            scheme: Entry(e.bytes, {"kl": e.loss["kl"], "wer": 2.0}, {"kl": 0.0, "wer": 0.5})
            for scheme, e in row.items()
        }
        for weight, row in table.rows.items()
    }
    both = Sensitivity(table.model, ("kl", "wer"), rows)
    problem = build_problem(both, weights, fixed_bytes=0, task="wer")
    assert problem.task == "wer"
    assert problem.loss(problem.best()) == 2.0 * len(weights)
    assert problem.items[0].choices[0].error == 0.5


def test_further_costs_reach_the_solver(table: Sensitivity, weights: Any) -> None:
    times = {(w, s): e.bytes * 1e-6 for w, row in table.rows.items() for s, e in row.items()}
    problem = build_problem(table, weights, fixed_bytes=0, costs={"ms": times})
    smallest = problem.bytes(problem.smallest())
    solution = solve(problem, 10 * smallest, {"ms": 1.3e-6 * smallest})
    assert solution.bytes <= 1.3 * smallest * (1 + 1e-9)
    assert solution.loss < problem.loss(problem.smallest())


def test_picks_and_schemes_are_inverse(problem: Problem) -> None:
    for picks in (problem.smallest(), problem.best()):
        assert problem.picks(problem.schemes(picks)) == picks
    with pytest.raises(SearchError, match="cannot be fp8"):
        problem.picks(dict.fromkeys(problem.weights, "fp8"))


def test_malformed_items_are_refused() -> None:
    good = Choice("w4", 1, 0.1)
    with pytest.raises(SearchError, match="no candidate"):
        Item("a", ("a",), ())
    with pytest.raises(SearchError, match="finite"):
        Item("a", ("a",), (Choice("w4", 1, float("nan")),))
    with pytest.raises(SearchError, match="bytes must be >= 0"):
        Item("a", ("a",), (Choice("w4", -1, 0.0),))
    with pytest.raises(SearchError, match="costs must be finite"):
        Item("a", ("a",), (Choice("w4", 1, 0.0, {"ms": -1.0}),))
    with pytest.raises(SearchError, match="twice"):
        Item("a", ("a",), (good, good))
    with pytest.raises(SearchError, match=r"fuse\(\)"):
        Item("ab", ("a", "b"), (good,))
    a = Item("a", ("a",), (good,))
    assert fuse("aa", [a, Item("b", ("b",), (good,))]).choices[0].shares() == ((1, 0.1), (1, 0.1))
    with pytest.raises(SearchError, match="two items"):
        Problem((a, a))
    with pytest.raises(SearchError, match="negative"):
        Problem((a,), fixed_bytes=-1)
