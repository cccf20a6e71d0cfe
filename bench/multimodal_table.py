"""What the rows of `bench.multimodal` say together: methods side by side, seed by seed and on
average. Pure functions of the rows as they are kept (JSON)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import hypot
from statistics import fmean
from typing import Any

from quantlib.bench.comparisons import LANGUAGE_ONLY, WHOLE

FROM_THE_REFERENCE = ("KL per", "relative error to the reference's", "PSNR to the reference's")
"""How the names of figures begin that say how far a model is from the one in full precision: one
for each task. Others, such as answers that are right, are the more noisy the fewer records there
are, and a compressed model may have them better by chance."""
RIGHT = ("answers right", "all of it right", "digit right", "color right", "word error rate")
"""Figures that are shares, of which a point is a hundredth."""
SURE = 2.0
"""Standard errors of a difference, beyond which it is not one of the test records alone."""


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


def by_task(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every budget and task, how far `whole` and `language model only` are from the model in
    full precision, and how many seeds found `whole` closer, as close, or farther, and of the
    latter, how many by more than SURE standard errors.

    Where no allocation of the language model alone fits, its value and these counts are None. Seeds
    count that both were measured with.
    """
    found = []
    for entry in compared(rows):
        methods = {row["method"] for row in rows if row["bits"] == entry["bits"]}
        starts = any(entry["figure"].startswith(name) for name in FROM_THE_REFERENCE)
        if not starts or not methods >= {WHOLE.name, LANGUAGE_ONLY.name}:
            continue
        pairs = _pairs(rows, entry)
        closer = [_is_better(*_numbers(pair), entry["better"]) for pair in pairs]
        surely = [pair for pair, won in zip(pairs, closer, strict=True) if won is False]
        known = entry["mean"][LANGUAGE_ONLY.name] is not None
        found.append(
            {
                **{name: entry[name] for name in ("bits", "task", "figure", "better")},
                "whole": entry["mean"][WHOLE.name],
                "language model only": entry["mean"][LANGUAGE_ONLY.name],
                "closer": closer.count(True) if known else None,
                "as close": closer.count(None) if known else None,
                "farther": closer.count(False) if known else None,
                "surely farther": sum(map(_apart, surely)) if known else None,
            }
        )
    return found


Estimated = dict[str, Any]
"""The value of a figure and, where it is known, its standard error, as JSON."""


def _pairs(
    rows: Sequence[dict[str, Any]], entry: dict[str, Any]
) -> list[tuple[Estimated, Estimated]]:
    """A figure of `whole` and of `language model only`, for every seed that both have."""
    pairs = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = [r for r in rows if (r["bits"], r["seed"]) == (entry["bits"], seed)]
        mine = [row for row in mine if "figures" in row]
        both = [
            [
                figure["model"]
                for row in mine
                if row["method"] == method
                for figure in row["figures"]
                if (figure["task"], figure["name"]) == (entry["task"], entry["figure"])
            ]
            for method in (WHOLE.name, LANGUAGE_ONLY.name)
        ]
        if all(both):
            pairs.append((both[0][0], both[1][0]))
    return pairs


def _numbers(pair: tuple[Estimated, Estimated]) -> tuple[float, float]:
    return float(pair[0]["value"]), float(pair[1]["value"])


def _apart(pair: tuple[Estimated, Estimated]) -> bool:
    """Whether two figures differ by more than SURE standard errors of their difference, taken as if
    they were of different records: of the same ones, it is smaller rather than larger."""
    mine, theirs = _numbers(pair)
    error = hypot(*(one.get("standard_error") or 0.0 for one in pair))
    return abs(mine - theirs) > SURE * error


def points_lost(comparison: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of `whole`, for every budget and share: how many points it is worse than full precision
    (negative: better), in the mean over seeds."""
    found = []
    for entry in comparison:
        before, now = entry["reference"], entry["mean"].get(WHOLE.name)
        if entry["figure"] in RIGHT and before is not None and now is not None:
            change = before - now if entry["better"] == "higher" else now - before
            named = {name: entry[name] for name in ("bits", "task", "figure")}
            found.append({**named, "points": 100 * change})
    return found


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
