"""`--refine`: round the chosen plan again, block by block, with the inputs its own earlier blocks
produce.

The bank rounds every weight as if all others were exact. Here the chosen schemes are fixed, so each
block can be given the hidden states that the already re-rounded blocks before it really produce,
and its targets moved towards what undoes their error (`rounding.asymmetric`). One block is in
memory at a time, with two copies of its hidden states: what the full-precision model would see, and
what the quantized one sees. Stacks of experts keep their bank entries.

The result is kept only if it is better: the plan is measured with and without it on windows held
back from calibration (`apply.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

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
"""Raise when re-rounding changes: plans are then re-rounded again."""


@dataclass
class _Moments:
    """Of one group: token-weighted second moment of the quantized model's inputs, and the cross
    moment with what the full-precision model would have seen, both float32 [K, K]."""

    hessian: Tensor
    cross: Tensor


def reround_inputs(run: Run, schemes: Mapping[str, str]) -> str:
    """What re-rounded entries of this plan depend on: the `inputs_hash` of their bank keys."""
    return digest([run.rounding_hash, dict(schemes), run.recipe.strength, REROUND_VERSION])


def reround(run: Run, schemes: Mapping[str, str]) -> dict[str, str]:
    """Re-round a plan (weight -> scheme). Returns weight -> bank key of what was re-rounded."""
    inputs = reround_inputs(run, schemes)
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
        _reround_blocks(run, store, schemes, inputs, keys)
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
) -> None:
    """Re-round from the last block whose inputs are stored and before which nothing is missing."""
    blocks = run.model_map.blocks
    stream = BlockStream(run.source, run.model_map)
    entered = _enter(run, stream, schemes)
    stored = [i for i in range(1, len(blocks)) if store.has(f"block.{i}")]
    start = max((i for i in stored if all(_has(run, k) for k in keys[:i])), default=0)
    if start == 0:
        store.save_all("block.0", entered)
    with run.stage("re-round", len(blocks)) as progress:
        for index, block in enumerate(blocks):
            if index >= start:
                left = _reround_block(run, stream, store, index, schemes, inputs)
                if index + 1 < len(blocks):
                    store.save_all(f"block.{index + 1}", left)
                store.drop(f"block.{index}")
            progress.tick(block)


@torch.no_grad()
def _enter(run: Run, stream: BlockStream, schemes: Mapping[str, str]) -> dict[str, Tensor]:
    """Hidden states [windows, T, D] that enter the first block, `exact` and `quantized` (with the
    plan's embedding, which is left in the stream)."""
    exact = torch.cat([stream.embed(ids) for ids in run.windows])
    for group in run.model_map.groups_in(None):
        for name in group.members:
            stream.model.get_parameter(name).copy_(bank_weight(run, name, schemes[name]))
    return {"exact": exact, "quantized": torch.cat([stream.embed(ids) for ids in run.windows])}


@torch.no_grad()
def _reround_block(
    run: Run,
    stream: BlockStream,
    store: WorkDirStore,
    index: int,
    schemes: Mapping[str, str],
    inputs: str,
) -> dict[str, Tensor]:
    """Re-round one block's groups and carry both hidden states through it; returns them."""
    entering = store.load_all(f"block.{index}")
    exact, quantized = entering["exact"], entering["quantized"]
    name = stream.block_names[index]
    with stream.block(index) as block:
        outputs: list[Tensor] = []
        moments: dict[str, _Moments] = {}
        with _InputWatch(run, stream.model, name) as watch:
            for window, (h, hq) in enumerate(zip(exact, quantized, strict=True)):
                outputs.append(stream.run(index, block, h[None]))
                clean = watch.take()
                stream.run(index, block, hq[None])
                watch.accumulate(moments, clean, watch.take(), window)
        weights = _round(run, name, moments, schemes, inputs)
        for group in run.model_map.groups_in(name):
            for member in group.members:
                value = weights.get(member)
                if value is None:
                    value = bank_weight(run, member, schemes[member])
                stream.model.get_parameter(member).copy_(value)
        carried = [stream.run(index, block, hq[None]) for hq in quantized]
    return {"exact": torch.cat(outputs), "quantized": torch.cat(carried)}


class _InputWatch:
    """Captures the input of every dense linear group of a block, for as long as it is entered."""

    def __init__(self, run: Run, model: nn.Module, block: str) -> None:
        self.model = model
        self.groups = _groups(run, block)
        self.weights = {group.name: _token_weights(run, group) for group in self.groups}
        self.seen: dict[str, Tensor] = {}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _InputWatch:
        for group in self.groups:
            module = self.model.get_submodule(group.members[0].rpartition(".")[0])
            self.handles.append(module.register_forward_pre_hook(self._hook(group.name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.seen[name] = inputs[0].reshape(-1, inputs[0].shape[-1]).float()

        return hook

    def take(self) -> dict[str, Tensor]:
        """Group -> input [T, K], of what ran since the last call."""
        seen, self.seen = self.seen, {}
        return seen

    def accumulate(
        self,
        moments: dict[str, _Moments],
        clean: dict[str, Tensor],
        noisy: dict[str, Tensor],
        window: int,
    ) -> None:
        """Add one window's x' x'^T and (x - x') x'^T, token-weighted as in calibration."""
        for group in self.groups:
            x, q = clean[group.name], noisy[group.name]
            tokens, width = q.shape
            weight = self.weights[group.name]
            weighted = q
            if weight is not None:
                weighted = q * weight[window * tokens : (window + 1) * tokens, None]
            if group.name not in moments:
                moments[group.name] = _Moments(torch.zeros(width, width), torch.zeros(width, width))
            moments[group.name].hessian.addmm_(weighted.T, q)
            moments[group.name].cross.addmm_((x - q).T, weighted)


def _round(
    run: Run, block: str, moments: Mapping[str, _Moments], schemes: Mapping[str, str], inputs: str
) -> dict[str, Tensor]:
    """Round every dense weight of a block to its scheme, keep it in the bank, return it
    dequantized."""
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
    """Weights of all calibration tokens for a group, scaled to a mean of one; None without
    gradients."""
    (matrix,) = group_statistics(run, group.name).matrices
    if not matrix.has_gradients:
        return None
    return matrix.token_weight / matrix.token_weight.mean().clamp(min=1e-30)
