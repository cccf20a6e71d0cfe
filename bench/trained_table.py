"""The rows of `bench.trained_search`, method by method, and the claims that are made of them.

Seeds are few, so intervals are those of Student's t over seeds. Methods of a seed share their
network and their batches: differences are taken within a seed, which is the sharper comparison, and
both are told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t as student

REFERENCES = {"int4": "over_int4", "e2m1": "over_e2m1", "full": "over_full"}
"""Methods that others are compared with -> the name of the difference."""

Rows = Sequence[Mapping[str, Any]]


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and the half width of its 95 % interval (None for a single value)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {"mean": mean, "half_width": None}
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return {
        "mean": mean,
        "half_width": float(student.ppf(0.975, count - 1)) * deviation / math.sqrt(count),
    }


def compared(rows: Rows) -> list[dict[str, Any]]:
    """One entry for each network and method: accuracy in percent, what is spent, and differences
    from the references in points, seed by seed."""
    found = []
    for network in dict.fromkeys(row["network"] for row in rows):
        of_network = [row for row in rows if row["network"] == network]
        for method in dict.fromkeys(row["method"] for row in of_network):
            of_method = [row for row in of_network if row["method"] == method]
            entry: dict[str, Any] = {
                "network": network,
                "method": method,
                "seeds": [row["seed"] for row in of_method],
                "accuracy": interval([100 * row["accuracy"] for row in of_method]),
                "bits_product": interval([row["bits_product"] for row in of_method])["mean"],
                "seconds": _mean([row["seconds"] for row in of_method]),
            }
            for reference, name in REFERENCES.items():
                differences = _differences(of_method, of_network, reference)
                if differences and method != reference:
                    entry[name] = interval(differences)
            found.append(entry)
    return found


def _mean(seconds: Sequence[float | None]) -> float | None:
    """Of the runs that were not resumed; None without any."""
    known = [value for value in seconds if value is not None]
    return interval(known)["mean"] if known else None


def _differences(of_method: Rows, of_network: Rows, reference: str) -> list[float]:
    """Points of accuracy above the reference of the same seed."""
    theirs = {r["seed"]: r["accuracy"] for r in of_network if r["method"] == reference}
    return [
        100 * (row["accuracy"] - theirs[row["seed"]]) for row in of_method if row["seed"] in theirs
    ]


def table(figures: Rows) -> str:
    """Markdown."""
    lines = [
        "| network | method | bits x bits | test % | over int4 | over e2m1 | over full | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in figures:
        cells = [entry["network"], entry["method"], f"{entry['bits_product']:.2f}"]
        cells.append(_said(entry["accuracy"], ""))
        cells += [_said(entry.get(name), "+") for name in REFERENCES.values()]
        cells.append("" if entry["seconds"] is None else f"{entry['seconds']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _said(figure: Mapping[str, float | None] | None, sign: str) -> str:
    if figure is None:
        return ""
    half = figure["half_width"]
    return f"{figure['mean']:{sign}.2f}" + ("" if half is None else f" ± {half:.2f}")
