"""`quantlib measure --predict`: a table without measuring everything, and what follows from it."""

from collections.abc import Callable
from pathlib import Path

from .conftest import QUICK, Run


def test_a_predicted_table_is_searched_and_applied_like_a_measured_one(
    run: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    measured = run(
        "measure", model, "--data", text, "--work", work, *QUICK, "--predict", "rows", "--json"
    )
    assert measured.json["predicted"] == "rows"
    assert measured.json["probes"] == 0
    found = run("search", "--work", work, "--bits", 5, "--json")
    assert found.code == 0, found
    applied = run("apply", work / "plan.json", "-o", out, "--json")
    assert applied.code == 0, applied
    assert list(out.glob("*.safetensors"))
    asked = run("generate", out, "The lighthouse", "--max-new-tokens", 3)
    assert asked.stdout.strip(), asked


def test_an_unknown_method_is_refused(
    fails: Callable[..., str], model: Path, text: Path, tmp_path: Path
) -> None:
    said = fails(
        2, "measure", model, "--data", text, "--work", tmp_path / "w", *QUICK, "--predict", "magic"
    )
    assert "rows, ridge, graph" in " ".join(said.split())
