"""Rows of `bench.search` that other benchmarks measured: the graph network's and those of searches
that train, from their result files, on the tasks that they are about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlib.bench import record
from quantlib.checkpoint.disk import read_json
from quantlib.errors import DataError

GRAPH, TRAINED = "graph.json", "search_trained.json"


def other_rows(folder: Path = record.RESULTS) -> list[dict[str, Any]]:
    """Rows {task, method, cost, cost_unit, quality, quality_unit, error, minutes, source}; none of
    a benchmark that was not run. Raises DataError for a result file that is not as expected."""
    rows: list[dict[str, Any]] = []
    for name, reader in ((GRAPH, _graph), (TRAINED, _trained)):
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


def _graph(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Columns of SmolLM2's linears: exact over layers and columns, and the graph network. Bits are
    true bits of the linears; nothing else is rounded, so these rows are a task of their own."""
    return [
        {
            "task": "smollm2 linears, columns",
            "method": str(row["method"]),
            "cost": float(row["true_bits"]),
            "cost_unit": "bits",
            "quality": float(row["kl"]),
            "quality_unit": "KL",
            "error": float(row["kl_error"]),
            "minutes": float(row["search_seconds"]) / 60,
        }
        for row in data.get("columns", [])
    ]


def _trained(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Networks trained with their formats: accuracy over seeds, with half a 95 % interval; minutes
    are None where every run was stopped and resumed."""
    rows = []
    for row in data["comparison"]:
        half = row["accuracy"]["half_width"]
        rows.append(
            {
                "task": f"fashion {row['network']}, trained",
                "method": str(row["method"]),
                "cost": float(row["bits_product"]),
                "cost_unit": "weight bits x input bits",
                "quality": float(row["accuracy"]["mean"]),
                "quality_unit": "accuracy, %",
                "error": None if half is None else float(half),
                "minutes": None if row["seconds"] is None else float(row["seconds"]) / 60,
            }
        )
    return rows
