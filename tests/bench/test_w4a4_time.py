"""`bench.w4a4_time`: the whole is the sum of the commands, and only a fresh run is recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from quantlib.bench import record, w4a4_time
from quantlib.cli.app import app

STAGES = {"measure": {"seconds": {"calibrate": 3.04, "measure": 2.0}}, "search": {"seconds": 0.1}}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run, by a stand-in that takes a minute of its own clock for each."""
    seen: list[list[str]] = []
    clock = iter(range(0, 6000, 60))

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        assert env["OMP_NUM_THREADS"] == "2"
        words = command[4:]
        seen.append(words)
        return subprocess.CompletedProcess(command, 0, json.dumps(STAGES.get(words[0], {})), "")

    monkeypatch.setattr(w4a4_time, "subprocess", SimpleNamespace(run=run))
    ticks = SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr(w4a4_time, "time", ticks)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    return seen


def start(monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    arguments = ["--model", "m", "--data", "text.txt", "--work", str(work), "--threads", "2"]
    monkeypatch.setattr(sys, "argv", ["w4a4_time", *arguments])
    w4a4_time.main()


def test_the_commands_share_a_work_folder_and_their_minutes_add_up(
    asked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(monkeypatch, tmp_path / "work")
    assert [words[0] for words in asked] == ["measure", "search", "apply"]
    assert all(str(tmp_path / "work") in " ".join(words) for words in asked)
    found = json.loads((tmp_path / "results" / "w4a4_time.json").read_text())
    assert found["seconds"] == 180.0
    assert found["holds"] is True
    assert found["commands"]["measure"]["stages"] == {"calibrate": 3.0, "measure": 2.0}
    assert "stages" not in found["commands"]["search"], "its seconds are the solver's"
    assert found["settings"]["threads"] == 2


def test_a_run_that_goes_on_is_not_recorded(
    asked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    start(monkeypatch, tmp_path / "work")
    assert len(asked) == 3
    assert not (tmp_path / "results").exists()


def test_a_run_over_the_limit_says_so(
    asked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(w4a4_time, "LIMIT", 179)
    start(monkeypatch, tmp_path / "work")
    found = json.loads((tmp_path / "results" / "w4a4_time.json").read_text())
    assert found["holds"] is False


def test_a_command_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 2, "", "there is no such model")
    monkeypatch.setattr(w4a4_time, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    with pytest.raises(SystemExit, match="there is no such model"):
        start(monkeypatch, tmp_path / "work")


def in_this_process(command: list[str], **_: Any) -> Any:
    """Each process would import torch and transformers for itself."""
    done = CliRunner().invoke(app, command[4:])
    return subprocess.CompletedProcess(command, done.exit_code, done.stdout, done.stderr)


def test_the_product_knows_these_commands(
    tiny_llama: Callable[..., Path],
    sample_text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama(
        tmp_path / "model",
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    text = tmp_path / "text.txt"
    text.write_text(sample_text)
    monkeypatch.setattr(w4a4_time, "WINDOWS", 3)
    monkeypatch.setattr(w4a4_time, "SEQLEN", 32)
    monkeypatch.setattr(w4a4_time, "BITS", "9")  # half of this model stays in 16 bits
    monkeypatch.setattr(w4a4_time, "subprocess", SimpleNamespace(run=in_this_process))
    found = w4a4_time.measure(model, text, tmp_path / "work", threads=1)
    assert {"calibrate", "rotate", "predict"} <= found["commands"]["measure"]["stages"].keys()
    assert found["bytes"] > 0
    assert found["seconds"] >= found["commands"]["measure"]["seconds"] > 0
