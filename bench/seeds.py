"""What benchmarks do with several seeds: a folder for each, means, and how sure these are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and the half width of its 95 % interval by Student's t (None for a single value)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {"mean": mean, "half_width": None}
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return {
        "mean": mean,
        "half_width": float(student.ppf(0.975, count - 1)) * deviation / math.sqrt(count),
    }


def with_values(values: Sequence[float]) -> dict[str, Any]:
    """The same, and each seed's value."""
    return {**interval(values), "values": [*values]}


def mean_known(seconds: Sequence[float | None]) -> float | None:
    """The mean of those that are known; None without any."""
    known = [value for value in seconds if value is not None]
    return interval(known)["mean"] if known else None


def work_of(work: Path, seed: int) -> Path:
    """The folder of a seed in a work directory, made if need be: for 0 that directory itself, which
    was all there was before there were seeds."""
    place = work / f"seed-{seed}" if seed else work
    place.mkdir(parents=True, exist_ok=True)
    return place
