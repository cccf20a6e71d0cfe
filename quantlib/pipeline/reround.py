"""`--refine`, the last rounding of a plan: block by block, with the inputs its own earlier, already
rounded blocks produce.

The bank rounds every weight as if all others were exact, and their inputs too. Here schemes are
fixed, so each block is given the hidden states that the quantized model really has there; inputs of
linears are rounded as the plan says, keys and values as the KV format does. Its groups are taken in
the order in which they run. Where inputs are rounded, the group's clip factors are chosen
(`rounding.clips`). Its target is moved towards what makes good what the stream lacks behind it
(`rounding.asymmetric`), and it is rounded by GPTQ and coordinate descent on the inputs it will
really have. Either is kept if the block then loses less than before on windows that were not
fitted; the bank's entry stays otherwise. At the end all codes and scales of the block can be
learned together from there (`rounding.learned`). One stage for weights alone, and for weights and
activations.

One block is in memory at a time, with the hidden states of both models. Stacks of experts keep
their bank entries. Whether the whole ships is decided by the model's true KL (`apply.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlib.calibration.stream import BlockStream
from quantlib.checkpoint.bank import LayerBank
from quantlib.checkpoint.provenance import digest
from quantlib.checkpoint.surroundings import CacheSettings
from quantlib.formats.composite import pack_stored
from quantlib.formats.scheme import Scheme
from quantlib.models.rows import LinearGroup
from quantlib.pipeline.block_rounding import BlockRounding
from quantlib.pipeline.calibrate import WorkDirStore
from quantlib.pipeline.dense import bank_weight
from quantlib.pipeline.inputs import cache_settings, clip_names, round_cache
from quantlib.pipeline.planned_block import Inputs, PlannedBlock, Windows
from quantlib.pipeline.run import Run
from quantlib.transforms.attention import AttentionState

REROUND_VERSION = 3
"""Raise when re-rounding changes: plans are then re-rounded again."""


def reround_inputs(
    run: Run, schemes: Mapping[str, str], caches: Mapping[str, CacheSettings] | None = None
) -> str:
    """What re-rounded entries of this plan depend on: the `inputs_hash` of their bank keys."""
    recipe = run.recipe
    how: list[Any] = [recipe.kv, recipe.strength, recipe.learning, REROUND_VERSION]
    if caches is not None:
        how.append({name: str(settings.kv) for name, settings in caches.items()})
    return digest([run.rounding_hash, dict(schemes), how])


def reround(
    run: Run, schemes: Mapping[str, str], caches: Mapping[str, CacheSettings] | None = None
) -> dict[str, str]:
    """Re-round a plan (weight -> scheme). Returns weight -> bank key of what was re-rounded.

    caches: attention module -> how its keys and values are rounded; None: the run's own.
    """
    inputs = reround_inputs(run, schemes, caches)
    keys = [
        {
            name: LayerBank.key(name, schemes[name], inputs)
            for group in _groups(run, block)
            for name in group.members
        }
        for block in run.model_map.blocks
    ]
    store = WorkDirStore(run, inputs)
    if not all(_has(run, block_keys) for block_keys in keys):
        given = cache_settings(run) if caches is None else caches
        _reround_blocks(run, store, schemes, inputs, keys, given)
    store.clear(others=True)
    return {name: key for block_keys in keys for name, key in block_keys.items()}


def _has(run: Run, keys: Mapping[str, str]) -> bool:
    return all(run.bank.has(key) for key in keys.values())


def _reround_blocks(
    run: Run,
    store: WorkDirStore,
    schemes: Mapping[str, str],
    inputs: str,
    keys: Sequence[Mapping[str, str]],
    given: Mapping[str, CacheSettings],
) -> None:
    """Re-round from the last block whose inputs are stored and before which nothing is missing."""
    blocks = run.model_map.blocks
    stream = BlockStream(run.source, run.model_map)
    caches = round_cache(stream.model, run, given)
    entered = _enter(run, stream, schemes)
    stored = [i for i in range(1, len(blocks)) if store.has(f"block.{i}")]
    start = max((i for i in stored if all(_has(run, k) for k in keys[:i])), default=0)
    if start == 0:
        store.save_all("block.0", entered)
    with run.stage("re-round", len(blocks)) as progress:
        for index, block in enumerate(blocks):
            said = block
            if index >= start:
                left, outcome = _reround_block(run, stream, store, index, schemes, inputs, caches)
                if index + 1 < len(blocks):
                    store.save_all(f"block.{index + 1}", left)
                store.drop(f"block.{index}")
                said = f"{block}: {outcome}"
            progress.tick(said)


@torch.no_grad()
def _enter(run: Run, stream: BlockStream, schemes: Mapping[str, str]) -> dict[str, Tensor]:
    """Hidden states [windows, T, D] that enter the first block, `exact` and `quantized` (with the
    plan's embedding, which is left in the stream)."""
    exact = torch.cat([stream.embed(ids) for ids in run.windows])
    for group in run.model_map.groups_in(None):
        for name in group.members:
            stream.model.get_parameter(name).copy_(bank_weight(run, name, schemes[name]))
    return {"exact": exact, "quantized": torch.cat([stream.embed(ids) for ids in run.windows])}


@dataclass(frozen=True)
class Outcome:
    """Losses of a block on the windows that judge: with bank entries, and with what was kept; the
    groups that were re-rounded, and the step that learning stopped at."""

    before: float
    after: float
    groups: tuple[str, ...]
    step: int
    seconds: float

    def __str__(self) -> str:
        kept = ", ".join(self.groups) or "nothing"
        learned = f", learned {self.step} steps" if self.step else ""
        return (
            f"{self.before:.4g} -> {self.after:.4g} in {self.seconds:.0f} s "
            f"(re-rounded {kept}{learned})"
        )


def _reround_block(
    run: Run,
    stream: BlockStream,
    store: WorkDirStore,
    index: int,
    schemes: Mapping[str, str],
    inputs: str,
    caches: Mapping[str, AttentionState],
) -> tuple[dict[str, Tensor], Outcome]:
    """Re-round one block, keep it in the bank, and carry both hidden states through it."""
    started = time.monotonic()
    entering = store.load_all(f"block.{index}")
    name = stream.block_names[index]
    groups = _groups(run, name)
    with stream.block(index) as module:
        for group in run.model_map.groups_in(name):
            if group.kind == "experts":
                for member in group.members:
                    value = bank_weight(run, member, schemes[member])
                    stream.model.get_parameter(member).copy_(value)
        block = PlannedBlock(
            stream,
            index,
            module,
            groups,
            {member: _inputs(run, member, schemes[member]) for g in groups for member in g.members},
            entering["exact"],
            entering["quantized"],
            Windows.split(len(run.windows)),
            {path: state for path, state in caches.items() if path.startswith(f"{name}.")},
        )
        work = BlockRounding(run, block, schemes)
        kept = work.finish()
        left = {"exact": block.outputs, "quantized": block.carry(work.dense(kept))}
    outcome = Outcome(*work.losses, tuple(work.kept), work.step, time.monotonic() - started)
    extra = {"before": outcome.before, "after": outcome.after}
    with run.bank.batch() as batch:
        for member, weight in kept.items():
            kept_beside = extra | clip_names(work.clips(member))
            batch.put(
                member, schemes[member], inputs, pack_stored(weight), kept_beside, outcome.seconds
            )
    return left, outcome


def _inputs(run: Run, name: str, scheme: str) -> Inputs:
    """How the plan rounds the inputs of a weight."""
    width = run.model_map.weight(name).in_features
    return Scheme.parse(scheme).activations(width), run.orders.get(name)


def _groups(run: Run, block: str) -> list[LinearGroup]:
    """The dense linear groups of a block."""
    return [group for group in run.model_map.groups_in(block) if group.kind != "experts"]
