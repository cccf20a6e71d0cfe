"""Before anything long starts: how much disk, memory and time a run will need, and whether the disk
has it.

Disk follows from shapes, nearly to the byte. Memory is the largest of what the stages hold at once,
counted from the arrays they make. Time follows from the multiply-adds of the passes and a rate that
is measured here, in a tenth of a second, on this machine: an order of magnitude and a little more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from quantlib.calibration.observe import SAMPLES_PER_WINDOW
from quantlib.calibration.passes import SAMPLED_HEAD_TOKENS
from quantlib.calibration.paths import find
from quantlib.calibration.paths.route import Routes
from quantlib.checkpoint.disk import require_free
from quantlib.formats.scheme import KEPT, Scheme
from quantlib.models.modelmap import ModelMap
from quantlib.models.rows import LinearGroup, Weight
from quantlib.pipeline import bytecount
from quantlib.pipeline.calibrate import calibrated_groups, statistics_keys
from quantlib.pipeline.measure import entry_key
from quantlib.pipeline.run import Run, candidates
from quantlib.pipeline.whole import is_whole
from quantlib.recipe import Recipe
from quantlib.rounding import RoundingOptions
from quantlib.search.budget import format_size

FLOAT_BYTES = 4
PROCESS_BYTES = 420_000_000
"""Resident memory of a process that has imported torch and transformers and done nothing."""


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    bank_bytes, statistics_bytes, hidden_bytes: on disk in the work directory; hidden states are
    removed after use. memory_bytes: peak resident, roughly. seconds: roughly (None when not timed).
    """

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


def for_recipe(model_map: ModelMap, recipe: Recipe, timed: bool = True) -> Estimate:
    """What a whole run of `recipe` on this model needs."""
    routes = find(model_map.model_type) if is_whole(model_map, recipe) else None
    statistics = sum(
        _streams(routes, group) * _statistics_bytes(model_map, recipe, group)
        for group in model_map.groups
    )
    return Estimate(
        _bank_bytes(model_map, recipe),
        statistics,
        _hidden_bytes(model_map, recipe),
        PROCESS_BYTES + FLOAT_BYTES * _numbers_in_memory(model_map, recipe),
        _operations(model_map, recipe) / _rate() if timed else None,
    )


def require_room(
    run: Run, found: Estimate, out: Path | None = None, budget: int | None = None
) -> None:
    """Raise CheckpointError when a disk cannot hold what is still to come: of the work directory,
    and, if it is to be written, of a checkpoint of at most `budget` bytes (None: any) in `out`."""
    needed = found.disk_bytes - _bytes_there(run, found)
    purpose = "the work directory (statistics, layer bank, hidden states)"
    if out is not None:
        largest = _largest_checkpoint(run)
        checkpoint = largest if budget is None else min(budget, largest)
        require_free(out, checkpoint, "the checkpoint")
        if _device(out) == _device(run.work.path):
            needed, purpose = needed + checkpoint, f"{purpose} together with the checkpoint"
    require_free(run.work.path, max(0, needed), purpose)


def _largest_checkpoint(run: Run) -> int:
    chosen = sum(
        max(bytecount.weight_bytes(weight, scheme) for scheme in run.candidates[weight.name])
        for weight in run.model_map.weights
    )
    return chosen + sum(row.nbytes for row in run.model_map.kept)


def _bytes_there(run: Run, found: Estimate) -> int:
    """Bytes of this run's own units in the work directory, and of hidden states it can do
    without."""
    keys = statistics_keys(run)
    keys += [
        entry_key(run, name, str(scheme))
        for name, schemes in run.candidates.items()
        for scheme in schemes
    ]
    there = [run.work.unit(key) for key in keys if run.work.has(key)]
    calibrated, wanted = calibrated_groups(run)
    spared = found.hidden_bytes if calibrated == wanted and not run.recipe.refine else 0
    return spared + sum(file.nbytes for unit in there for file in unit.files.values())


def _device(path: Path) -> int:
    """The file system that holds, or will hold, `path`."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return os.stat(path).st_dev


# -- disk ----------------------------------------------------------------------------------------


def _bank_bytes(model_map: ModelMap, recipe: Recipe) -> int:
    """Every weight in every candidate, and with `refine` the linears of one plan once more (in the
    largest candidate at most)."""
    total = 0
    schemes = candidates(model_map, recipe)
    for weight in model_map.weights:
        sizes = [
            bytecount.weight_bytes(weight, Scheme.parse(name))
            for name in schemes[weight.name]
            if name not in KEPT
        ]
        total += sum(sizes)
        if recipe.refine and _is_refined(model_map, recipe, weight):
            total += max(sizes)
    return total


def _is_refined(model_map: ModelMap, recipe: Recipe, weight: Weight) -> bool:
    """Whether `refine` rounds a weight again."""
    if is_whole(model_map, recipe):
        return weight.kind == "linear"
    return weight.block is not None and weight.kind != "experts"


def _statistics_bytes(model_map: ModelMap, recipe: Recipe, group: LinearGroup) -> int:
    """Of one group (see `calibration.statistics`)."""
    members = model_map.members(group)
    width, tokens = members[0].in_features, recipe.windows * recipe.seqlen
    if group.kind in ("embedding", "head"):
        vocabulary = members[0].out_features
        samples = recipe.windows * min(SAMPLED_HEAD_TOKENS, recipe.seqlen)
        return FLOAT_BYTES * (width**2 + 2 * vocabulary + (samples + 1) * width)
    outputs = sum(weight.out_features for weight in members) if recipe.gradients else 0
    samples = recipe.windows * min(SAMPLES_PER_WINDOW, recipe.seqlen)
    matrix = width**2 + outputs + samples * (width + outputs)
    return FLOAT_BYTES * (members[0].experts * matrix + (tokens if recipe.gradients else 0))


def _streams(routes: Routes | None, group: LinearGroup) -> int:
    """How many streams leave statistics of a group: those that run its component. None: the model
    is calibrated block by block."""
    if routes is None:
        return 1
    return sum(group.component in route.reaches for route in routes.routes)


def _hidden_bytes(model_map: ModelMap, recipe: Recipe) -> int:
    """Calibration keeps the input of every block and of the head, and two gradients; re-rounding
    keeps two states twice. A model that is run as a whole leaves none."""
    if is_whole(model_map, recipe):
        return 0
    states = len(model_map.blocks) + 1 + 2 * recipe.gradients
    return FLOAT_BYTES * _hidden_numbers(model_map, recipe) * max(states, 4 * recipe.refine)


def _hidden_numbers(model_map: ModelMap, recipe: Recipe) -> int:
    """Numbers in the hidden states of all calibration windows, as wide as the embedding."""
    width = next((w.in_features for w in model_map.weights if w.kind == "embedding"), 0)
    return recipe.windows * recipe.seqlen * width


# -- memory --------------------------------------------------------------------------------------


def _numbers_in_memory(model_map: ModelMap, recipe: Recipe) -> int:
    """The most float32 numbers that one stage holds."""
    if is_whole(model_map, recipe):
        return _numbers_of_whole(model_map, recipe)
    outside = _parameters(model_map.weights_in(None))
    block = max((_parameters(model_map.weights_in(name)) for name in model_map.blocks), default=0)
    moments = max(
        (
            sum(_moments(model_map, group) for group in model_map.groups_in(name))
            for name in model_map.blocks
        ),
        default=0,
    )
    hidden = _hidden_numbers(model_map, recipe)
    vocabulary = max((w.out_features for w in model_map.weights_in(None)), default=0)
    # logits of a window, their softmax, two gradients, and the copies between them
    logits = 6 * recipe.seqlen * vocabulary
    calibration = outside + max(2 * block + 2 * moments + 4 * hidden, logits + 2 * hidden)
    rounding = max(_rounding(model_map, recipe, group) for group in model_map.groups)
    # a block's weights: in the module, exact, rounded, as targets, and twice as moments of what
    # they lack; learning has their place, offset and gradient too. Hidden states: two that enter,
    # two that leave, and the goals of at most four groups.
    weights = (6 + 4 * (recipe.learning > 0)) * block
    refinement = outside + weights + 2 * moments + 8 * hidden + rounding
    measuring = model_map.parameters + logits
    needed = [calibration, rounding]
    needed += [measuring] if recipe.probes or recipe.swaps or recipe.refine else []
    needed += [refinement] if recipe.refine else []
    return max(needed)


def _numbers_of_whole(model_map: ModelMap, recipe: Recipe) -> int:
    """The model and all its second moments at once, and what one sample leaves for its gradients:
    at most about as much as the model has parameters."""
    moments = sum(_moments(model_map, group) for group in model_map.groups)
    vocabulary = max(
        (w.out_features for w in model_map.weights if w.kind == "embedding"), default=0
    )
    calibration = 2 * model_map.parameters + moments + 6 * recipe.seqlen * vocabulary
    rounding = max(_rounding(model_map, recipe, group) for group in model_map.groups)
    refinement = _numbers_of_refining(model_map, recipe) if recipe.refine else 0
    return max(calibration, rounding, refinement)


def _numbers_of_refining(model_map: ModelMap, recipe: Recipe) -> int:
    """Both models; of one unit its weights (exact, rounded, as targets, and twice what they lack),
    the moments of one group, twice, what enters it in both models, and, of the exact one, what its
    groups are to reproduce, in every record, of the recipe's length: what encoders read may be
    longer."""
    units: dict[str, list[LinearGroup]] = {}
    for group in model_map.groups:
        if group.kind == "linear":
            units.setdefault(group.block or group.name, []).append(group)
    if not units:
        return 0
    needed = []
    for groups in units.values():
        weights = sum(_parameters(model_map.members(group)) for group in groups)
        one = max(
            2 * _moments(model_map, group) + _rounding(model_map, recipe, group) for group in groups
        )
        width = min(model_map.weight(group.members[0]).in_features for group in groups)
        states = (3 + len(groups)) * recipe.windows * recipe.seqlen * width
        needed.append(5 * weights + one + states)
    return 2 * model_map.parameters + max(needed)


def _parameters(weights: tuple[Weight, ...]) -> int:
    return sum(weight.parameters for weight in weights)


def _moments(model_map: ModelMap, group: LinearGroup) -> int:
    first = model_map.weight(group.members[0])
    return first.experts * first.in_features**2


def _rounding(model_map: ModelMap, recipe: Recipe, group: LinearGroup) -> int:
    """Numbers held while one group is rounded: its weights, the stacked rows of one step (target,
    result, gradient and three temporaries), and the codes (a byte each) of all candidates."""
    members = model_map.members(group)
    width, own = members[0].in_features, _parameters(members)
    count = sum(name not in KEPT for name in recipe.candidates(group.kind))
    rows = min(RoundingOptions().rows, own // width * count)
    return 3 * own + 6 * rows * width + own * count // 2 + 3 * width**2


# -- time ----------------------------------------------------------------------------------------


def _operations(model_map: ModelMap, recipe: Recipe) -> float:
    """Multiply-adds of finding bases, calibration, rounding, probes and re-rounding."""
    tokens = recipe.windows * recipe.seqlen
    forward = tokens * _parameters(model_map.weights)
    moments = tokens * sum(_moments(model_map, group) for group in model_map.groups)
    sweeps = 1.5 + 2 * recipe.passes
    efforts = [(w.kind, w.parameters * w.in_features * (sweeps + 1)) for w in model_map.weights]
    layouts = {kind: _layouts(recipe.candidates(kind)) for kind, _ in efforts}
    measuring = sum(layouts[kind] * effort for kind, effort in efforts)
    rounding = sum(effort for _, effort in efforts)
    trials = recipe.probes + recipe.swaps + 2 * recipe.refine
    probes = recipe.probe_windows * recipe.seqlen * trials * _parameters(model_map.weights)
    learning = 3 * recipe.learning * recipe.seqlen * _parameters(model_map.weights)
    refine = (6 * forward + moments + rounding + learning) if recipe.refine else 0
    if recipe.refine and is_whole(model_map, recipe):
        linears = sum(w.parameters for w in model_map.weights if w.kind == "linear")
        refine = _passes_of_refining(model_map) * tokens * linears + moments + rounding
    calibration = 4 * forward + moments
    bases = 0 if recipe.rotation == "none" else forward + 2 * moments
    return bases + calibration + measuring + probes + refine


def _passes_of_refining(model_map: ModelMap) -> float:
    """Passes of the whole model that re-rounding one of several parts takes.

    One to see what runs; two models, half of the way in the mean, to the first block of every stack
    and to every linear outside; then each unit on its own: once exact and once rounded, and for
    each of its groups three quarters of it, and judged on a fifth of the records.
    """
    linears = [group for group in model_map.groups if group.kind == "linear"]
    alone = sum(group.block is None for group in linears)
    units = alone + len({group.block for group in linears if group.block is not None})
    stacks = len(model_map.stacks) + bool(model_map.blocks)
    return 3 + stacks + alone + 0.95 * len(linears) / max(1, units)


def _layouts(schemes: Iterable[str]) -> int:
    """How many times a weight is rounded: candidates may differ in their activations alone, and
    what factors leave is rounded for itself."""
    columns = 4096  # any number that every share of wide columns divides
    parsed = [Scheme.parse(name) for name in schemes if name not in KEPT]
    alike = {scheme.segments(columns) for scheme in parsed if not scheme.is_composite}
    return len(alike) + sum(scheme.is_composite for scheme in parsed)


@cache
def _rate() -> float:
    """Multiply-adds a second of float32 matrix products here, less what is lost around them;
    measured once in a process."""
    a, b = torch.ones(1024, 512), torch.ones(512, 512)
    a @ b
    started = time.perf_counter()
    repeats = 0
    while time.perf_counter() - started < 0.1:
        a @ b
        repeats += 1
    return 0.4 * repeats * 1024 * 512 * 512 / (time.perf_counter() - started)


def _rough(seconds: float) -> str:
    """One or two digits: it is an estimate."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
