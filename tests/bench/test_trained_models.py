"""Larger models trained on in low precision: rows of one cost, made once, judged by their task."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from quantlib.bench import record, trained_models
from quantlib.bench.trained_models import METHODS, SUBJECTS, Prepared, Subject, measured
from quantlib.bench.trained_seeds import compared, table
from quantlib.pipeline.train_search import distillation
from quantlib.search.trained.loop import Training
from quantlib.search.trained.numbers import space_of


def prepared(teacher: Any, quick: bool) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (8, 12), generator=generator)
    task = distillation(teacher, ids, 2)

    def judge(model: Any) -> dict[str, Any]:
        with torch.no_grad():
            outcome = task(model, 0, torch.Generator().manual_seed(1))
        return {"kl": float(outcome.loss)}

    return task, lambda model: model(input_ids=ids[:1]), judge


@pytest.fixture
def subject(
    tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Subject:
    """A random Llama; cache and result file lie in folders of the test."""
    model = tiny_llama(tmp_path / "model")
    tiny = Subject(
        name="tiny",
        model=lambda: model,
        space="w2g32a8,w3g32a8,w4g32a8,w8g32a8",
        uniform="w3g32a8",
        training=Training(steps=16, rate=3e-4, warmup=2),
        prepare=prepared,
        figures=("kl",),
    )
    monkeypatch.setitem(SUBJECTS, "tiny", tiny)
    monkeypatch.setattr(trained_models.artifacts, "folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    return tiny


def document(name: str) -> dict[str, Any]:
    """A result file."""
    return dict(json.loads(record.path_of(name).read_text()))


def written(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a result file, by method."""
    return {row["method"]: row for row in document(name)["rows"]}


def test_rows_are_of_one_cost_and_training_brings_a_model_nearer(subject: Subject) -> None:
    trained_models.main("tiny")
    rows = written("search_trained_tiny")
    assert tuple(rows) == METHODS
    assert rows["rounded"]["schemes"] == rows["uniform"]["schemes"]
    assert set(rows["uniform"]["schemes"].values()) == {"w3g32a8"}
    assert rows["uniform"]["bits_product"] == pytest.approx(3 * 8)
    assert 0.9 * 24 <= rows["fliqs"]["bits_product"] <= 24 * (1 + 1e-9)
    assert rows["uniform"]["kl"] < rows["rounded"]["kl"]


def test_a_row_is_made_once_and_a_result_file_is_enough(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained_models.main("tiny", ["rounded"])
    first = written("search_trained_tiny")["rounded"]
    monkeypatch.setattr(trained_models.artifacts, "folder", lambda: tmp_path / "another")
    monkeypatch.setattr(trained_models, "_measure", lambda *_: pytest.fail("made again"))
    assert measured(subject, "rounded") == first
    other = dataclasses.replace(subject, uniform="w4g32a8")
    assert other.key("rounded") != subject.key("rounded")


def test_seeds_draw_other_batches_and_rounding_draws_nothing(subject: Subject) -> None:
    trained_models.main("tiny", ["rounded", "uniform"], seeds=2, first=1)
    places = [(row["method"], row["seed"]) for row in document("search_trained_tiny")["rows"]]
    assert places == [("rounded", 0), ("uniform", 1), ("uniform", 2)]
    first, second = (measured(subject.seeded(seed), "uniform") for seed in (1, 2))
    assert first["kl"] != second["kl"]
    assert first["key"] != second["key"]


def test_names_of_seed_0_stay_and_those_of_other_seeds_differ(subject: Subject) -> None:
    other = subject.seeded(1)
    assert subject.place("fliqs") == "tiny-fliqs"
    assert other.place("fliqs") == "tiny-fliqs-1"
    state = trained_models._state_file(subject, "fliqs").name
    assert state == f"tiny-fliqs-{subject.key('fliqs')[:8]}.safetensors"
    assert other.quickly().place("fliqs") == "tiny_quick-fliqs-1"


def test_another_seed_on_another_machine_keeps_the_rows_of_the_file(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = iter(range(9))
    monkeypatch.setattr(
        trained_models,
        "_measure",
        lambda one, method: {"bits_product": 24.0, "kl": 1.0 + next(shown) + one.seed**2},
    )
    trained_models.main("tiny", ["rounded", "uniform"])
    path = record.path_of("search_trained_tiny")
    kept = json.loads(path.read_text())
    for row in kept["rows"]:
        del row["seed"]  # as rows were written once
    older = {**kept["rows"][1], "method": "fliqs", "key": "of other settings", "kl": 99.0}
    path.write_text(json.dumps({"rows": [*kept["rows"], older]}))
    monkeypatch.setattr(trained_models.artifacts, "folder", lambda: tmp_path / "another")

    trained_models.main("tiny", ["uniform"], seeds=2)
    made = document("search_trained_tiny")
    told = [(row["method"], row["seed"], row["kl"]) for row in made["rows"]]
    assert told == [
        ("rounded", 0, 1.0),
        ("uniform", 0, 2.0),
        ("uniform", 1, 4.0),  # the third that was made, 3, and its seed
        ("fliqs", 0, 99.0),
    ]
    by_method = {entry["method"]: entry for entry in made["comparison"]}
    assert set(by_method) == {"rounded", "uniform"}  # other settings are not compared
    assert by_method["uniform"]["over_rounded"]["kl"]["values"] == [1.0, 3.0]


def told(method: str, seed: int, by_window: list[float], windows: str = "same") -> dict[str, Any]:
    """A row as SmolLM2's are."""
    mean = sum(by_window) / len(by_window)
    return {
        "method": method,
        "seed": seed,
        "bits_product": 32.0,
        "seconds": 10.0 * seed or None,
        "kl": {"value": mean, "standard_error": 0.5},
        "per_window": {"kl": by_window},
        "windows_sha256": windows,
    }


def test_methods_are_compared_seed_by_seed_and_window_by_window() -> None:
    rows = [
        told("rounded", 0, [5.0, 7.0]),
        *(told("uniform", seed, [value, value + 2]) for seed, value in enumerate((1.0, 2.0, 6.0))),
        *(told("fliqs", seed, [value, value + 4]) for seed, value in ((2, 7.0), (1, 2.0))),
    ]
    rounded, uniform, fliqs = compared(rows, ["kl", "accuracy"])
    alone = rounded["figures"]["kl"]
    assert (alone["mean"], alone["half_width"]) == (6.0, None)
    kl = uniform["figures"]["kl"]
    assert (kl["seeds"], kl["values"]) == ([0, 1, 2], [2.0, 3.0, 7.0])
    assert kl["standard_errors"] == [0.5] * 3
    # Student's t for two degrees of freedom is 4.3027, the deviation sqrt(7)
    assert kl["half_width"] == pytest.approx(4.302653 * (7 / 3) ** 0.5, rel=1e-6)
    assert uniform["seconds"] == 15.0  # seed 0's was resumed
    assert uniform["over_rounded"]["kl"]["values"] == [-4.0, -3.0, 1.0]
    over = fliqs["over_uniform"]["kl"]
    assert (over["seeds"], over["values"], over["mean"]) == ([2, 1], [2.0, 1.0], 1.5)
    # windows differ by [1, 3] and [0, 2]: a deviation of sqrt(2) over two windows
    assert over["standard_errors"] == pytest.approx([1.0, 1.0])
    assert over["half_width"] == pytest.approx(12.706205 * 0.5, rel=1e-6)
    assert "accuracy" not in uniform["figures"]


def test_errors_of_differences_are_of_windows_that_both_have() -> None:
    rows = [told("rounded", 0, [5.0, 7.0], "others"), told("uniform", 0, [1.0, 2.0])]
    assert compared(rows, ["kl"])[1]["over_rounded"]["kl"]["standard_errors"] == [None]


def test_a_method_without_the_seeds_of_another_is_not_compared_with_it() -> None:
    rows = [told("uniform", 0, [1.0, 2.0]), told("fliqs", 1, [1.0, 2.0])]
    assert compared(rows, ["kl"])[1]["over_uniform"] == {}


def test_the_table_says_differences_with_signs_and_both_errors() -> None:
    pairs = [told("uniform", 0, [1.0, 3.0]), told("uniform", 1, [1.0, 3.0])]
    pairs += [told("fliqs", 0, [2.0, 4.0]), told("fliqs", 1, [2.0, 4.0])]
    lines = table(compared(pairs, ["kl"])).splitlines()
    assert lines[0] == "| | kl |"
    assert lines[2] == "| uniform | 2.0000 ± 0.0000 (0.5000) |"
    assert lines[4] == "| fliqs - uniform | +1.0000 ± 0.0000 (0.0000) |"


@pytest.mark.parametrize("name", ["smollm2", "unified"])
@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_the_committed_rows_count(
    name: str, quick: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trained_models.artifacts, "folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(trained_models, "_measure", lambda *_: pytest.fail("made again"))
    one = SUBJECTS[name].quickly() if quick else SUBJECTS[name]
    committed = document(one.result)["rows"]
    kept = [measured(one.seeded(row.get("seed", 0)), row["method"]) for row in committed]
    assert [row["key"] for row in kept] == [row["key"] for row in committed]
    assert all(entry["figures"] for entry in compared(kept, one.figures))


def test_a_quick_run_has_a_file_of_its_own(subject: Subject) -> None:
    trained_models.main("tiny", ["rounded"], quick=True)
    assert set(written("search_trained_tiny_quick")) == {"rounded"}
    assert not record.path_of("search_trained_tiny").exists()


def test_a_subject_or_method_that_is_none_is_refused(subject: Subject) -> None:
    for asked in (("gpt", None), ("tiny", ["best"])):
        with pytest.raises(typer.Exit):
            trained_models.main(*asked)


@pytest.mark.parametrize("name", ["smollm2", "unified"])
def test_the_uniform_format_can_be_searched_for(name: str) -> None:
    one = SUBJECTS[name]
    assert one.uniform in {candidate.name for candidate in space_of(one.space)}
    assert one.quickly().key("fliqs") != one.key("fliqs")
