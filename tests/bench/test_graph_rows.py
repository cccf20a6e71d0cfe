"""Blocks of rows on a tiny model: budgets hold, more to choose from loses less, and kernels run
what was chosen."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.bench import graph_depths, graph_rows, record
from quantlib.bench.graph_checkpoint import OTHERS
from quantlib.bench.graph_depths import LEAST, block_of, factors_of, spans
from quantlib.bench.graph_row_tables import KNOWN, SCHEMES, RowTable, tables
from quantlib.bench.graph_rows import (
    METHODS,
    Judge,
    Kept,
    Wanted,
    allocation,
    budget_bytes,
    compared,
    factors_of_depth,
    measure_rounding,
    packed_row,
    publish,
    row_of,
)
from quantlib.errors import SearchError
from quantlib.pipeline.calibrate import calibrate
from quantlib.pipeline.compress import open_run, recipe_for
from quantlib.pipeline.measure import measure
from quantlib.pipeline.plan import Budget
from quantlib.pipeline.run import Run
from quantlib.search.row_widths import RowAssignment

RECIPE = {"seqlen": 64, "windows": 4, "probe_windows": 2, "probes": 0, "passes": 0, "seed": 0}
Measured = tuple[Run, dict[str, RowTable], Judge]


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], sample_text: str
) -> Iterator[Measured]:
    folder = tmp_path_factory.mktemp("rows")
    model = tiny_llama(
        folder / "model", hidden_size=128, intermediate_size=256, num_hidden_layers=2
    )
    text = folder / "text.txt"
    text.write_text(sample_text)
    recipe = recipe_for(Budget(), data=str(text), schemes=[*SCHEMES, *KNOWN, OTHERS], **RECIPE)
    with open_run(model, folder / "work", recipe) as run:
        calibrate(run)
        measure(run)
        found = tables(run, "gptq", 1, known=True)
        yield run, found, Judge(run.source, run.probe_windows)


def plan_of(measured: Measured, method: str, bits: float) -> tuple[dict[str, RowAssignment], int]:
    found = measured[1]
    budget = budget_bytes(found, bits)
    depths = dict.fromkeys(found, 1.0)
    return allocation(found, method, budget, depths), budget


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_budget(measured: Measured, method: str) -> None:
    plan, budget = plan_of(measured, method, 3.5)
    found = measured[1]
    assert plan.keys() == found.keys()
    assert sum(found[name].size(one) for name, one in plan.items()) <= budget


def test_more_to_choose_from_never_loses_more(measured: Measured) -> None:
    found = measured[1]
    lost = []
    for method in ("rows", "layers", "uniform"):
        plan, _ = plan_of(measured, method, 3.5)
        lost.append(sum(found[name].lost(one) for name, one in plan.items()))
        predicted = sum(one.loss for one in plan.values())
        assert lost[-1] == pytest.approx(predicted, rel=1e-6)  # the table is exact for rows
    assert lost == sorted(lost)


def test_columns_and_rows_of_a_table_add_up_alike(measured: Measured) -> None:
    for table in measured[1].values():
        by_row, by_column = table.prices.sum(0), table.columns.sum(0)
        # float32 products of some hundred terms on either side
        torch.testing.assert_close(by_column, by_row, rtol=2e-3, atol=0)
        torch.testing.assert_close(table.plain.sum(0), table.graph.plain.sum(0), rtol=1e-3, atol=0)


def test_a_row_says_what_was_measured(measured: Measured) -> None:
    run, found, judge = measured
    row = row_of(run, judge, found, "rows", 3.5, {}) | {"method": "rows"}
    base = row_of(run, judge, found, "uniform", 3.5, {}) | {"method": "uniform"}
    rows = [one | {"rounding": "gptq", "bits": 3.5, "windows": 2} for one in (row, base)]
    ratios = [one["kl_ratio"] for one in compared(rows)]
    assert ratios == pytest.approx([row["kl"] / base["kl"], 1.0])
    assert row["true_bits"] <= 3.5
    assert row["linears_in_blocks"] > 0


def test_rows_that_were_not_measured_again_stay_in_the_result_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "machine", lambda: "one")

    def row(method: str, kl: float, linears: int = 70) -> dict[str, Any]:
        about = {"method": method, "rounding": "gptq", "bits": 2.5, "windows": 2}
        return about | {"linears": linears, "kl": kl, "kl_by_window": [0.8 * kl, 1.2 * kl]}

    def published(*rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
        file = json.loads(publish(rows).read_text())
        return {found["method"]: found for found in file["rows"]}

    published(row("uniform", 0.4), row("graph", 0.3))
    monkeypatch.setattr(record, "machine", lambda: "another")
    found = published(row("known", 0.6), row("uniform", 0.5))
    kls = {name: one["kl"] for name, one in found.items()}
    assert kls == {"uniform": 0.5, "graph": 0.3, "known": 0.6}
    assert found["graph"]["machine"] == "one"
    assert found["graph"]["kl_ratio_known"] == pytest.approx(0.5)
    assert found["graph"]["kl_ratio_gptq"] == pytest.approx(0.6)
    assert "known" in published(row("layers", 0.1, linears=7)), "fewer linears are another task"
    monkeypatch.setattr(graph_rows, "SCHEMES", ("w2g64",))
    assert list(published(row("rows", 0.2))) == ["rows"], "of other formats: not comparable"


def test_seeds_stand_beside_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row from before there were seeds is of seed 0; each is compared with its own seed's."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def row(method: str, kl: float, **seed: int) -> dict[str, Any]:
        about = {"method": method, "rounding": "gptq", "bits": 2.5, "windows": 2, "linears": 70}
        return about | {"kl": kl, "kl_by_window": [0.8 * kl, 1.2 * kl], **seed}

    publish([row("known", 0.6), row("rows", 0.3)])
    file = json.loads(publish([row("known", 1.0, seed=1), row("rows", 0.4, seed=1)]).read_text())
    ratios = [found["kl_ratio_known"] for found in file["rows"] if found["method"] == "rows"]
    assert ratios == pytest.approx([0.5, 0.4])
    (rows,) = (one for one in file["over_seeds"] if one["method"] == "rows")
    assert rows["seeds"] == [0, 1]
    assert rows["kl"]["mean"] == pytest.approx(0.35)
    # Student's t of one degree of freedom, times the standard error of two
    assert rows["kl_ratio_known"]["half_width"] == pytest.approx(12.706 * 0.05, rel=1e-3)
    again = json.loads(publish([row("rows", 0.5, seed=1)]).read_text())
    assert [found["kl"] for found in again["rows"] if found["method"] == "rows"] == [0.3, 0.5]


def test_spans_are_neighbouring_blocks() -> None:
    names = [f"model.layers.{block}.{part}" for block in range(0, 10, 2) for part in "ab"]
    assert [len(span) for span in spans(names, 3)] == [4, 4, 2]
    assert [name for span in spans(names, 3) for name in span] == names
    assert [len(span) for span in spans(names)] == [2] * 5


def test_a_factor_is_what_was_saved_over_what_was_predicted() -> None:
    lost = {"a": 0.1, "b": 0.1, "c": 0.2, "d": 0.2}
    found = factors_of([["a", "b"], ["c"], ["d"]], 1.0, [0.4, 0.8, 1.1], lost)
    mean = (0.6 + 0.2 - 0.1) / 0.6
    expected = {"a": 3 / mean, "b": 3 / mean, "c": 1 / mean, "d": LEAST}
    assert found == pytest.approx(expected)
    with pytest.raises(SearchError, match="nothing to tie prices to"):
        factors_of([["a", "b"], ["c"], ["d"]], 1.0, [1.0, 1.2, 1.0], lost)


def test_what_depths_cost_is_measured_once(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found, _ = measured
    factors = factors_of_depth(run, found, tmp_path / "depths.json")
    assert factors.keys() == found.keys()
    assert len(set(factors.values())) == 2, "a factor for each block"
    monkeypatch.setattr(graph_depths, "measured_spans", None)  # not asked again
    assert factors_of_depth(run, found, tmp_path / "depths.json") == factors


def test_factors_move_bytes_to_where_they_are_large(measured: Measured) -> None:
    found = measured[1]
    first = [name for name in found if block_of(name) == "0"]
    budget = budget_bytes(found, 3.5)

    def bytes_of_first(factor: float) -> int:
        factors = {name: factor if name in first else 1.0 for name in found}
        plan = allocation(found, "layers_tied", budget, factors)
        return sum(found[name].size(plan[name]) for name in first)

    assert bytes_of_first(20.0) > bytes_of_first(1.0) > bytes_of_first(0.05)


def test_blocks_of_rows_are_written_and_run_by_the_kernels(measured: Measured) -> None:
    run, _, judge = measured
    plan, _ = plan_of(measured, "rows", 3.5)
    row = packed_row(run, judge, plan)
    assert row["linears_in_blocks"] > 0
    # the same numbers, summed in another order: some 1e-6 of the logits' spread
    assert row["kl_packed"] == pytest.approx(row["kl_dense"], rel=1e-3)
    assert row["largest_logit_difference"] < 1e-3


def test_a_packed_plan_of_a_further_seed_stands_beside_the_first(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, found, judge = measured
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(graph_rows, "tables", lambda *_: found)
    monkeypatch.setattr(graph_rows, "packed_row", lambda *_: {"bits": 3.5})
    publish([{"bits": 3.5, "linears": len(found)}])
    wanted = Wanted((), ("descent",), (), 1, 2, packed=True, seed=1)
    measure_rounding(run, judge, Kept(tmp_path / "kept.json"), wanted, "descent")
    packed = json.loads(record.path_of(graph_rows.RESULT).read_text())["packed"]
    assert [row.get("seed", 0) for row in packed] == [0, 1]
