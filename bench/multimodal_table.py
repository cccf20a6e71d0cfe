"""What the rows of `bench.multimodal` say together: methods side by side, seed by seed and on
average. Pure functions of the rows as they are kept (JSON)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from quantlib.bench.comparisons import WHOLE


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every budget and figure: the mean over seeds of every method, the reference's value, and
    for each method but `whole` whether `whole` is better (None where one has no value, or both have
    the same)."""
    found = []
    for bits in sorted({row["bits"] for row in rows}):
        mine = [row for row in rows if row["bits"] == bits and "figures" in row]
        for task, name, better in _figures(mine):
            values = {
                method: _values(mine, method, task, name)
                for method in dict.fromkeys(row["method"] for row in rows if row["bits"] == bits)
            }
            means = {method: fmean(v) if v else None for method, v in values.items()}
            whole = means.get(WHOLE.name)
            found.append(
                {
                    "bits": bits,
                    "task": task,
                    "figure": name,
                    "better": better,
                    "reference": _reference(mine, task, name),
                    "mean": means,
                    "seeds": {method: len(v) for method, v in values.items()},
                    "range": {m: [min(v), max(v)] for m, v in values.items() if v},
                    "whole_is_better": {
                        method: _is_better(whole, mean, better)
                        for method, mean in means.items()
                        if method != WHOLE.name
                    },
                }
            )
    return found


def _figures(rows: Iterable[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(task, name, which side is better) of all figures, in order."""
    found = [(f["task"], f["name"], f["better"]) for row in rows for f in row["figures"]]
    return list(dict.fromkeys(found))


def _values(rows: Iterable[dict[str, Any]], method: str, task: str, name: str) -> list[float]:
    return [
        float(figure["model"]["value"])
        for row in rows
        if row["method"] == method
        for figure in row["figures"]
        if (figure["task"], figure["name"]) == (task, name)
    ]


def _reference(rows: Iterable[dict[str, Any]], task: str, name: str) -> float | None:
    for row in rows:
        for figure in row["figures"]:
            if (figure["task"], figure["name"]) == (task, name) and figure["reference"]:
                return float(figure["reference"]["value"])
    return None


def _is_better(whole: float | None, other: float | None, better: str) -> bool | None:
    if whole is None or other is None or whole == other:
        return None
    return whole > other if better == "higher" else whole < other


def table(comparison: Sequence[dict[str, Any]]) -> str:
    """The comparison as lines of text."""
    lines = []
    for entry in comparison:
        means = "  ".join(
            f"{method} {'-' if mean is None else f'{mean:.4g}'}"
            for method, mean in entry["mean"].items()
        )
        before = (
            "" if entry["reference"] is None else f"  (full precision {entry['reference']:.4g})"
        )
        lines.append(f"{entry['bits']:g} bits  {entry['task']}: {entry['figure']}  {means}{before}")
    return "\n".join(lines)
