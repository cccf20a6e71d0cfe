"""The rows of `bench.trained_models` over seeds: what methods give, and how they differ.

A seed draws batches and choices. The model that is trained on, and what it is judged on, are the
same for all seeds, so there are two errors that say different things and stand side by side:

    half_width       of the 95 % interval of other batches and choices: Student's t over seeds
    standard_errors  each seed's own: of other texts or pictures to be judged on

Methods of a seed see the same batches and are judged on the same windows, so they are compared seed
by seed, and within a seed window by window where a row keeps its windows (else the difference's own
error is not known: that of two shares of the same pictures is smaller than theirs together).
Rounding alone draws nothing: its one row stands beside every seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from quantlib.bench.seeds import interval, mean_known, with_values

UNDRAWN = "rounded"
"""The method that no seed changes."""

Row = Mapping[str, Any]
Told = tuple[float, float | None]
"""A figure and its standard error, None where that is not known."""


def compared(rows: Sequence[Row], figures: Sequence[str]) -> list[dict[str, Any]]:
    """One entry for each method: its `figures`, and as `over_OTHER` its differences from each
    method before it. Figures that no row has are left out.

    rows: of one subject in today's settings, of one method one for a seed.
    """
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    found: list[dict[str, Any]] = []
    for method, own in by_method.items():
        entry: dict[str, Any] = {
            "method": method,
            "bits_product": interval([row["bits_product"] for row in own])["mean"],
            "seconds": mean_known([row["seconds"] for row in own]),
            "figures": _over_seeds(figures, {row["seed"]: _figures(row, figures) for row in own}),
        }
        for other in [told["method"] for told in found]:
            pairs = {row["seed"]: (row, _of_seed(by_method[other], row["seed"])) for row in own}
            told = {
                seed: _differences(row, beside, figures)
                for seed, (row, beside) in pairs.items()
                if beside is not None
            }
            entry[f"over_{other}"] = _over_seeds(figures, told)
        found.append(entry)
    return found


def _of_seed(rows: Sequence[Row], seed: int) -> Row | None:
    """The row that stands beside those of a seed."""
    return next((row for row in rows if row["method"] == UNDRAWN or row["seed"] == seed), None)


def _figures(row: Row, names: Sequence[str]) -> dict[str, Told]:
    """Of one row: numbers, or a value with its standard error, among them shares of pictures."""
    told = {**row, **row.get("shares", {})}
    found: dict[str, Told] = {}
    for name in names:
        if isinstance(told.get(name), Mapping):
            found[name] = (told[name]["value"], told[name]["standard_error"])
        elif name in told:
            found[name] = (told[name], None)
    return found


def _differences(row: Row, other: Row, names: Sequence[str]) -> dict[str, Told]:
    """What a row has more than another, with errors of windows that both were judged on."""
    own, theirs = _figures(row, names), _figures(other, names)
    return {
        name: (own[name][0] - theirs[name][0], _paired_error(row, other, name))
        for name in own
        if name in theirs
    }


def _paired_error(row: Row, other: Row, name: str) -> float | None:
    """Standard error of the mean difference over windows; None without windows of both."""
    own, theirs = (one.get("per_window", {}).get(name, ()) for one in (row, other))
    if len(own) < 2 or row["windows_sha256"] != other["windows_sha256"]:
        return None
    by_window = [a - b for a, b in zip(own, theirs, strict=True)]
    return statistics.stdev(by_window) / math.sqrt(len(by_window))


def _over_seeds(
    names: Sequence[str], by_seed: Mapping[int, Mapping[str, Told]]
) -> dict[str, dict[str, Any]]:
    """Of every figure the mean over seeds with its interval, beside what each seed says."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        told = {seed: figures[name] for seed, figures in by_seed.items() if name in figures}
        if told:
            values = [value for value, _ in told.values()]
            found[name] = {
                **with_values(values),
                "seeds": list(told),
                "standard_errors": [error for _, error in told.values()],
            }
    return found


def table(comparison: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a line for each method and each difference; in brackets the largest standard error
    of a single seed."""
    names = list(dict.fromkeys(name for entry in comparison for name in entry["figures"]))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for entry in comparison:
        lines.append(_line(entry["method"], entry["figures"], names, ""))
        for key, told in entry.items():
            if key.startswith("over_"):
                said = f"{entry['method']} - {key.removeprefix('over_')}"
                lines.append(_line(said, told, names, "+"))
    return "\n".join(lines)


def _line(said: str, told: Mapping[str, Any], names: Sequence[str], sign: str) -> str:
    cells = [_said(told[name], sign) if name in told else "" for name in names]
    return f"| {said} | " + " | ".join(cells) + " |"


def _said(figure: Mapping[str, Any], sign: str) -> str:
    half = figure["half_width"]
    errors = [error for error in figure["standard_errors"] if error is not None]
    said = f"{figure['mean']:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")
    return said + (f" ({max(errors):.4f})" if errors else "")
