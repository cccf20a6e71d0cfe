"""The README's figures are those of `bench/results/`, and these are what was promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantlib.bench import readme_table
from quantlib.bench.record import RESULTS


def rows(name: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(Path(RESULTS / f"{name}.json").read_text())["rows"]
    return found


def test_the_readme_shows_the_committed_results() -> None:
    text = readme_table.README.read_text(encoding="utf-8")
    assert readme_table.updated(text) == text
    assert readme_table.results_table() in text


@pytest.mark.parametrize("row", rows("quality_budgets"), ids=lambda row: f"{row['budget_mb']}MB")
def test_every_budget_is_met_from_below_with_the_kl_promised(row: dict[str, float]) -> None:
    budget = row["budget_mb"] * 1e6
    assert 0.995 * budget <= row["bytes"] <= budget
    assert row["kl"] <= row["target_kl"]


def test_results_say_where_and_how_they_were_made() -> None:
    for path in RESULTS.glob("*.json"):
        head = json.loads(path.read_text())
        assert {"date", "machine", "versions", "command"} <= set(head), path.name
