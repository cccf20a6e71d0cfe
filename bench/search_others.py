"""Rows of `bench.search` that other benchmarks measured: the graph network's on rows and columns of
linears, and those of searches that train, from their result files, on the tasks that they are
about. They are read whenever they are shown and never copied: a copy would stay behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlib.bench import record
from quantlib.checkpoint.disk import read_json
from quantlib.errors import DataError

ROWS, GRAPH, TRAINED = "graph_rows.json", "graph.json", "search_trained.json"
ROUNDING = "gptq"
"""Of the rows of linears: what uniform bits in GPTQ's own formats are rounded by, too, so that rows
differ by their bits alone."""
BASE = "int4"
EVEN: Mapping[str, Any] = {"mean": 0.0, "half_width": None, "on_pictures": None}
"""What trained networks are beside, and its difference from itself."""


def other_rows(folder: Path = record.RESULTS) -> list[dict[str, Any]]:
    """Rows {task, method, cost, cost_unit, quality, quality_unit, error, minutes, source}; none of
    a benchmark that was not run. error: half of a 95 % interval, None for a single seed.
    Raises DataError for a result file that is not as expected."""
    rows: list[dict[str, Any]] = []
    for name, reader in ((ROWS, _rows), (GRAPH, _graph), (TRAINED, _trained)):
        file = folder / name
        if not file.exists():
            continue
        try:
            found = reader(read_json(file))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{file} does not have the rows that bench.search reads ({error!r}): run its "
                "command again"
            ) from error
        rows += [row | {"source": name} for row in found]
    return rows


def _rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Blocks of rows of SmolLM2's linears, and beside them uniform bits in GPTQ's own formats; of
    the first seed, which all methods have."""
    wanted = [row for row in data["rows"] if row.get("seed", 0) == 0]
    found = [row for row in wanted if row["rounding"] == ROUNDING]
    return _of_linears("smollm2 linears, rows", found)


def _graph(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Columns of SmolLM2's linears: exact over layers and columns, and the graph network."""
    return _of_linears("smollm2 linears, columns", data.get("columns", []))


def _of_linears(task: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bits are true bits of the linears; nothing else is rounded, so these rows are a task of their
    own."""
    return [
        {
            "task": task,
            "method": str(row["method"]),
            "cost": float(row["true_bits"]),
            "cost_unit": "bits",
            "quality": float(row["kl"]),
            "quality_unit": "KL",
            "error": 1.96 * float(row["kl_error"]),
            "minutes": float(row["search_seconds"]) / 60,
        }
        for row in rows
    ]


def _trained(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Networks trained with their formats, beside the same networks in uniform 4-bit integers:
    accuracies themselves are of other seeds from row to row. The interval is over networks and
    pictures, of a single network over pictures; minutes are None where every run was stopped and
    resumed. Rows that share no network with uniform integers are left out."""
    rows = []
    for row in data["comparison"]:
        over = EVEN if row["method"] == BASE else row.get(f"over_{BASE}")
        if over is None:
            continue
        half = over["half_width"] if over["half_width"] is not None else over["on_pictures"]
        rows.append(
            {
                "task": f"fashion {row['network']}, trained",
                "method": str(row["method"]),
                "cost": float(row["bits_product"]),
                "cost_unit": "weight bits x input bits",
                "quality": float(over["mean"]),
                "quality_unit": "points of accuracy over uniform INT4",
                "error": None if half is None else float(half),
                "minutes": None if row["seconds"] is None else float(row["seconds"]) / 60,
            }
        )
    return rows
