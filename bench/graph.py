"""What the graph network is worth: bits to columns, and sensitivities it has not measured.

    python -P -m quantlib.bench.graph --work DIR                   everything, what is there reused
    python -P -m quantlib.bench.graph --work DIR --part columns    one part: columns, checkpoint,
                                                                   prediction
    python -P -m quantlib.bench.graph --work DIR --budget 2.25     one budget of the columns' part
    python -P -m quantlib.bench.graph --work DIR --every 3         the linears of every third block
                                                                   in the first two parts

SmolLM2-135M-Instruct (the permuted copy of `bench.assets`). DIR is a work directory of
`quantlib measure` with default options; statistics and the bank that are there are used, others
made. Finished rows are kept in DIR/graph.json, so a command that was stopped goes on, and written
to `results/graph.json`.

`columns`: the 210 linears at true bits per weight (codes, scales, zero points, orders; embedding
and norms stay as they are), each allocation rounded by plain GPTQ and measured on held-out windows:

    uniform       the same scheme everywhere, then the next one, linear by linear
    layers        the exact knapsack over whole linears
    columns       the exact knapsack over columns of all linears, on GPTQ's own column errors
    columns_again the same after one rounding told what its columns really lost
    graph         the graph network's prices, hard bits by the same knapsack
    graph_again   the same, trained on from what its first bits really lost

`checkpoint`: one of them written, loaded and run by the kernels. `prediction`: see
`bench/graph_sensitivity.py`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.bench import assets, graph_bits, record
from quantlib.bench.graph_bits import Table
from quantlib.bench.graph_checkpoint import checkpoint_row
from quantlib.bench.graph_model import Bench
from quantlib.bench.graph_sensitivity import prediction_rows
from quantlib.calibration.data import load_windows
from quantlib.checkpoint.disk import read_json
from quantlib.pipeline.calibrate import calibrate
from quantlib.pipeline.compress import load_tokenizer, open_run
from quantlib.recipe import Recipe
from quantlib.search.baselines import uniform
from quantlib.search.columns import Assignment, Candidates, chosen, column_problem, remeasured
from quantlib.search.gnn import ColumnNetwork
from quantlib.search.gnn_bits import learned_prices, train
from quantlib.search.solve import solve

BUDGETS = (2.25, 2.5, 3.0, 2.0)
"""True bits per weight, the ones that say most first. No format has fewer than 2 bits before its
scales, so the last is answered with the smallest size there is."""
METHODS = ("uniform", "columns", "graph", "layers", "columns_again", "graph_again")
PACKED = ("columns", 2.5)
"""The allocation that the part `checkpoint` writes."""
WINDOWS, SEQLEN = 8, 512
PARTS = ("columns", "checkpoint", "prediction")
FEWER = "columns_of_fewer_linears"


def budget_bytes(tables: Mapping[str, Table], bits: float) -> int:
    """Bytes of all linears at `bits` true bits per weight; those of the smallest choices where
    there are no smaller ones."""
    parameters = sum(math.prod(table.shape) for table in tables.values())
    found = {name: table.candidates(mixed=False) for name, table in tables.items()}
    return max(int(bits * parameters / 8), sum(min(one.bytes) for one in found.values()))


def column_rows(bench: Bench, budgets: list[float]) -> None:
    """The part `columns`."""
    wanted = [(method, bits) for bits in budgets for method in METHODS[:3]]
    wanted += [(method, bits) for bits in budgets for method in METHODS[3:]]
    for method, bits in wanted:
        name = row_name(bench, method, bits)
        possible = bits > min(BUDGETS) or method == METHODS[0]
        if possible and name not in bench.rows.get("columns", {}):
            bench.keep("columns", name, column_row(bench, method, bits))


def row_name(bench: Bench, method: str, bits: float) -> str:
    """`columns@2.5`, or `columns@2.5/3` where only every third block is rounded."""
    return f"{method}@{bits:g}" + (f"/{bench.every}" if bench.every > 1 else "")


def column_row(bench: Bench, method: str, bits: float) -> dict[str, Any]:
    """One allocation: chosen, rounded, measured."""
    budget = budget_bytes(bench.tables, bits)
    started = time.monotonic()
    plan = allocation(bench, method, bits, budget)
    searched = time.monotonic()
    result, lost = bench.measure(plan)
    assert result.kl is not None
    assert result.perplexity_ratio is not None
    tables = bench.tables
    size = sum(tables[name].size(one) for name, one in plan.items())
    parameters = sum(math.prod(table.shape) for table in tables.values())
    segments = [1 + one.scheme.count("h") for one in plan.values()]
    return {
        "bits": bits,
        "linears": len(tables),
        "true_bits": 8 * size / parameters,
        "kl": result.kl.value,
        "kl_error": result.kl.standard_error,
        "perplexity_ratio": result.perplexity_ratio.value,
        "predicted": math.fsum(one.loss for one in plan.values()),
        "lost": lost,
        "mixed_linears": sum(count > 1 for count in segments),
        "most_segments": max(segments),
        "search_seconds": round(searched - started, 1),
        "rounding_and_evaluation_seconds": round(time.monotonic() - searched, 1),
        "kl_by_window": result.per_window["kl"],
    }


def allocation(bench: Bench, method: str, bits: float, budget: int) -> dict[str, Assignment]:
    """Weight -> its assignment."""
    tables = bench.tables
    if method in ("uniform", "layers"):
        whole = {name: table.candidates(mixed=False) for name, table in tables.items()}
        problem = column_problem(whole)
        solver = uniform if method == "uniform" else lambda p, b: solve(p, b).picks
        return chosen(whole, solver(problem, budget))
    prices = {name: table.prices for name, table in tables.items()}
    if method.endswith("_again"):
        first = method.removesuffix("_again")
        prices = second_prices(bench, first, bits, budget)
        if first == "graph":
            prices = network_prices(bench, budget, prices)
    elif method == "graph":
        prices = network_prices(bench, budget, prices)
    return solved({name: t.candidates(prices[name]) for name, t in tables.items()}, budget)


def solved(candidates: Mapping[str, Candidates[Assignment]], budget: int) -> dict[str, Assignment]:
    """The exact allocation among candidates."""
    return chosen(candidates, solve(column_problem(candidates), budget).picks)


def second_prices(bench: Bench, first: str, bits: float, budget: int) -> dict[str, Tensor]:
    """The tables after a rounding by the method `first`, of linears that took some of FORMATS."""
    plan = allocation(bench, first, bits, budget)
    found = {}
    for linear in graph_bits.linears(bench.run, bench.groups):
        table, one = bench.tables[linear.name], plan[linear.name]
        found[linear.name] = table.prices
        if one.scheme not in graph_bits.FINER:
            lost = graph_bits.lost_by_column(linear, one)
            found[linear.name] = remeasured(table.prices, one.picks, lost)
    return found


def network_prices(bench: Bench, budget: int, prices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a network that was trained on these prices says of every linear."""
    network = ColumnNetwork(torch.Generator().manual_seed(0))
    lessons = {name: table.lesson(prices[name]) for name, table in bench.tables.items()}
    least = sum(len(one.prices) * float(one.rates[0]) for one in lessons.values())
    train(network, lessons, max(float(budget), 1.001 * least))
    return {name: learned_prices(network, one.graph) for name, one in lessons.items()}


def checkpoint(bench: Bench) -> None:
    """The part `checkpoint`: the knapsack's columns at one budget."""
    method, bits = PACKED
    plan = allocation(bench, method, bits, budget_bytes(bench.tables, bits))
    checkpoint_row(bench, row_name(bench, method, bits), plan)


def publish(rows: Mapping[str, Any]) -> Path:
    """Write the file that is committed; its `columns` are the rows in which most linears were
    rounded: one task. Parts and rows that were not measured again stay as they are in it.

    Raises CheckpointError for a damaged file: its rows would be lost by writing over it.
    """
    file = record.path_of("graph")
    before = read_json(file) if file.exists() else {}
    found = {part: before[part] for part in (*PARTS, FEWER) if part in before}
    for part in ("checkpoint", "prediction"):
        if part in rows:
            found[part] = {**before.get(part, {}), **rows[part]}
    if "columns" in rows:
        columns = [
            {"method": name.partition("@")[0], **row} for name, row in rows["columns"].items()
        ]
        again = {_place(row) for row in columns}
        older = [*before.get("columns", []), *before.get(FEWER, [])]
        columns = [*(row for row in older if _place(row) not in again), *columns]
        most = max(row["linears"] for row in columns)
        found["columns"] = [row for row in columns if row["linears"] == most]
        found[FEWER] = [row for row in columns if row["linears"] < most]
    return record.write("graph", {"windows": WINDOWS, "seqlen": SEQLEN, **found})


def _place(row: Mapping[str, Any]) -> tuple[str, float, int]:
    """What a row of the columns' part is of."""
    return row["method"], row["bits"], row["linears"]


def main() -> None:
    """Run what was asked for; what is finished is written to `results/graph.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--budget", type=float, choices=BUDGETS, action="append")
    parser.add_argument(
        "--every", type=int, default=1, help="round the linears of every so many blocks only"
    )
    options = parser.parse_args()
    model = assets.fetch_smollm2()
    recipe = Recipe.create(data=str(assets.wikipedia_text("calibration")))
    held_out = str(assets.wikipedia_text("held_out"))
    with open_run(model, options.work, recipe) as run:
        calibrate(run)
        windows = load_windows(held_out, load_tokenizer(model), SEQLEN, WINDOWS, seed=0)
        kept = options.work / "graph.json"
        bench = Bench(run, kept, windows, options.every, publish)
        parts: dict[str, Callable[[], None]] = {
            "columns": lambda: column_rows(bench, options.budget or list(BUDGETS)),
            "checkpoint": lambda: checkpoint(bench),
            "prediction": lambda: prediction_rows(bench),
        }
        print(publish(bench.rows))
        for part in options.part or PARTS:
            parts[part]()


if __name__ == "__main__":
    main()
