from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import SearchError
from quantlib.search.build import build_problem
from quantlib.search.calibrate import Calibration
from quantlib.search.plan import Assignment, Plan, diff
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Entry, Sensitivity
from quantlib.search.solve import Solution, solve


@pytest.fixture
def solution(problem: Problem) -> Solution:
    return solve(problem, int(1.6 * problem.bytes(problem.smallest())))


@pytest.fixture
def plan(problem: Problem, solution: Solution) -> Plan:
    return Plan.from_solution(problem, solution, provenance={"bank": "b" * 64})


finite = st.floats(allow_nan=False, allow_infinity=False)
assignments = st.builds(
    Assignment,
    st.sampled_from(["w4g64", "w3g32z", "mxfp4", "bf16"]),
    st.integers(0, 10**12),
    finite,
)


@given(
    weights=st.dictionaries(st.text(max_size=9), assignments, min_size=1, max_size=4),
    budget=st.none() | st.integers(0, 10**12),
    limits=st.dictionaries(st.text(max_size=4), finite, max_size=2),
    engine=st.sampled_from(["quantlib", "vllm"]),
)
def test_a_plan_survives_its_file_to_the_last_bit(
    weights: Any, budget: Any, limits: Any, engine: str
) -> None:
    # the sum of losses in the file must be finite, too
    weights = {name: row._replace(loss=row.loss / 8) for name, row in weights.items()}
    plan = Plan(
        "model", weights, engine, 7, budget, limits, "kl", ("--floor a=8",), {"kl": 0.1}, {"a": "b"}
    )
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert list(again.weights) == list(plan.weights)


def test_a_plan_says_what_the_solver_found(
    problem: Problem, solution: Solution, plan: Plan
) -> None:
    assert plan.schemes == problem.schemes(solution.picks)
    assert plan.bytes == solution.bytes <= solution.budget == plan.budget
    assert plan.loss == pytest.approx(solution.loss, rel=1e-12)
    assert plan.predicted == {"lp_gap": solution.gap, "proven_gap": solution.proven_gap}
    assert plan.provenance == {"sensitivity": problem.sensitivity, "bank": "b" * 64}
    assert (plan.model, plan.engine, plan.task) == (problem.model, "quantlib", "kl")


def test_a_calibrated_plan_predicts_kl_with_an_interval(
    problem: Problem, solution: Solution
) -> None:
    calibration = Calibration.fit([(s, 1.2 * s, 0.01 * s) for s in (0.1, 0.3, 0.9)])
    predicted = Plan.from_solution(problem, solution, calibrations={"kl": calibration}).predicted
    assert predicted["kl_low"] < predicted["kl"] < predicted["kl_high"]
    assert predicted["kl"] == calibration.predict(solution.loss).value


def test_the_file_has_one_line_for_each_weight_in_model_order(plan: Plan, weights: Any) -> None:
    lines = [line for line in plan.to_json().splitlines() if '"scheme"' in line]
    assert len(lines) == len(weights)
    for line, weight in zip(lines, weights, strict=True):
        assert f'"{weight.name}": {{"scheme": "{plan.weights[weight.name].scheme}"' in line


def test_a_fused_plan_lists_weights_in_model_order_with_their_own_costs(
    table: Sensitivity, weights: Any
) -> None:
    # alphabetical order, as in a safetensors header: o comes between k and q, gate after down
    shuffled = sorted(weights, key=lambda weight: weight.name)
    problem = build_problem(table, shuffled, fixed_bytes=0, engine="vllm")
    plan = Plan.from_solution(problem, solve(problem, 2 * problem.bytes(problem.smallest())))
    assert list(plan.weights) == [weight.name for weight in shuffled]
    for name, row in plan.weights.items():
        entry = table.entry(name, row.scheme)
        assert (row.bytes, row.loss) == (entry.bytes, entry.loss["kl"])
    assert plan.bytes == problem.bytes(problem.picks(plan.schemes))


def test_an_edited_plan_is_priced_again_and_loses_the_promises_of_the_search(
    plan: Plan, table: Sensitivity, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    name = next(weight for weight, row in plan.weights.items() if row.scheme != "w8g32")
    before = f'"{name}": {{"scheme": "{plan.weights[name].scheme}"'
    path.write_text(path.read_text().replace(before, f'"{name}": {{"scheme": "w8g32"'))
    edited = Plan.load(path)
    assert edited.bytes == plan.bytes  # stale until priced
    priced = edited.priced(table)
    entry = table.entry(name, "w8g32")
    assert priced.weights[name] == Assignment("w8g32", entry.bytes, entry.loss["kl"])
    assert priced.bytes == plan.bytes - plan.weights[name].bytes + entry.bytes
    assert priced.predicted == {}
    assert plan.priced(table).predicted == plan.predicted


def test_pricing_needs_the_right_table_and_measured_schemes(plan: Plan, table: Sensitivity) -> None:
    with pytest.raises(SearchError, match="the plan needs model ffff"):
        plan.priced(replace(table, model="e" * 64))
    rows = {
        w: {s: Entry(e.bytes, {"wer": 1.0}, {"wer": 0.0}) for s, e in row.items()}
        for w, row in table.rows.items()
    }
    with pytest.raises(SearchError, match="with kl"):
        plan.priced(Sensitivity(table.model, ("wer",), rows))
    name = next(iter(plan.weights))
    odd = replace(plan, weights={**plan.weights, name: Assignment("nvfp4", 1, 0.0)})
    with pytest.raises(SearchError, match="was not measured in nvfp4"):
        odd.priced(table)


def test_a_plan_for_another_model_is_refused(plan: Plan, weights: Any, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json", plan.model, weights) == plan
    with pytest.raises(SearchError, match="for another model") as error:
        Plan.load(tmp_path / "plan.json", "0" * 64)
    assert "plan.json" in str(error.value)


def test_unknown_and_missing_weights_are_named(plan: Plan, weights: Any) -> None:
    names = list(plan.weights)
    misspelled = {
        name.replace("layers.0.mlp.down", "layers.0.mlp.dwn"): row
        for name, row in plan.weights.items()
    }
    with pytest.raises(SearchError, match=r"did you mean 'model.layers.0.mlp.down_proj.weight'"):
        replace(plan, weights=misspelled).check(plan.model, weights)
    fewer = {name: plan.weights[name] for name in names[:-3]}
    with pytest.raises(SearchError, match=rf"no scheme for '{names[-3]}' \(and 2 more\)"):
        replace(plan, weights=fewer).check(plan.model, weights)


def test_an_edit_that_splits_a_fused_group_is_refused_for_engines_that_fuse(
    table: Sensitivity, weights: Any, groups: Any
) -> None:
    problem = build_problem(table, weights, fixed_bytes=0, engine="vllm", groups=groups)
    plan = Plan.of(problem, problem.best())
    plan.check(plan.model, weights, groups)
    name = "model.layers.1.self_attn.k_proj.weight"
    split = replace(plan, weights={**plan.weights, name: Assignment("w2g32", 1, 0.0)})
    with pytest.raises(SearchError, match=r"vllm fuses .*q_proj\.weight and .*k_proj\.weight"):
        split.check(plan.model, weights, groups)
    replace(split, engine="quantlib").check(plan.model, weights, groups)


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return apply


def row(data: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = next(iter(data["weights"].values()))
    return first


CORRUPTIONS: dict[str, tuple[Callable[[str], str], str]] = {
    "cut short": (lambda text: text[:-20], "not valid JSON"),
    "another format": (edit(lambda d: d.update(format="x")), "is not a quantlib-plan file"),
    "an old version": (edit(lambda d: d.update(version=0)), "version 0"),
    "no engine": (edit(lambda d: d.pop("engine")), "'engine' is missing"),
    "unknown engine": (edit(lambda d: d.update(engine="tpu")), "unknown engine 'tpu'"),
    "misspelled key": (edit(lambda d: d.update(buget=1)), "nothing reads 'buget'"),
    "no weights": (edit(lambda d: d.update(weights={})), "no scheme to any weight"),
    "unknown scheme": (edit(lambda d: row(d).update(scheme="w1")), "'w1' is not a scheme"),
    "scheme missing": (edit(lambda d: row(d).pop("scheme")), "'scheme' is missing"),
    "scheme a number": (edit(lambda d: row(d).update(scheme=4)), "must be a text"),
    "bytes negative": (edit(lambda d: row(d).update(bytes=-4)), "cannot be negative"),
    "loss infinite": (edit(lambda d: row(d).update(loss=float("inf"))), "Infinity"),
    "weight a text": (edit(lambda d: d["weights"].update(x="w4g64")), "must be an object"),
    "budget a text": (edit(lambda d: d.update(budget="90MB")), "'budget' must be a whole number"),
    "budget negative": (edit(lambda d: d.update(budget=-1)), "'budget' cannot be negative"),
    "rules of numbers": (edit(lambda d: d.update(rules=[1])), "'rules' must be a list of texts"),
    "limits of texts": (edit(lambda d: d.update(limits={"ms": "9"})), "must be a number"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupt_plan_is_a_sentence_that_names_the_file(
    name: str, plan: Plan, tmp_path: Path
) -> None:
    corrupt, message = CORRUPTIONS[name]
    path = tmp_path / "plan.json"
    path.write_text(corrupt(plan.to_json()))
    with pytest.raises(SearchError, match=message) as error:
        Plan.load(path)
    assert str(path) in str(error.value)


def test_a_scheme_in_another_spelling_is_understood(plan: Plan) -> None:
    name = next(iter(plan.weights))
    scheme = plan.weights[name].scheme
    text = plan.to_json().replace(
        f'"{name}": {{"scheme": "{scheme}"', f'"{name}": {{"scheme": "{scheme}a16"'
    )
    assert Plan.from_json(text) == plan


def test_a_difference_lists_what_changed_and_what_it_costs(problem: Problem, plan: Plan) -> None:
    bigger = Plan.of(problem, solve(problem, int(1.2 * plan.bytes)).picks)
    changes = diff(plan, bigger)
    assert diff(plan, plan) == []
    assert [c.weight for c in changes] == [
        w for w in plan.weights if plan.schemes[w] != bigger.schemes[w]
    ]
    assert sum(c.bytes for c in changes) == bigger.bytes - plan.bytes
    assert sum(c.loss for c in changes) == pytest.approx(bigger.loss - plan.loss, rel=1e-9)
    first = next(iter(plan.weights))
    without = replace(plan, weights={w: r for w, r in plan.weights.items() if w != first})
    assert [(c.before, c.after) for c in diff(plan, without)] == [(plan.schemes[first], None)]
    assert [(c.before, c.after) for c in diff(without, plan)] == [(None, plan.schemes[first])]
