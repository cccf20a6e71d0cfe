"""The graph benchmark on a tiny model: rows are kept, budgets hold, and mixed columns run."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.bench import graph, record
from quantlib.bench.graph_bits import WIDTHS, linears, lost_by_column, round_linear
from quantlib.bench.graph_checkpoint import run_packed
from quantlib.bench.graph_model import Bench
from quantlib.bench.graph_transfer import compared
from quantlib.pipeline.compress import measured_table, open_run, recipe_for
from quantlib.pipeline.plan import Budget
from quantlib.search.columns import Assignment, assignments

RECIPE = {"seqlen": 64, "windows": 4, "probe_windows": 2, "probes": 0, "passes": 0, "seed": 0}


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], sample_text: str
) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("graph")
    model = tiny_llama(
        folder / "model", hidden_size=128, intermediate_size=256, num_hidden_layers=2
    )
    text = folder / "text.txt"
    text.write_text(sample_text)
    recipe = recipe_for(Budget(), data=str(text), schemes=["w2g64z4s4", "w8g64zs6"], **RECIPE)
    with open_run(model, folder / "work", recipe) as run:
        measured_table(run)
        yield Bench(run, folder / "graph.json", run.probe_windows)


def plan_of(bench: Bench, method: str, bits: float) -> tuple[dict[str, Assignment], int]:
    budget = graph.budget_bytes(bench.tables, bits)
    return graph.allocation(bench, method, bits, budget), budget


@pytest.mark.parametrize("method", ["uniform", "layers", "columns", "columns_again"])
def test_every_method_keeps_the_budget(bench: Bench, method: str) -> None:
    plan, budget = plan_of(bench, method, 3.0)
    assert plan.keys() == bench.tables.keys()
    used = sum(bench.tables[name].size(one) for name, one in plan.items())
    assert used <= budget


def test_more_to_choose_from_never_predicts_more(bench: Bench) -> None:
    lost = [
        sum(one.loss for one in plan_of(bench, method, 3.0)[0].values())
        for method in ("columns", "layers", "uniform")
    ]
    assert lost == sorted(lost)


def test_columns_lose_together_what_the_linear_loses(bench: Bench) -> None:
    plan, _ = plan_of(bench, "columns", 3.0)
    for linear in linears(bench.run, bench.groups):
        one = plan[linear.name]
        parts = lost_by_column(linear, one)
        # float32 products of some hundred terms on either side
        assert float(parts.sum()) == pytest.approx(round_linear(linear, one).lost, rel=1e-3)


def test_finished_rows_are_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "METHODS", ("uniform",))
    graph.column_rows(bench, [3.0])
    row = json.loads(bench.kept.read_text())["columns"]["uniform@3"]
    assert row["true_bits"] <= 3
    assert row["kl"] > 0
    assert len(row["kl_by_window"]) == len(bench.windows)
    monkeypatch.setattr(graph, "column_row", None)  # not asked again
    graph.column_rows(bench, [3.0])


def test_rows_that_were_not_measured_again_stay_in_the_result_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def row(bits: float, kl: float, linears: int = 70) -> dict[str, float]:
        return {"bits": bits, "kl": kl, "linears": linears}

    def published(rows: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(graph.publish(rows).read_text())
        return found

    published({"columns": {"graph@2.5": row(2.5, 0.3), "graph@2.25": row(2.25, 0.5)}})
    published({"columns": {"graph@2.5": row(2.5, 0.2)}, "checkpoint": {"columns@2.5": {"kl": 1}}})
    found = published({"columns": {"uniform@2.5/3": row(2.5, 0.1, 7)}})
    assert {(one["bits"], one["kl"]) for one in found["columns"]} == {(2.25, 0.5), (2.5, 0.2)}
    assert [one["method"] for one in found[graph.FEWER]] == ["uniform"]
    assert found["checkpoint"] == {"columns@2.5": {"kl": 1}}
    found = published({"prediction": {"ridge": {"spearman": 0.9}}})
    found = published({"prediction": {"graph": {"spearman": 0.8}}})
    assert set(found["prediction"]) == {"ridge", "graph"}
    assert len(found["columns"]) == 2


def test_mixed_columns_are_written_and_run_by_the_kernels(bench: Bench, tmp_path: Path) -> None:
    def widths(one: Assignment) -> int:
        return one.scheme.count("h")

    tables = bench.tables.items()
    plan = {name: max(assignments(t.prices, WIDTHS), key=widths) for name, t in tables}
    row = run_packed(bench, plan, tmp_path / "out")
    assert row["most_segments"] > 2
    assert row["linears_with_an_order"] == len(plan)
    # the same numbers, summed in another order: some 1e-6 of the logits' spread
    assert row["kl_packed"] == pytest.approx(row["kl_dense"], rel=1e-3)
    assert row["largest_logit_difference"] < 1e-3
    assert row["largest_logit_difference_native"] < 1e-3


def test_a_prediction_is_compared_by_rank_and_by_size() -> None:
    pairs = {("a", "w2"): (2.0, 1.0), ("b", "w2"): (20.0, 10.0), ("c", "w2"): (40.0, 20.0)}
    found = compared(pairs)
    assert found["spearman"] == pytest.approx(1)
    assert found["median_error"] == pytest.approx(1.0)
    assert torch.isfinite(torch.tensor(list(found.values()))).all()
