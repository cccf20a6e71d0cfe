"""Before anything long starts: how much disk, memory and time a run will need, and whether the disk has it.

Disk and memory follow from shapes. Time follows from the multiply-adds of the passes and a rate that is measured here, in a tenth
of a second, on this machine: an estimate within a factor of two, and said as such.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from quantlib.checkpoint.disk import require_free
from quantlib.formats.scheme import Scheme
from quantlib.models.modelmap import ModelMap
from quantlib.pipeline import bytecount
from quantlib.recipe import Recipe
from quantlib.search.budget import format_size

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """bank_bytes, statistics_bytes, hidden_bytes: on disk in the work directory (hidden states are removed after use).
    memory_bytes: peak resident, roughly; seconds: roughly (None when not timed)."""

    bank_bytes: int
    statistics_bytes: int
    hidden_bytes: int
    memory_bytes: int
    seconds: float | None

    @property
    def disk_bytes(self) -> int:
        return self.bank_bytes + self.statistics_bytes + self.hidden_bytes

    def __str__(self) -> str:
        """`about 4 min, 1.2 GB of memory and 840 MB of disk`."""
        memory, disk = format_size(self.memory_bytes), format_size(self.disk_bytes)
        rest = f"{memory} of memory and {disk} of disk"
        return rest if self.seconds is None else f"about {_rough(self.seconds)}, {rest}"


def estimate(model_map: ModelMap, recipe: Recipe, hidden_size: int, timed: bool = True) -> Estimate:
    """What a run of `recipe` on this model needs. `hidden_size`: width D of the residual stream."""
    schemes = [Scheme.parse(name) for name in recipe.schemes]
    bank = sum(
        bytecount.weight_bytes(weight, scheme) for weight in model_map.weights for scheme in schemes
    )
    inputs = {group.name: model_map.weight(group.members[0]) for group in model_map.groups}
    statistics = sum(w.experts * w.in_features**2 * FLOAT_BYTES for w in inputs.values())
    tokens = recipe.windows * recipe.seqlen
    hidden = (len(model_map.blocks) + 2) * tokens * hidden_size * FLOAT_BYTES
    seconds = _operations(model_map, recipe, len(schemes)) / _rate() if timed else None
    return Estimate(
        bank,
        statistics,
        hidden,
        _memory(model_map, recipe, len(schemes), tokens * hidden_size),
        seconds,
    )


def for_recipe(model_map: ModelMap, recipe: Recipe) -> Estimate:
    """`estimate` of a whole run. The first weight is the embedding, as wide as the residual stream."""
    return estimate(model_map, recipe, int(model_map.weights[0].in_features))


def require_room(work: Path, found: Estimate) -> None:
    """Raise CheckpointError when the disk cannot hold what the work directory still has to get."""
    existing = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    purpose = "the work directory (statistics, layer bank, hidden states)"
    require_free(work, max(0, found.disk_bytes - existing), purpose)


def _memory(model_map: ModelMap, recipe: Recipe, schemes: int, hidden_numbers: int) -> int:
    """Parameters outside blocks, one block, two sets of hidden states, and the stacked rows of one rounding; or the
    dense model when probes are measured in it."""
    outside = sum(w.parameters for w in model_map.weights if w.block is None)
    blocks = [sum(w.parameters for w in model_map.weights_in(b)) for b in model_map.blocks] or [0]
    stacked = 32768 * max((w.in_features for w in model_map.weights), default=0) * 6
    streaming = outside + max(blocks) * 2 + 2 * hidden_numbers + stacked
    dense = model_map.parameters if recipe.probes or recipe.refine else 0
    return FLOAT_BYTES * max(streaming, dense + stacked // 2)


def _operations(model_map: ModelMap, recipe: Recipe, schemes: int) -> float:
    """Multiply-adds of calibration, rounding, probes and re-rounding."""
    tokens = recipe.windows * recipe.seqlen
    matrices = [(w.parameters, w.in_features, w.out_features) for w in model_map.weights]
    forward = tokens * sum(parameters for parameters, _, _ in matrices)
    moments = tokens * sum(
        w.in_features**2 for w in (model_map.weight(g.members[0]) for g in model_map.groups)
    )
    sweeps = 1.5 + 2 * recipe.passes
    rounding = sum(parameters * k * (sweeps + 1) for parameters, k, _ in matrices)
    probe_tokens = recipe.probe_windows * recipe.seqlen * (recipe.probes + 2 * recipe.refine)
    probes = probe_tokens * sum(parameters for parameters, _, _ in matrices)
    refine = (3 * forward + 2 * moments + rounding) if recipe.refine else 0
    return 4 * forward + moments + schemes * rounding + probes + refine


def _rough(seconds: float) -> str:
    """One or two digits: it is an estimate."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _rate() -> float:
    """Multiply-adds a second of float32 matrix products here, halved for everything around them."""
    a, b = torch.randn(1024, 512), torch.randn(512, 512)
    a @ b
    started = time.perf_counter()
    repeats = 0
    while time.perf_counter() - started < 0.1:
        a @ b
        repeats += 1
    return 0.4 * repeats * 1024 * 512 * 512 / (time.perf_counter() - started)
