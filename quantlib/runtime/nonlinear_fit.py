"""Fits integer operators to the layers of a model's encoders, and chooses one for each.

The model runs on calibration data once, in floats, while rows of what every softmax, GELU and
LayerNorm of its encoders reads and gives are kept; each method is fitted to those rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlib.errors import DataError
from quantlib.kernels.nonlinear import CANDIDATES, Kind, Operator, fit, sqnr
from quantlib.kernels.nonlinear.rule import Fits, Rule, choose, thresholds
from quantlib.runtime.nonlinear import attach, detach, encoder_modules, sites
from quantlib.transforms.attention import ATTRIBUTE, AttentionState, attach_attention

ROWS = 512
"""Kept of each layer, over all runs."""

Runs = Sequence[Callable[[], Any]]
"""Each runs the model on some calibration data."""


@dataclass
class Observed:
    """Rows of what a layer read and gave, and for a softmax, which scores counted; lists of
    [rows, n], by run. The width differs between runs where inputs have different lengths."""

    kind: Kind
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)


def nonlinear_operators(model: PreTrainedModel, runs: Runs, rule: Rule) -> dict[str, Operator]:
    """The layers of a model's encoders that can compute in integers, by a rule.

    Raises DataError when no run reaches such a layer.
    """
    fits = measure(model, runs)
    if rule.of == "sqnr":
        return choose(fits, rule.decibels)
    return choose_for_outputs(model, runs, fits, rule.decibels)


def measure(model: PreTrainedModel, runs: Runs) -> Fits:
    """Every method fitted to every layer that the runs reach. Raises DataError when they reach
    none."""
    found: dict[str, dict[str, tuple[Operator, float]]] = {}
    for name, observed in observe(model, runs).items():
        module = model.get_submodule(name)
        found[name] = {
            method: _fit(observed, method, module) for method in CANDIDATES[observed.kind]
        }
    if not found:
        raise DataError(
            "no calibration data runs a softmax, a GELU or a LayerNorm of an encoder of this "
            "model: give images or sound, or leave --nonlinear out"
        )
    return found


def choose_for_outputs(
    model: PreTrainedModel, runs: Runs, fits: Fits, decibels: float
) -> dict[str, Operator]:
    """As many layers in integers as leave the encoders' outputs so many dB: layers join in the
    order of their own SQNR, and the number is found by bisection."""
    limits = thresholds(fits)
    exact = encoder_outputs(model, runs)
    low, high = 0, len(limits) - 1  # at `high`, nothing is in integers
    while low < high:
        middle = (low + high) // 2
        attach(model, choose(fits, limits[middle]))
        try:
            reached = _mean_sqnr(exact, encoder_outputs(model, runs))
        finally:
            detach(model)
        low, high = (low, middle) if reached >= decibels else (middle + 1, high)
    return choose(fits, limits[high])


@torch.no_grad()
def encoder_outputs(model: PreTrainedModel, runs: Runs) -> list[Tensor]:
    """What the outermost encoders of a model give, run by run."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        found.append(first.detach().float().clone())

    handles = [module.register_forward_hook(keep) for module in _outermost(model)]
    try:
        for run in runs:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def observe(model: PreTrainedModel, runs: Runs, rows: int = ROWS) -> dict[str, Observed]:
    """Rows of every softmax, GELU and LayerNorm of a model's encoders, by layer."""
    found: dict[str, Observed] = {}
    each = max(rows // max(len(runs), 1), 1)
    with _watched(model, found, each):
        for run in runs:
            run()
    return found


@contextmanager
def _watched(model: PreTrainedModel, found: dict[str, Observed], rows: int) -> Iterator[None]:
    handles = [
        site.module.register_forward_hook(_layer_hook(found, site.name, site.kind, rows))
        for site in sites(model)
    ]
    # Every module is given a softmax: those that call an attention function will use it.
    modules = {
        name: module
        for name, module, owner in encoder_modules(model)
        if _calls_by_name(module, owner)
    }
    before = {name: module.__dict__.get(ATTRIBUTE) for name, module in modules.items()}
    states = {
        name: replace(
            before[name] or AttentionState(), softmax=_softmax_recorder(found, name, rows)
        )
        for name in modules
    }
    if states:
        attach_attention(model, states)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, module in modules.items():
            if before[name] is None:
                delattr(module, ATTRIBUTE)
            else:
                setattr(module, ATTRIBUTE, before[name])


def _calls_by_name(module: nn.Module, owner: nn.Module) -> bool:
    """Whether a module may call attention by name: no leaf does, nor a model as a whole, nor parts
    of models that compute attention themselves."""
    if isinstance(module, PreTrainedModel) or not any(True for _ in module.children()):
        return False
    return isinstance(owner, PreTrainedModel) and owner._can_set_attn_implementation()


def _layer_hook(found: dict[str, Observed], name: str, kind: Kind, rows: int) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        observed = found.setdefault(name, Observed(kind))
        observed.inputs.append(_some_rows(inputs[0], rows))
        observed.outputs.append(_some_rows(output, rows))

    return hook


def _softmax_recorder(found: dict[str, Observed], name: str, rows: int) -> Any:
    def softmax(scores: Tensor, seen: Tensor | None) -> Tensor:
        counted = torch.ones_like(scores, dtype=torch.bool)
        counted = counted if seen is None else counted & seen
        weights = scores.masked_fill(~counted, -math.inf).softmax(-1).nan_to_num(0.0)
        observed = found.setdefault(name, Observed("softmax"))
        observed.inputs.append(_some_rows(scores, rows))
        observed.outputs.append(_some_rows(weights, rows))
        observed.seen.append(_some_rows(counted, rows))
        return weights

    return softmax


def _some_rows(x: Tensor, rows: int) -> Tensor:
    """At most so many rows of x [..., n], evenly spread, in float32 (bool stays bool)."""
    flat = x.detach().flatten(0, -2)
    chosen = torch.linspace(0, len(flat) - 1, min(rows, len(flat)), device=x.device).round().long()
    kept = flat[chosen].cpu()
    return kept if kept.dtype == torch.bool else kept.float()


def _fit(observed: Observed, method: str, module: nn.Module) -> tuple[Operator, float]:
    """One method on all rows of a layer. Rows of runs of other widths are filled up."""
    inputs, outputs = _stacked(observed.inputs, 0.0), _stacked(observed.outputs, 0.0)
    if observed.kind == "softmax":
        seen = _stacked(observed.seen, False)
        return fit("softmax", method, inputs, outputs, seen=seen)
    if observed.kind == "gelu":
        return fit("gelu", method, inputs, outputs)
    gain, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    given = {"gain": gain, "bias": bias}
    parameters = {key: None if x is None else x.detach().cpu() for key, x in given.items()}
    return fit("layer_norm", method, inputs, outputs, **parameters)


def _stacked(parts: list[Tensor], fill: float | bool) -> Tensor:
    width = max(part.shape[-1] for part in parts)
    return torch.cat(
        [nn.functional.pad(part, (0, width - part.shape[-1]), value=fill) for part in parts]
    )


def _outermost(model: PreTrainedModel) -> list[nn.Module]:
    """The encoders that lie in no other encoder; the model itself if it is one."""
    names = {name for name, _, _ in encoder_modules(model)}
    roots = [name for name in names if name.rpartition(".")[0] not in names]
    models = [model.get_submodule(name) for name in roots]
    parts = [part for part in models if isinstance(part, PreTrainedModel)]
    return parts or [model]


def _mean_sqnr(exact: Sequence[Tensor], computed: Sequence[Tensor]) -> float:
    """Mean over outputs, in dB."""
    found = [sqnr(one, other) for one, other in zip(exact, computed, strict=True)]
    return sum(found) / len(found)
