"""A dense model that rounds what a packed one would: inputs of linears, keys and values.

The packed modules take their inputs in the order their columns are packed in, round them segment by
segment, and multiply. Here weights stay dense and in the model's order, so an input is put in
order, rounded, and put back. Kernels sum in another order; the numbers they multiply are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlib.checkpoint.surroundings import CacheSettings
from quantlib.errors import ModelError, UsageError
from quantlib.formats.activation import ActivationSegment, fake_quantize, with_clips
from quantlib.formats.scheme import Scheme
from quantlib.kernels.cpu.forms import why_not
from quantlib.kernels.kv_format import KvFormat
from quantlib.models import skeleton
from quantlib.models.modelmap import ModelMap
from quantlib.pipeline.caches import allocated_caches
from quantlib.pipeline.run import Run
from quantlib.transforms.attention import ATTRIBUTE, AttentionState, attach_attention
from quantlib.transforms.binding import wire
from quantlib.transforms.tables import crosses


def round_inputs(
    x: Tensor, segments: tuple[ActivationSegment, ...], order: Tensor | None
) -> Tensor:
    """x [..., K] rounded as a weight with these segments and this order rounds it; in x's dtype and
    its own order."""
    if not segments:
        return x
    if order is None:
        return fake_quantize(x, segments).to(x.dtype)
    rounded = torch.empty_like(x)
    rounded[..., order] = fake_quantize(x[..., order], segments).to(x.dtype)
    return rounded


def clip_names(clips: Sequence[float]) -> dict[str, float]:
    """Clip factors as what a bank entry keeps beside its tensors; `bank_clips` reads them."""
    return {f"clip{index}": clip for index, clip in enumerate(clips)}


def bank_clips(run: Run, key: str) -> tuple[float, ...]:
    """The clip factors of a bank entry's activation segments; none where it was rounded without."""
    extra = run.bank.entry(key).extra
    return tuple(extra[f"clip{index}"] for index in range(len(extra)) if f"clip{index}" in extra)


def check_inputs(model_map: ModelMap, schemes: Mapping[str, Sequence[str]]) -> None:
    """Raise UsageError for a candidate (weight -> names) that rounds inputs to integers in a way
    that the integer kernels cannot."""
    asked = {(name, w.in_features) for w in model_map.weights for name in schemes[w.name]}
    for name, columns in sorted(asked):
        scheme = Scheme.parse(name)
        activations = scheme.activations(columns) if scheme.activation.rounds else ()
        if activations and all(part.format.is_integer for part in activations):
            reason = why_not(scheme.segments(columns), activations)
            if reason:
                raise UsageError(f"{name} cannot run on inputs of {columns} columns: {reason}")


class RoundedInputs:
    """Rounds the inputs of a model's linears as the schemes of their weights say."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        self.model, self.run = model, run
        self._segments: dict[str, tuple[ActivationSegment, ...]] = {}

    def set(self, weight: str, scheme: str, clips: Sequence[float] = ()) -> None:
        """From now on, the inputs of `weight` are rounded as `scheme` says, with these clip factors
        (none: all 1).

        Raises ModelError for a stack of experts: their inputs exist only inside their module.
        """
        found = self.run.model_map.weight(weight)
        segments = Scheme.parse(scheme).activations(found.in_features)
        if clips:
            segments = with_clips(segments, clips)
        if segments and found.kind == "experts":
            raise ModelError(
                f"{weight} is a stack of experts, whose inputs cannot be rounded while candidates "
                "are tried: use schemes that do not round activations for this model"
            )
        if weight not in self._segments and segments:
            self.model.get_submodule(found.module).register_forward_pre_hook(self._hook(weight))
        if segments or weight in self._segments:
            self._segments[weight] = segments

    def _hook(self, weight: str) -> Any:
        order = self.run.orders.get(weight)

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return round_inputs(inputs[0], self._segments[weight], order), *inputs[1:]

        return hook


def cache_settings(run: Run, model: nn.Module | None = None) -> dict[str, CacheSettings]:
    """Attention module -> what is done to its keys and values; empty when nothing is, and for
    models of several parts, whose caches go by modality (`pipeline.modalities`). An encoder keeps
    none; what a decoder hears is cached once for each sound, and rounded like what it says.

    model: the source's module, if it is there already.
    """
    if run.workload is not None and not crosses(run.source.model_type):
        return {}
    if run.recipe.kv_bits is not None:
        return {name: CacheSettings(kv) for name, kv in allocated_caches(run).items()}
    kv = KvFormat.parse(run.recipe.kv)
    if str(kv) == "f32":
        return {}
    wiring = wire(skeleton.build(run.source) if model is None else model)
    return {attention.module: CacheSettings(kv) for attention in wiring.cached}


def round_cache(
    model: PreTrainedModel, run: Run, caches: Mapping[str, CacheSettings] | None = None
) -> dict[str, AttentionState]:
    """Have the model's attention round keys and values as the run's KV format keeps them.

    caches: the run's `cache_settings`, for a model whose blocks are not in place. Returns the
    states of attention modules that round.
    """
    states = {}
    for name, settings in (cache_settings(run, model) if caches is None else caches).items():
        state = model.get_submodule(name).__dict__.get(ATTRIBUTE) or AttentionState()
        states[name] = replace(state, kv=settings.kv)
    if states:
        attach_attention(model, states)
    return states
