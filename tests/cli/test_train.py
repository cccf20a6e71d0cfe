"""`quantlib train-search` from the command line: one run, and what is said of a bad one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .conftest import Run

QUICK = ("--steps", "5", "--seqlen", "16", "--windows", "4", "--space", "w4a4,w8a8")


def test_a_run_says_what_it_costs(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    arguments = (model, "-o", tmp_path / "out", "--cost", "5x5", "--data", text, *QUICK)
    found = run("train-search", *arguments, "--json").json
    assert found["unit"] == "bops"
    assert found["cost"] <= found["target"]
    assert Path(found["checkpoint"]).is_dir()
    assert set(found["schemes"].values()) <= {"w4a4", "w8a8", "w8g64"}
    answer = run("train-search", *arguments, "--overwrite")
    assert answer.code == 0, answer
    assert "BOPs allowed" in answer.stdout
    assert "quantlib eval" in answer.stdout + answer.stderr


def test_a_run_without_text_or_out_of_reach_is_a_sentence(
    fails: Callable[..., str], model: Path, text: Path, tmp_path: Path
) -> None:
    out = ("-o", tmp_path / "out")
    assert "--data TEXT" in fails(2, "train-search", model, *out, "--cost", "4x8")
    said = fails(1, "train-search", model, *out, "--cost", "1x1", "--data", text, *QUICK)
    assert "cannot be reached" in said
    assert "not a cost" in fails(
        2, "train-search", model, *out, "--cost", "quick", "--data", text, *QUICK
    )
