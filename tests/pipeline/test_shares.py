"""Shares of tokens and of weight are those of the Hessian that a matrix is rounded under."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlib.errors import CheckpointError
from quantlib.pipeline.parts import Summary
from quantlib.pipeline.shares import (
    SHARES_FILE,
    Share,
    Shares,
    component_shares,
    load_shares,
    save_shares,
    told,
)

OWNERS = {"a": "language_model", "b": "language_model", "tower": "vision_tower", "idle": "vq"}
TEXT = Summary(
    "text",
    terms=10,
    samples=1,
    groups={"a": [[10, 1.0]], "b": [[10, 1.0]], "tower": [[0, 0.0]], "idle": [[0, 0.0]]},
    embeddings={},
    ran=["a", "b"],
    modalities={"a": {"text": 1.0, "image": 0.0}, "b": {"text": 1.0, "image": 0.0}},
    modality_tokens={"text": 10, "image": 0},
    energies={"a": 4.0, "b": 1.0, "tower": 0.0, "idle": 0.0},
)
ANSWER = Summary(
    "answer",
    terms=5,
    samples=1,
    groups={"a": [[90, 1.0]], "b": [[90, 1.0]], "tower": [[256, 1.0]], "idle": [[0, 0.0]]},
    embeddings={},
    ran=["a", "b", "tower"],
    modalities={"a": {"text": 0.75, "image": 0.25}, "b": {"text": 0.5, "image": 0.5}},
    modality_tokens={"text": 26, "image": 64},
    energies={"a": 2.0, "b": 0.5, "tower": 7.0, "idle": 0.0},
)
WEIGHTS = {"text": 1.0, "answer": 2.0}


def test_streams_count_by_their_energies_and_modalities_within_them() -> None:
    """4 : 2 x 2 of `a`, 1 : 2 x 0.5 of `b`: half and half, though answers have nine tokens of
    ten. Of an answer's half, images are a quarter in `a` and half in `b`."""
    found = component_shares(OWNERS, [TEXT, ANSWER], WEIGHTS)
    language = found["language_model"]
    assert language.streams == {"text": Share(0.1, 0.5), "answer": Share(0.9, 0.5)}
    assert language.modalities["image"].tokens == pytest.approx(0.64)
    assert language.modalities["image"].weight == pytest.approx((0.125 + 0.25) / 2)
    for what in ("tokens", "weight"):
        assert sum(getattr(s, what) for s in language.modalities.values()) == pytest.approx(1)


def test_a_part_that_one_stream_runs_is_that_stream_s() -> None:
    found = component_shares(OWNERS, [TEXT, ANSWER], WEIGHTS)
    assert found["vision_tower"] == Shares({"answer": Share(1.0, 1.0)}, {})
    assert "vq" not in found, "no loss depends on it"


def test_a_stream_that_counts_twice_has_two_thirds() -> None:
    twice = component_shares(OWNERS, [TEXT, ANSWER], {"text": 1.0, "answer": 4.0})
    assert twice["language_model"].streams["answer"].weight == pytest.approx(2 / 3)
    assert twice["language_model"].streams["answer"].tokens == pytest.approx(0.9)


def test_of_summaries_without_energies_nothing_is_said() -> None:
    """Sums of token weights are no substitute: streams do not count by them."""
    fields = {name: value for name, value in vars(TEXT).items() if name != "energies"}
    assert component_shares(OWNERS, [Summary(**fields), ANSWER], WEIGHTS) == {}


def test_lines_say_both_shares_where_there_are_several() -> None:
    found = component_shares(OWNERS, [TEXT, ANSWER], WEIGHTS)
    line = told("language_model", found["language_model"])
    assert line.startswith("language_model is rounded for text 50 % (of the tokens 10 %)")
    assert "image 19 % (of the tokens 64 %)" in line
    assert told("vision_tower", found["vision_tower"]) == ""


def test_the_file_brings_them_back(tmp_path: Path) -> None:
    assert load_shares(tmp_path) == {}
    found = component_shares(OWNERS, [TEXT, ANSWER], WEIGHTS)
    save_shares(tmp_path, found)
    assert load_shares(tmp_path) == found


@pytest.mark.parametrize("text", ["[]", '{"a": 3}', '{"a": {"streams": {}}}'])
def test_a_damaged_file_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / SHARES_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="run quantlib measure again"):
        load_shares(tmp_path)
