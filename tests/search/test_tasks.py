"""Several tasks in one table: compared by their full-precision losses, and nothing lost on file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import SearchError, UsageError
from quantlib.models.rows import Weight
from quantlib.search.build import build_problem
from quantlib.search.calibrate import Calibration
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Entry, Sensitivity
from quantlib.search.solve import solve
from quantlib.search.tasks import COMBINED, Objective, increases, task_cost

BASELINE = {"text": 4.0, "image": 0.02}
PROBES = [(0.01, 0.02, 1e-4), (0.1, 0.2, 1e-3), (1.0, 2.0, 1e-2)]


@pytest.fixture
def several(table: Sensitivity) -> Sensitivity:
    """Text as the table has it; images suffer from attention alone."""
    rows = {
        name: {
            scheme: Entry(
                entry.bytes,
                {"text": entry.loss["kl"], "image": 1e-3 * entry.loss["kl"] * ("attn" in name)},
                {"text": entry.error["kl"], "image": 0.0},
            )
            for scheme, entry in row.items()
        }
        for name, row in table.rows.items()
    }
    return Sensitivity(table.model, ("text", "image"), rows, {}, {}, 0, BASELINE)


def build(table: Sensitivity, weights: list[Weight], objective: Objective | None = None) -> Problem:
    return build_problem(table, weights, fixed_bytes=0, objective=objective)


def test_the_loss_of_a_plan_is_the_weighted_sum_of_relative_increases(
    several: Sensitivity, weights: list[Weight]
) -> None:
    problem = build(several, weights, Objective({"image": 3.0}))
    assert problem.task == COMBINED
    picks = problem.smallest()
    losses = problem.task_losses(picks)
    for task in several.tasks:
        whole = math.fsum(
            several.entry(name, scheme).loss[task]
            for name, scheme in problem.schemes(picks).items()
        )
        assert losses[task] == pytest.approx(whole, rel=1e-12)
    expected = losses["text"] / 4.0 + 3 * losses["image"] / 0.02
    assert problem.loss(picks) == pytest.approx(expected, rel=1e-12)
    assert problem.value(picks) == problem.loss(picks)


def test_tasks_are_compared_by_what_they_lose_in_full_precision_and_not_by_their_unit(
    several: Sensitivity, weights: list[Weight]
) -> None:
    """The same losses in another unit, full-precision loss included, make the same plan."""
    scaled = replace(
        several,
        rows={
            name: {
                scheme: Entry(
                    e.bytes, {**e.loss, "image": 1e4 * e.loss["image"]}, {**e.error, "image": 0.0}
                )
                for scheme, e in row.items()
            }
            for name, row in several.rows.items()
        },
        baseline={**BASELINE, "image": 1e4 * BASELINE["image"]},
    )
    budget = int(1.5 * build(several, weights).bytes(build(several, weights).smallest()))
    for balance in ("sum", "minmax"):
        objective = Objective({}, balance)
        plans = [
            solve(build(table, weights, objective), budget).loss for table in (several, scaled)
        ]
        assert plans[0] == pytest.approx(plans[1], rel=2e-3)  # each within its gap of the optimum


def test_one_task_keeps_its_own_unit_whatever_its_weight(
    table: Sensitivity, weights: list[Weight]
) -> None:
    plain, weighed = build(table, weights), build(table, weights, Objective({"kl": 7.0}, "minmax"))
    assert weighed == plain
    assert plain.balanced == ()


def test_a_weight_of_zero_needs_no_full_precision_loss(
    several: Sensitivity, weights: list[Weight]
) -> None:
    alone = replace(several, baseline={"text": 4.0})
    with pytest.raises(SearchError, match="does not say what image loses in full precision"):
        build(alone, weights)
    problem = build(alone, weights, Objective({"image": 0.0}))
    assert problem.loss(problem.smallest()) == pytest.approx(
        problem.task_losses(problem.smallest())["text"] / 4.0
    )
    nothing = replace(several, baseline={"text": 4.0, "image": 0.0})
    with pytest.raises(SearchError, match="loses nothing in task image"):
        build(nothing, weights)


def test_a_negative_loss_of_one_of_several_tasks_is_refused(
    several: Sensitivity, weights: list[Weight]
) -> None:
    name = several.weights[0]
    odd = Entry(10, {"text": 0.1, "image": -0.1}, {"text": 0.0, "image": 0.0})
    with pytest.raises(SearchError, match="must not be negative"):
        build(replace(several, rows={**several.rows, name: {"w4g32": odd}}), weights)


def test_a_table_of_several_tasks_survives_its_file(several: Sensitivity, tmp_path: Path) -> None:
    probed = several.with_calibrations({"image": Calibration.fit(PROBES)})
    probed.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == probed
    assert json.loads((tmp_path / "s.json").read_text())["version"] == 2
    assert probed.digest() == several.digest()
    assert probed.calibration is None, "which of the two?"
    other = replace(several, baseline={**BASELINE, "text": 5.0})
    assert other.digest() != several.digest()


def test_a_table_of_one_task_is_written_as_it_always_was(table: Sensitivity) -> None:
    probed = table.with_calibration(Calibration.fit(PROBES))
    written = json.loads(probed.to_json())
    assert written["version"] == 1
    assert written["calibration"]["probes"][0] == {
        "predicted": 0.01,
        "measured": 0.02,
        "error": 1e-4,
    }
    assert set(written) == {
        "format",
        "version",
        "model",
        "tasks",
        "units",
        "provenance",
        "calibration",
        "weights",
    }
    assert Sensitivity.from_json(probed.to_json()) == probed


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"baseline": {"text": -1.0}}, "not a number >= 0"),
        ({"baseline": {"speech": 1.0}}, "no such loss column"),
        ({"baseline": {"text": "much"}}, "must be a number"),
        ({"calibrations": {"speech": {"probes": []}}}, "at least three"),
        ({"calibrations": [1]}, "must be an object"),
        ({"calibration": {"probes": []}}, "nothing reads 'calibration'"),
        ({"tasks": ["text", "tasks"]}, "cannot name a loss column|is missing"),
    ],
)
def test_a_damaged_table_of_several_tasks_is_a_sentence(
    several: Sensitivity, edit: dict[str, object], message: str
) -> None:
    text = json.dumps({**json.loads(several.to_json()), **edit})
    with pytest.raises(SearchError, match=message):
        Sensitivity.from_json(text)


def test_a_plan_remembers_how_tasks_were_weighed_and_is_priced_again(
    several: Sensitivity, weights: list[Weight], tmp_path: Path
) -> None:
    objective = Objective({"image": 2.0}, "minmax")
    problem = build(several, weights, objective)
    solution = solve(problem, int(1.4 * problem.bytes(problem.smallest())))
    calibrations = {"text": Calibration.fit(PROBES)}
    plan = Plan.from_solution(problem, solution, calibrations=calibrations, baseline=BASELINE)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.objective == objective
    assert again.priced(several) == plan, "nobody edited it"
    losses = problem.task_losses(solution.picks)
    found = increases(plan.predicted)
    assert found["image"] == pytest.approx(losses["image"] / BASELINE["image"])
    # calibrated where there are probes: these measured twice the sum
    assert found["text"] == pytest.approx(2 * losses["text"] / BASELINE["text"], rel=1e-2)
    assert plan.predicted["text_low"] <= plan.predicted["text"] <= plan.predicted["text_high"]
    with pytest.raises(SearchError, match="weighs several tasks"):
        again.priced(replace(several, tasks=("text",), calibrations={}, baseline={}))


def test_a_plan_of_one_task_is_written_as_it_always_was(
    table: Sensitivity, weights: list[Weight]
) -> None:
    problem = build(table, weights)
    plan = Plan.of(problem, problem.smallest())
    written = json.loads(plan.to_json())
    assert written["version"] == 1
    assert "objective" not in written
    assert not increases(plan.predicted)


@given(
    weights=st.dictionaries(
        st.text("abc", min_size=1, max_size=3), st.floats(0, 1e6), min_size=1, max_size=4
    ),
    balance=st.sampled_from(["sum", "minmax"]),
)
def test_an_objective_survives_the_command_line_and_its_file(
    weights: dict[str, float], balance: str
) -> None:
    objective = Objective(weights, balance)
    text = ",".join(f"{task}={weight!r}" for task, weight in weights.items())
    assert Objective.parse([text], balance) == objective
    assert Objective.from_json(objective.to_json(), "a plan") == objective


@pytest.mark.parametrize("text", ["text", "=1", "text=", "text=much", "text=nan", "text=1,", ""])
def test_malformed_weights_say_how_to_write_them(text: str) -> None:
    with pytest.raises(UsageError, match="write TASK=NUMBER"):
        Objective.parse([text])


def test_a_damaged_objective_names_its_file() -> None:
    with pytest.raises(SearchError, match=r"plan\.json"):
        Objective.from_json({"weights": {"text": 1.0}, "balance": "fair"}, "plan.json")


def test_costs_of_tasks_are_not_mistaken_for_limits(
    several: Sensitivity, weights: list[Weight]
) -> None:
    problem = build(several, weights)
    assert problem.cost(task_cost("text"), problem.smallest()) > 0
    assert solve(problem, None).costs == {}
