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
    )
    monkeypatch.setitem(SUBJECTS, "tiny", tiny)
    monkeypatch.setattr(trained_models.artifacts, "folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    return tiny


def written(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a result file, by method."""
    rows = json.loads(record.path_of(name).read_text())["rows"]
    return {row["method"]: row for row in rows}


def test_rows_are_of_one_cost_and_training_brings_a_model_nearer(subject: Subject) -> None:
    trained_models.main("tiny", None, False)
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
    trained_models.main("tiny", ["rounded"], False)
    first = written("search_trained_tiny")["rounded"]
    monkeypatch.setattr(trained_models.artifacts, "folder", lambda: tmp_path / "another")
    monkeypatch.setattr(trained_models, "_measure", lambda *_: pytest.fail("made again"))
    assert measured(subject, "rounded") == first
    other = dataclasses.replace(subject, uniform="w4g32a8")
    assert other.key("rounded") != subject.key("rounded")


def test_a_quick_run_has_a_file_of_its_own(subject: Subject) -> None:
    trained_models.main("tiny", ["rounded"], True)
    assert set(written("search_trained_tiny_quick")) == {"rounded"}
    assert not record.path_of("search_trained_tiny").exists()


def test_a_subject_or_method_that_is_none_is_refused(subject: Subject) -> None:
    for asked in (("gpt", None), ("tiny", ["best"])):
        with pytest.raises(typer.Exit):
            trained_models.main(*asked, False)


@pytest.mark.parametrize("name", ["smollm2", "unified"])
def test_the_uniform_format_can_be_searched_for(name: str) -> None:
    one = SUBJECTS[name]
    assert one.uniform in {candidate.name for candidate in space_of(one.space)}
    assert one.quickly().key("fliqs") != one.key("fliqs")
