"""The rows of `bench.trained_search`, method by method, and the claims that are made of them.

Seeds are few, so intervals are those of Student's t over seeds. A seed draws a network, and
networks differ by more than methods do. But methods of a seed share their network, their batches
and the pictures they are judged on, so differences are taken picture by picture within a seed, and
told with two intervals:

    half_width    of other networks and other pictures: Student's t over the seeds' means, and
                  beside it what pictures vary beyond that (crossed random effects, estimated by the
                  analysis of variance)
    on_pictures   of these very networks and other pictures; all there is to a single seed

Only rows that began with the very same network are paired: another machine may train another one
from the same seed. Rows of the ResNets 0 to 2 say less, their seed (`dev/LOG.md`, sixteenth
session): they are paired among themselves. Rows whose answers were not kept still have a difference
of accuracies: they count as a seed, and pictures' part is told from the others (which makes it
longer, not shorter). Where no row of a difference has its answers, what was told when they were
there is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm
from torch import Tensor

from quantlib.bench.seeds import interval, mean_known

REFERENCES = {"int4": "over_int4", "e2m1": "over_e2m1", "full": "over_full"}
"""Methods that others are compared with -> the name of the difference."""

ANSWERS = "right"
"""The figure of a row that says of every picture whether it was named right (`as_hex`)."""

Rows = Sequence[Mapping[str, Any]]
Pairs = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


def paired(by_seed: Sequence[float], pictures: np.ndarray) -> dict[str, float | None]:
    """Mean of differences, in percent, and half widths of 95 % intervals: over seeds and pictures
    (None for one seed), never below that over pictures alone.

    by_seed: mean difference of every seed. pictures: [seeds, pictures] of those seeds (one at
    least) whose answers are known.
    """
    known, count = pictures.shape
    by_picture = pictures.mean(0)
    normal = float(norm.ppf(0.975))
    variance = by_picture.var(ddof=1) / count
    on_pictures = normal * math.sqrt(variance)
    told = {"mean": 100 * float(np.mean(by_seed)), "on_pictures": 100 * on_pictures}
    if len(by_seed) < 2:
        return {**told, "half_width": None}
    of_seeds = interval(by_seed)["half_width"] or 0.0
    of_pictures = 0.0
    if known > 1:
        rest = pictures - pictures.mean(1)[:, None] - by_picture + pictures.mean()
        noise = float((rest**2).sum()) / ((known - 1) * (count - 1)) / (known * count)
        of_pictures = normal * math.sqrt(max(0.0, variance - noise))
    half_width = max(on_pictures, math.hypot(of_seeds, of_pictures))
    return {**told, "half_width": 100 * half_width}


def as_hex(right: Tensor) -> str:
    """Which pictures were named right, bool [n], eight to a byte."""
    return np.packbits(right.numpy()).tobytes().hex()


def from_hex(text: str, count: int) -> np.ndarray:
    """Inverse of `as_hex`, as numbers 0 and 1."""
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    return np.unpackbits(packed, count=count).astype(np.float64)


def compared(rows: Rows, before: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """One entry for each network and method: accuracy in percent, what is spent, and differences
    from the references in points, seed by seed.

    before: the entries that were told last, for rows whose answers are not there any more.
    """
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
                "seconds": mean_known([row["seconds"] for row in of_method]),
            }
            named = (network, method)
            told = next((e for e in before if (e["network"], e["method"]) == named), {})
            for reference, name in REFERENCES.items():
                pairs = _pairs(of_method, of_network, reference)
                if pairs and method != reference:
                    entry[name] = _difference(pairs, told.get(name))
            found.append(entry)
    return found


def _pairs(of_method: Rows, of_network: Rows, reference: str) -> Pairs:
    """Rows beside the reference's that began with the same network."""
    theirs = {_beginning(row): row for row in of_network if row["method"] == reference}
    return [(row, theirs[_beginning(row)]) for row in of_method if _beginning(row) in theirs]


def _beginning(row: Mapping[str, Any]) -> tuple[int, str | None]:
    """The network that a row began with: its seed and, of rows that have it, its hash."""
    return row["seed"], row.get("began_with")


def _difference(pairs: Pairs, told: Mapping[str, float | None] | None) -> dict[str, float | None]:
    """In points, with intervals as far as answers are known: right answers more than the reference
    has, -1, 0 or 1 for a picture."""
    by_seed = [own["accuracy"] - other["accuracy"] for own, other in pairs]
    known = [pair for pair in pairs if all(ANSWERS in row for row in pair)]
    if known:
        pictures = np.array([_answers(own) - _answers(other) for own, other in known])
        return paired(by_seed, pictures)
    figures = interval([100 * value for value in by_seed])
    if told is not None and math.isclose(told["mean"] or 0.0, figures["mean"] or 0.0, abs_tol=1e-4):
        return dict(told)
    return {"mean": figures["mean"], "on_pictures": None, "half_width": figures["half_width"]}


def _answers(row: Mapping[str, Any]) -> np.ndarray:
    return from_hex(row[ANSWERS], row["pictures"])


def table(figures: Rows) -> str:
    """Markdown; in brackets the half width on these very networks."""
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
    half, on_pictures = figure["half_width"], figure.get("on_pictures")
    said = f"{figure['mean']:{sign}.2f}" + ("" if half is None else f" ± {half:.2f}")
    return said + ("" if on_pictures is None else f" ({on_pictures:.2f})")
