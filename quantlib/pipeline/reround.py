"""`--refine`: round the chosen plan again, block by block, with the inputs its own earlier blocks produce.

The bank rounds every weight as if all others were exact. Here the chosen schemes are fixed, so each block can be given
the hidden states that the already re-rounded blocks before it really produce, and its targets moved towards what undoes
their error (`rounding.asymmetric`). One block is in memory at a time, in two copies of its hidden states: what the full-precision
model would see, and what the quantized one sees. Stacks of experts keep their bank entries.

The result is kept only if it is better: the plan is measured with and without it on windows held back from calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlib.calibration.stream import BlockStream
from quantlib.checkpoint.bank import LayerBank
from quantlib.checkpoint.provenance import digest
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize, pack
from quantlib.models.rows import LinearGroup
from quantlib.pipeline.calibrate import WorkDirStore, group_statistics
from quantlib.pipeline.dense import bank_weight
from quantlib.pipeline.run import Run
from quantlib.rounding import RoundingOptions, asymmetric_target, round_group

REROUND_VERSION = 1


@dataclass
class _Moments:
    """Of one group: token-weighted second moment of the quantized model's inputs, and the cross moment."""

    hessian: Tensor
    cross: Tensor


def reround_inputs(run: Run, schemes: Mapping[str, str]) -> str:
    """What re-rounded entries of this plan depend on: the `inputs_hash` of their bank keys."""
    return digest([run.rounding_hash, dict(schemes), run.recipe.strength, REROUND_VERSION])


def reround(run: Run, schemes: Mapping[str, str]) -> dict[str, str]:
    """Re-round a plan (weight -> scheme). Returns weight -> bank key for the weights that were re-rounded."""
    inputs = reround_inputs(run, schemes)
    names = [name for block in run.model_map.blocks for group in _groups(run, block) for name in group.members]
    keys = {name: LayerBank.key(name, schemes[name], inputs) for name in names}
    if all(run.bank.has(key) for key in keys.values()):
        return keys
    store = WorkDirStore(run, inputs)
    stream = BlockStream(run.source, run.model_map)
    _begin(run, stream, store, schemes)
    with run.stage("re-round", len(run.model_map.blocks)) as progress:
        for index, block in enumerate(run.model_map.blocks):
            if not store.has(f"quantized.{index + 1}"):
                _reround_block(run, stream, store, index, schemes, inputs)
            for kind in ("exact", "quantized"):
                store.drop(f"{kind}.{index}")
            progress.tick(block)
    for kind in ("exact", "quantized"):
        store.drop(f"{kind}.{len(run.model_map.blocks)}")
    return keys


def _begin(run: Run, stream: BlockStream, store: WorkDirStore, schemes: Mapping[str, str]) -> None:
    """Hidden states that enter the first block, exact and with the plan's embedding."""
    with torch.no_grad():
        exact = torch.cat([stream.embed(ids) for ids in run.windows])
        for group in run.model_map.groups_in(None):
            for name in group.members:
                stream.model.get_parameter(name).copy_(bank_weight(run, name, schemes[name]))
        quantized = torch.cat([stream.embed(ids) for ids in run.windows])
    resumed = any(store.has(f"quantized.{i}") for i in range(1, len(stream.block_names) + 1))
    if not resumed:
        store.save("exact.0", exact)
        store.save("quantized.0", quantized)


@torch.no_grad()
def _reround_block(
    run: Run, stream: BlockStream, store: WorkDirStore, index: int, schemes: Mapping[str, str], inputs: str
) -> None:
    """Re-round one block's groups and carry both hidden states through it."""
    exact, quantized = store.load(f"exact.{index}"), store.load(f"quantized.{index}")
    name = stream.block_names[index]
    with stream.block(index) as block:
        watch = _InputWatch(run, stream.model, name)
        outputs, moments = [], {}
        for window, (h, hq) in enumerate(zip(exact, quantized, strict=True)):
            with watch:
                outputs.append(stream.run(index, block, h[None]))
                clean = watch.take()
                stream.run(index, block, hq[None])
            watch.accumulate(moments, clean, watch.take(), window)
        weights = _round(run, name, moments, schemes, inputs)
        for weight_name, value in weights.items():
            stream.model.get_parameter(weight_name).copy_(value)
        for group in run.model_map.groups_in(name):
            for member in set(group.members) - set(weights):
                stream.model.get_parameter(member).copy_(bank_weight(run, member, schemes[member]))
        carried = torch.cat([stream.run(index, block, hq[None]) for hq in quantized])
    store.save(f"exact.{index + 1}", torch.cat(outputs))
    store.save(f"quantized.{index + 1}", carried)


class _InputWatch:
    """Captures the input of every dense linear group of a block, and accumulates weighted moments of pairs."""

    def __init__(self, run: Run, model: nn.Module, block: str) -> None:
        self.model = model
        self.groups = _groups(run, block)
        self.weights = {g.name: _token_weights(run, g) for g in self.groups}
        self.seen: dict[str, Tensor] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for group in self.groups:
            module = self.model.get_submodule(group.members[0].rpartition(".")[0])
            self.handles.append(module.register_forward_pre_hook(self._hook(group.name)))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.seen[name] = inputs[0].reshape(-1, inputs[0].shape[-1]).float()

        return hook

    def take(self) -> dict[str, Tensor]:
        """What was seen since the last call."""
        seen, self.seen = self.seen, {}
        return seen

    def accumulate(
        self, moments: dict[str, _Moments], clean: dict[str, Tensor], noisy: dict[str, Tensor], window: int
    ) -> None:
        """Add one window's x' x'^T and (x - x') x'^T, token-weighted as in calibration."""
        for group in self.groups:
            x, q = clean[group.name], noisy[group.name]
            weight = self.weights[group.name]
            weighted = q if weight is None else q * weight[window * len(q) : (window + 1) * len(q), None]
            if group.name not in moments:
                moments[group.name] = _Moments(torch.zeros(q.shape[1], q.shape[1]), torch.zeros(q.shape[1], q.shape[1]))
            moments[group.name].hessian.addmm_(weighted.T, q)
            moments[group.name].cross.addmm_((x - q).T, weighted)


def _round(
    run: Run, block: str, moments: Mapping[str, _Moments], schemes: Mapping[str, str], inputs: str
) -> dict[str, Tensor]:
    """Round every dense weight of a block to its scheme, keep it in the bank, return it dequantized."""
    options = RoundingOptions(run.recipe.damping, run.recipe.passes)
    out = {}
    with run.bank.batch() as batch:
        for group in _groups(run, block):
            found = moments[group.name]
            for name in group.members:
                original = run.source.read(name).float()
                target = asymmetric_target(
                    original, found.hessian, found.cross, run.recipe.strength, run.recipe.damping
                )
                layout = Scheme.parse(schemes[name]).segments(original.shape[1])
                (rounded,) = round_group({name: target}, found.hessian, [layout], options).values()
                batch.put(name, schemes[name], inputs, pack(rounded))
                out[name] = dequantize(rounded)
    return out


def _groups(run: Run, block: str) -> list[LinearGroup]:
    """The dense linear groups of a block."""
    return [group for group in run.model_map.groups_in(block) if group.kind != "experts"]


def _token_weights(run: Run, group: LinearGroup) -> Tensor | None:
    """Weights of all calibration tokens for a group, scaled to a mean of one; None without gradients."""
    (matrix,) = group_statistics(run, group.name).matrices
    if not matrix.has_gradients:
        return None
    return matrix.token_weight / matrix.token_weight.mean().clamp(min=1e-30)
