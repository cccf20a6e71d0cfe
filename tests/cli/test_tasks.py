"""Several tasks and byte budgets of components on the command line.

The tiny model has text alone, so its table is given a second task here: one that only embeddings
matter to.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quantlib.models import families
from quantlib.search.calibrate import Calibration
from quantlib.search.sensitivity import Entry, Sensitivity

from .conftest import Run


@pytest.fixture
def two_tasks(measured: Path) -> Path:
    """A work directory whose table knows text and images."""
    file = measured / "sensitivity.json"
    table = Sensitivity.load(file)
    rows = {
        name: {
            scheme: Entry(
                entry.bytes,
                {"text": entry.loss["kl"], "image": entry.loss["kl"] * ("embed" in name)},
                {"text": entry.error["kl"], "image": 0.0},
            )
            for scheme, entry in row.items()
        }
        for name, row in table.rows.items()
    }
    probes = Calibration.fit([(0.01, 0.02, 1e-4), (0.1, 0.2, 1e-3), (1.0, 2.0, 1e-2)])
    several = replace(
        table, tasks=("text", "image"), rows=rows, baseline={"text": 4.0, "image": 0.5}
    )
    several.with_calibrations({"text": probes}).save(file)
    return measured


def search(run: Run, work: Path, *options: object) -> dict[str, float]:
    """Relative increases of the plan."""
    answer = run("search", "--work", work, "--bits", 5, "--json", *options)
    assert answer.code == 0, answer
    increases: dict[str, float] = answer.json["increases"]
    return increases


def test_weights_move_bytes_from_one_task_to_another(run: Run, two_tasks: Path) -> None:
    plain = search(run, two_tasks)
    images = search(run, two_tasks, "--task-weights", "image=100")
    text = search(run, two_tasks, "--task-weights", "text=1,image=0")
    assert images["image"] <= plain["image"] <= text["image"]
    assert text["text"] <= plain["text"] <= images["text"]
    assert text["text"] < images["text"]


def test_minmax_makes_the_worst_task_better(run: Run, two_tasks: Path) -> None:
    plain, balanced = search(run, two_tasks), search(run, two_tasks, "--balance", "minmax")
    assert max(balanced.values()) <= max(plain.values())
    plan = json.loads((two_tasks / "plan.json").read_text())
    assert plan["objective"] == {"weights": {}, "balance": "minmax"}
    assert plan["task"] == "tasks"


def test_what_is_predicted_of_each_task_is_shown(run: Run, two_tasks: Path) -> None:
    command = ("search", "--work", two_tasks, "--bits", 5, "--balance", "minmax", "--pareto")
    shown = run(*command).stdout
    assert "least largest of increases over full precision" in shown
    assert "largest increase" in shown
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert "95 % between" in lines["text"]
    assert "no probes calibrate it" in lines["image"]


def test_a_component_keeps_to_its_bytes_and_a_plan_remembers_them(
    run: Run, two_tasks: Path, tmp_path: Path
) -> None:
    free = ("search", "--work", two_tasks, "--bits", 5, "--task-weights", "image=100", "--json")
    limited = (*free, "--component-size", "embeddings=17%")
    assert run(*free).json["schemes"]["model.embed_tokens.weight"] == "w8g32"
    found = run(*limited).json
    assert found["schemes"]["model.embed_tokens.weight"] == "w4g32"
    (limit,) = found["limits"].values()
    assert found["predicted"]["bytes:embeddings"] <= limit
    shown = run(*(option for option in limited if option != "--json")).stdout
    assert "bytes of embeddings" in shown
    assert "image counts 100" in shown
    out = tmp_path / "out"
    assert run("apply", two_tasks / "plan.json", "-o", out).code == 0
    kept = json.loads((out / "quantlib_plan.json").read_text())
    assert kept["limits"] == {"bytes:embeddings": limit}
    assert kept["objective"]["weights"] == {"image": 100.0}


def test_a_component_alone_can_be_the_budget(run: Run, measured: Path) -> None:
    answer = run("search", "--work", measured, "--component-size", "lang*=20%", "--json")
    found = answer.json
    assert found["budget_bytes"] is None
    assert found["schemes"]["model.embed_tokens.weight"] == "w8g32", "nothing limits it"
    assert found["predicted"]["bytes:lang*"] <= found["limits"]["bytes:lang*"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--component-size", "vision=2MB"), "its components are embeddings, language_model"),
        (("--component-size", "embeddings"), "write COMPONENT=SIZE"),
        (("--component-size", "embeddings=lots"), "is not a size"),
        (("--component-size", "embeddings=1kB", "--component-size", "embeddings=2kB"), "two budg"),
        (("--task-weights", "images=2"), "did you mean 'image'?"),
        (("--task-weights", "text"), "write TASK=NUMBER"),
        (("--task-weights", "text=-1"), "give 0 or more"),
        (("--task-weights", "text=0,image=0"), "nothing left to minimise"),
        (("--task-weights", "text=1,text=2"), "two weights"),
        (("--balance", "fair"), "use sum"),
    ],
)
def test_mistakes_are_sentences(
    fails: Callable[..., str], two_tasks: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in fails(2, "search", "--work", two_tasks, "--bits", 5, *options)


@pytest.mark.parametrize("command", ["compress", "search"])
def test_help_names_components_that_models_have(run: Run, command: str) -> None:
    """In the examples and in the options' own words."""
    words = " ".join(run(command, "--help").stdout.replace("│", " ").split())
    named = set(re.findall(r"([a-z_]+)=(?:\d+MB|\d+%)", words))
    known = {v for name, v in vars(families).items() if name.isupper() and isinstance(v, str)}
    assert named >= {"vision_tower", "image_decoder"}
    assert named <= known


def test_a_component_budget_that_is_too_small_says_what_is_possible(
    fails: Callable[..., str], measured: Path
) -> None:
    command = ("search", "--work", measured, "--bits", 5, "--component-size", "embeddings=10B")
    said = fails(1, *command)
    assert "10 bytes for embeddings is impossible: the least possible is" in said
    assert "embed_tokens" in said


def test_a_wrong_component_is_found_before_anything_is_measured(
    fails: Callable[..., str], model: Path, text: Path, tmp_path: Path
) -> None:
    command = ("compress", model, "-o", tmp_path / "out", "--data", text, "--bits", 5)
    assert "its components are" in fails(2, *command, "--component-size", "vision=2MB")
    assert not list(tmp_path.iterdir())
