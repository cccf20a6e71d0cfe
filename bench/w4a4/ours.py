"""quantlib itself beside the baselines: the stages of `quantlib measure --scheme resq --predict
rows`, `search` and `apply`, on the same calibration windows, under ResQ's own true bits; of
Whisper, its parts put together in memory (`ours_speech.py`).

The solver may spend as many bits of weights, of activations and of the KV cache as ResQ's slices
and scales take in the same model, and not one more. Embeddings and head, which the baselines keep,
have 8 bits here: they belong to the checkpoint.

The result is the dense model in memory that rounds what the packed checkpoint would, as
`pipeline.dense` measures plans. What was measured is kept in the benchmarks' cache folder, some
3 GB for a model: a killed run goes on there, and so do the strict point and other seeds. Seeds are
of the mixing of directions, as the baselines' are of their rotations; what was calibrated, the
directions, and the plan, which is the first seed's, are the same for all. `forget` removes the
folder.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantlib.bench import assets
from quantlib.bench.packages import default_cache
from quantlib.bench.w4a4 import ours_speech
from quantlib.bench.w4a4.bits import Bits, count
from quantlib.bench.w4a4.limits import Limits, Shapes, code_bits, side_codes, with_codes
from quantlib.bench.w4a4.methods import Quantized, resq_slices
from quantlib.bench.w4a4.subjects import Language, Speech, Subject
from quantlib.checkpoint.surroundings import CacheSettings
from quantlib.errors import UsageError
from quantlib.formats.scheme import Scheme
from quantlib.formats.size import payload_bytes
from quantlib.kernels.kv_format import KvFormat
from quantlib.models import skeleton
from quantlib.models.rows import Weight
from quantlib.pipeline.caches import allocate as allocate_sides
from quantlib.pipeline.caches import measured_losses
from quantlib.pipeline.calibrate import calibrate
from quantlib.pipeline.dense import DensePlan
from quantlib.pipeline.inputs import cache_settings, round_cache
from quantlib.pipeline.measure import measure_plan
from quantlib.pipeline.opening import open_run
from quantlib.pipeline.plan import Budget, allocation_problem
from quantlib.pipeline.predict import predicted_table
from quantlib.pipeline.reround import reround
from quantlib.pipeline.rotate import rotated
from quantlib.pipeline.run import Run
from quantlib.recipe import Recipe, method_fields
from quantlib.search.activations import mean_bits, rounds_inputs
from quantlib.search.solve import solve
from quantlib.transforms.binding import wire

STRICT, STRICT_KV = 4.0, 4.5
"""Bits of the strict points: of weights and of activations, and of the KV cache with scales, whose
smallest format has codes of 4 bits and 0.5 for scales in heads of 64."""
OUTSIDE = "w8g64zs6"
"""Embeddings and head."""
TABLE_PASSES = 0
"""Of coordinate descent, for the table that a plan is found by: they take every candidate down by
nearly the same factor, and half of the table's time."""
FOLDERS = {
    "quantlib": "resq",
    "quantlib_refined": "resq",
    "quantlib_strict": "resq",
    "quantlib_codes": "resq",
    "quantlib_floats": "resq-fp",
}
"""Row -> what its work directory is named after: its candidates. Equal ones share what is measured
of a model."""


def quantlib(subject: Subject, seed: int) -> Quantized:
    """At no more bits than ResQ, scales and zero points counted."""
    return compressed(subject, seed, resq_limits(subject))


def quantlib_refined(subject: Subject, seed: int) -> Quantized:
    """The same plan, re-rounded block by block behind what was rounded before (`--refine`)."""
    return compressed(subject, seed, resq_limits(subject), refine=True)


def quantlib_strict(subject: Subject, seed: int) -> Quantized:
    """At 4.0 bits of weights and of activations, their scales and zero points counted."""
    return compressed(subject, seed, Limits(STRICT, STRICT, STRICT_KV))


def quantlib_codes(subject: Subject, seed: int) -> Quantized:
    """At 4.0 bits of weights, activations and cache as ResQ's 4.36 are counted, codes alone, and
    with scales at no more than ResQ's with scales."""
    return compressed(subject, seed, replace(resq_limits(subject), codes=STRICT))


def quantlib_floats(subject: Subject, seed: int) -> Quantized:
    """As `quantlib`, in MXFP4 and NVFP4 with MXFP6, MXFP8 and FP8 columns."""
    return compressed(subject, seed, resq_limits(subject), "resq-fp")


def work_folder(model: str, method: str) -> Path:
    """Where the pipeline keeps what it measured."""
    return default_cache() / "bench" / f"w4a4-{model}-{method}"


def forget(model: str, method: str) -> None:
    """Remove that, if it is there."""
    shutil.rmtree(work_folder(model, method), ignore_errors=True)


def resq_bits(subject: Subject) -> Bits:
    """What faithful ResQ takes in this model."""
    plans, heads = resq_slices(subject)
    return count(subject.original, subject.sites, plans, heads)


def resq_limits(subject: Subject) -> Limits:
    """The same as limits, scales counted."""
    allowed = resq_bits(subject)
    return Limits(allowed.weights, allowed.activations, allowed.kv)


def compressed(
    subject: Subject, seed: int, limits: Limits, method: str = "resq", refine: bool = False
) -> Quantized:
    """A model of a folder by the whole pipeline, within mean bits of its linears, their inputs, and
    its cache.

    Raises UsageError for what cannot be refined: a model that is no chain of blocks.
    """
    fields = method_fields(method, limits.codes or limits.activations)
    if isinstance(subject, Speech):
        if refine:
            raise UsageError(f"{subject.name} cannot be re-rounded: it is no chain of blocks")
        spoken = ours_speech.rounded(subject, seed, fields["schemes"], limits)
        told = {"predicted": {name: round(kl, 4) for name, kl in spoken.predicted.items()}}
        return Quantized(spoken.model, speech_bits(subject, spoken), told)
    if not isinstance(subject, Language) or subject.folder is None:
        raise ValueError(f"{subject.name} is no language model in a folder")
    # Embeddings and head are pinned: no other scheme of theirs has to be measured.
    inside = [name for name in fields["schemes"] if rounds_inputs([name])]
    fields |= {"schemes": (*inside, OUTSIDE), "kv": f"{limits.kv:g}"}
    recipe = Recipe.create(
        data=str(assets.wikipedia_text("calibration")),
        windows=len(subject.calibration),
        seqlen=subject.calibration.shape[1],
        probes=0,
        probe_windows=1,
        **fields,
    )
    work = work_folder(subject.name, method)
    started = time.monotonic()
    with open_run(subject.folder, work, recipe) as run:
        # The first window is the probes', of which there are none.
        run.all_windows = torch.cat([subject.calibration[:1], subject.calibration])
        first = rotated(run, 0)
        schemes, caches = allocate(first, limits), allocated_caches(first, limits)
        run = first if seed == 0 else rotated(run, seed)
        measure_plan(run, schemes)
        plan = DensePlan(run)
        round_cache(plan.model, run, caches)
        plan.load(schemes, reround(run, schemes, caches) if refine else None)
        notes = {
            "minutes": round((time.monotonic() - started) / 60, 1),
            "seconds": {name: round(spent) for name, spent in run.seconds.items()},
        }
        found = bits_of(run, schemes, [one.kv for one in caches.values()])
    return Quantized(plan.model, found, notes)


def allocate(run: Run, limits: Limits) -> dict[str, str]:
    """Weight -> scheme of least predicted loss within the limits."""
    calibrate(run)
    quick = replace(run, recipe=run.recipe.model_copy(update={"passes": TABLE_PASSES}))
    quick.all_windows = run.all_windows
    table = predicted_table(quick, "rows")
    outside = [weight.name for weight in run.model_map.weights_in(None)]
    pins = tuple(f"{name}={OUTSIDE}" for name in outside)
    problem = with_codes(allocation_problem(run.model_map, table, Budget(pins=pins)), _shapes(run))
    own = problem.fixed_bytes + sum(table.rows[name][OUTSIDE].bytes for name in outside)
    allowed = int(sum(w.parameters for w in _linears(run)) * limits.weights / 8)
    solution = solve(problem, own + allowed, limits.costs)
    return dict(problem.schemes(solution.picks))


def allocated_caches(run: Run, limits: Limits) -> dict[str, CacheSettings]:
    """Attention module -> the format of its cache, of least loss within the limits."""
    if limits.codes is None:
        return cache_settings(run)
    attentions = {a.module: a for a in wire(skeleton.build(run.source)).attentions}
    losses = limits.sides(measured_losses(run), _head_dim(run.source.config))
    found = allocate_sides(losses, attentions, limits.kv)
    return {name: CacheSettings(kv) for name, kv in found.items()}


def bits_of(run: Run, schemes: Mapping[str, str], caches: Sequence[KvFormat]) -> Bits:
    """The bits of a plan, counted as `bits.count` counts the baselines'."""
    return _counted(_shapes(run), schemes, caches, _head_dim(run.source.config))


def speech_bits(subject: Speech, found: ours_speech.Rounded) -> Bits:
    """The same of a model in memory."""
    head_dim = subject.wiring.attentions[0].head_dim
    shapes = ours_speech.shapes(subject)
    return _counted(shapes, found.schemes, list(found.caches.values()), head_dim)


def _counted(
    shapes: Shapes,
    schemes: Mapping[str, str],
    caches: Sequence[KvFormat],
    head_dim: int,
) -> Bits:
    total = stored = codes = acts = act_codes = 0.0
    for name, (rows, width) in shapes.items():
        scheme = Scheme.parse(schemes[name])
        total += rows * width
        stored += 8 * payload_bytes((rows, width), scheme.segments(width))
        acts += rows * width * mean_bits(scheme, width)
        own_codes, own_act_codes = code_bits(schemes[name], rows, width)
        codes, act_codes = codes + own_codes, act_codes + own_act_codes
    sides = [side for kv in caches for side in (kv.key, kv.value)]
    return Bits(
        stored / total,
        codes / total,
        acts / total,
        act_codes / total,
        8 * sum(side.bytes_per_position(head_dim) for side in sides) / (head_dim * len(sides)),
        sum(side_codes(str(side), head_dim) for side in sides) / (head_dim * len(sides)),
    )


def _head_dim(config: Mapping[str, Any]) -> int:
    heads = int(config["num_attention_heads"])
    return int(config.get("head_dim") or int(config["hidden_size"]) // heads)


def _shapes(run: Run) -> Shapes:
    return {w.name: (w.parameters // w.in_features, w.in_features) for w in _linears(run)}


def _linears(run: Run) -> list[Weight]:
    return [weight for weight in run.model_map.weights if weight.block is not None]
