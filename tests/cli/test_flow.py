"""The whole way of a model. The console script starts real processes for two of the commands, which
import torch and transformers each; the others go through the same command line in this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import SCHEMES, Run

SCRIPT = Path(sys.executable).with_name("quantlib")


@pytest.fixture
def script(tmp_path: Path):
    """`script("compress", ...)`: stdout and stderr of the command, run in an empty folder."""

    def call(*arguments: object) -> tuple[str, str]:
        done = subprocess.run(
            [str(SCRIPT), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return call


@pytest.mark.slow
def test_from_a_model_to_text_and_back_to_another_budget(
    script, run: Run, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ("--schemes", SCHEMES, "--seqlen", 32, "--windows", 6, "--no-refine", "--seed", 3)
    answer, notes = script("compress", model, "--bits", 6, "-o", "out", "--data", text, *quick)
    assert "weights on disk" in answer
    assert "KL predicted" in answer
    assert "95 % between" in answer
    assert "needs about" in notes
    assert "calibrate: done" in notes
    assert "quantlib eval" in notes
    assert (tmp_path / "out.work" / "report.html").stat().st_size > 10_000

    told = run("eval", "out", "--against", model, "--data", text, "--seqlen", 32, "--json")
    kl = told.json["result"]["kl"]
    assert 0 < kl["value"] < 1
    assert kl["standard_error"] > 0

    answer, notes = script("generate", "out", "The lighthouse", "--max-new-tokens", 8)
    assert answer.strip()
    assert "tokens/s" in notes

    before = (tmp_path / "out.work" / "journal.jsonl").read_bytes()
    found = run("search", "--work", "out.work", "--bits", 4.5, "--json").json
    assert found["bits"] <= 4.5
    assert found["seconds"] < 2
    assert run("apply", "out.work/plan.json", "-o", "smaller").code == 0
    assert (tmp_path / "out.work" / "journal.jsonl").read_bytes() == before, "work was done again"
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("smaller", "out")]
    assert sizes[0] < sizes[1]
    assert sizes[0] <= found["bytes"] <= found["budget_bytes"]

    assert run("report", "--work", "out.work", "-o", "page.html").stdout.strip() == "page.html"
    assert "<html" in (tmp_path / "page.html").read_text()
