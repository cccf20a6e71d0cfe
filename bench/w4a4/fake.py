"""A model in memory that computes what a rounded one would: weights replaced, inputs rounded by
hooks.

Weights go through `quantlib.rounding`: GPTQ under the site's Hessian, or to the nearest, both with
a search of clips. Scales are per output row and segment, as in ResQ, QuaRot and SmoothQuant. Two
ways to a Hessian:

- given: a transform of the full-precision model's statistics, shared by methods and seeds;
- from the prefix: each site's input once everything before it has been rounded, activations
  unrounded, as GPTQ's and ResQ's code do it. One forward pass of all calibration data: when a site
  is reached, its Hessian is summed and its readers are rounded before they run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.bench.w4a4 import heads
from quantlib.bench.w4a4.grids import Grids, round_tokens
from quantlib.bench.w4a4.heads import HeadPlan
from quantlib.bench.w4a4.sites import Site, linear, weight
from quantlib.bench.w4a4.statistics import Run
from quantlib.formats.rtn import encode
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight, dequantize
from quantlib.formats.weight_format import CHANNEL, Segment, WeightFormat
from quantlib.rounding import RoundingOptions, round_group
from quantlib.rounding.fixed import search_scales

GPTQ = RoundingOptions(damping=0.01, passes=0)
"""GPTQ as published: one sweep, a damping of 1 % of the mean diagonal."""


@dataclass(frozen=True)
class SitePlan:
    """order: int64 [K], input columns in the order of the slices; None: as they are.
    weights, activations: the slices of readers and input; no activations: not rounded."""

    weights: tuple[Segment, ...]
    activations: Grids
    order: Tensor | None = None


@dataclass
class Prepared:
    """A transformed model, and what is to be rounded in it.

    plans:    by site. heads: by attention module.
    hessian:  of a site's input in the model as it stands, columns in their own order; None: from
              the prefix.
    nearest:  weights are rounded to the nearest, whatever the Hessian.
    """

    model: Any
    sites: tuple[Site, ...]
    plans: Mapping[str, SitePlan]
    heads: Mapping[str, HeadPlan]
    hessian: Callable[[Site], Tensor] | None = None
    nearest: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


def columns(low: int, high: int, bits: int = 4, high_bits: int = 8) -> tuple[Segment, ...]:
    """Segments of symmetric integers, one scale per output row each: `low` columns of `bits`, then
    `high` of `high_bits`."""
    parts = [Segment(0, low, WeightFormat(f"int{bits}", CHANNEL))] if low else []
    if high:
        parts.append(Segment(low, high, WeightFormat(f"int{high_bits}", CHANNEL)))
    return tuple(parts)


def finish(prepared: Prepared, run: Run) -> Any:
    """Round the model in place: weights, then hooks on inputs and heads; returns it.

    `run` puts the calibration data through a model.
    """
    round_weights(prepared, run)
    attach(prepared)
    return prepared.model


@torch.no_grad()
def round_weights(prepared: Prepared, run: Run) -> None:
    """Round every weight in place; its columns are then in its plan's order."""
    if prepared.hessian is None and not prepared.nearest:
        _round_behind_prefix(prepared, run)
        return
    for site in prepared.sites:
        given = None if prepared.nearest or prepared.hessian is None else prepared.hessian(site)
        _round_readers(prepared.model, site, prepared.plans[site.name], given)


def attach(prepared: Prepared) -> None:
    """Hooks that order and round inputs, keys and values while the model runs."""
    for site in prepared.sites:
        plan = prepared.plans[site.name]
        hook = RoundInput(plan.activations, plan.order)
        for reader in site.readers:
            linear(prepared.model, reader).register_forward_pre_hook(hook)
    heads.attach(prepared.model, prepared.heads)


def _round_readers(model: nn.Module, site: Site, plan: SitePlan, second: Tensor | None) -> None:
    """Round every reader of a site, its columns then in the plan's order; to the nearest where
    there is no second moment."""
    weights = {reader.weight: weight(model, reader) for reader in site.readers}
    if plan.order is not None:
        weights = {name: each[:, plan.order] for name, each in weights.items()}
    if second is None:
        rounded = {name: nearest(each, plan.weights) for name, each in weights.items()}
    else:
        second = second if plan.order is None else second[plan.order][:, plan.order]
        found = round_group(weights, second, [plan.weights], GPTQ)
        rounded = {name: found[name, 0] for name in weights}
    for reader in site.readers:
        weight(model, reader).copy_(dequantize(rounded[reader.weight]))


def nearest(weight: Tensor, segments: Sequence[Segment]) -> QuantizedWeight:
    """A weight [N, K] rounded to the nearest, clips by squared error."""
    parts = []
    for segment in segments:
        own = weight[:, segment.start : segment.start + segment.length]
        scales = search_scales(own, segment.format, torch.ones(segment.length))
        codes = encode(own, segment.format, *scales)
        parts.append(QuantizedSegment(segment, codes, *scales))
    return QuantizedWeight((weight.shape[0], weight.shape[1]), tuple(parts))


def _round_behind_prefix(prepared: Prepared, run: Run) -> None:
    done: set[str] = set()

    def reached(site: Site, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        plan = prepared.plans[site.name]
        if site.name not in done:
            done.add(site.name)
            x = inputs[0].flatten(0, -2)
            _round_readers(prepared.model, site, plan, x.mT @ x / len(x))
        return None if plan.order is None else (inputs[0][..., plan.order], *inputs[1:])

    handles = [
        linear(prepared.model, reader).register_forward_pre_hook(partial(reached, site))
        for site in prepared.sites
        for reader in site.readers
    ]
    try:
        run(prepared.model)
    finally:
        for handle in handles:
            handle.remove()
    missed = [site.name for site in prepared.sites if site.name not in done]
    if missed:
        raise ValueError(f"calibration never reached {missed}")


class RoundInput:
    """A forward pre-hook that orders and rounds a linear's input; readers of one input share the
    work."""

    def __init__(self, grids: Grids, order: Tensor | None) -> None:
        self.grids = grids
        self.order = order
        self._given: Tensor | None = None
        self._made: Tensor | None = None

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        if x is not self._given or self._made is None:
            ordered = x if self.order is None else x[..., self.order]
            self._made = round_tokens(ordered, self.grids) if self.grids else ordered
            self._given = x
        return self._made, *inputs[1:]
