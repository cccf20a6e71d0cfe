"""What baselines calibrate on: second moments, means and extremes of every site and every head.

One pass of the full-precision model over all calibration data. Moments are those of the *folded*
model (gains of the norms in their readers), which bases are computed from; those of the model as it
is follow exactly where norms have no bias (`unfolded`). A method's own Hessian is its transform
applied to these (`turned`), so that seeds and methods share the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.bench.w4a4.sites import Site, linear
from quantlib.transforms.attention import watched_attention
from quantlib.transforms.changes import Basis, turn
from quantlib.transforms.wiring import Wiring

Run = Callable[[Any], None]
"""Puts all calibration data through a model."""


@dataclass(frozen=True)
class InputStatistics:
    """second: float32 [K, K], mean of x x^T. mean, amax: float32 [K], of x and of |x|."""

    second: Tensor
    mean: Tensor
    amax: Tensor


@dataclass(frozen=True)
class HeadStatistics:
    """Keys and values of an attention, per KV head: second moments float32 [H_kv, d, d] (keys
    behind the rotary embedding) and largest magnitudes [H_kv, d]."""

    key: Tensor
    value: Tensor
    key_amax: Tensor
    value_amax: Tensor


@dataclass(frozen=True)
class Statistics:
    """By the names of sites and of attentions."""

    inputs: Mapping[str, InputStatistics]
    heads: Mapping[str, HeadStatistics]


@torch.no_grad()
def collect(model: Any, wiring: Wiring, sites: tuple[Site, ...], run: Run) -> Statistics:
    """Statistics of `model` while `run` feeds it."""
    sums = {site.name: _Sum() for site in sites}
    heads = {attention.name: (_Sum(), _Sum()) for attention in wiring.attentions}
    handles = [
        linear(model, site.readers[0]).register_forward_pre_hook(partial(_show, sums[site.name]))
        for site in sites
    ]
    observers = {
        attention.module: partial(_show_heads, *heads[attention.name])
        for attention in wiring.attentions
    }
    try:
        with watched_attention(model, observers):
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, (key, value) in heads.items():
        keys, values = key.finish(), value.finish()
        found[name] = HeadStatistics(keys.second, values.second, keys.amax, values.amax)
    return Statistics({name: each.finish() for name, each in sums.items()}, found)


def unfolded(statistics: Statistics, sites: tuple[Site, ...], model: nn.Module) -> Statistics:
    """Statistics of `model`, which has its gains in its norms, from those of the folded one.

    Raises ValueError where a norm has a bias: then extremes do not follow, and must be collected.
    """
    inputs = dict(statistics.inputs)
    for site in sites:
        if site.norm is None:
            continue
        if site.norm.bias is not None:
            raise ValueError(f"{site.norm.name} has a bias: collect the statistics of this model")
        gain = model.get_parameter(site.norm.weight).data.float()
        folded = inputs[site.name]
        inputs[site.name] = scaled(folded, gain)
    return Statistics(inputs, statistics.heads)


def scaled(statistics: InputStatistics, factor: Tensor) -> InputStatistics:
    """Statistics of x * factor [K]."""
    return InputStatistics(
        statistics.second * factor * factor[:, None],
        statistics.mean * factor,
        statistics.amax * factor.abs(),
    )


def turned(second: Tensor, basis: Basis | None) -> Tensor:
    """Second moment of x @ basis, from that of x, float32 [K, K]."""
    if basis is None:
        return second
    return turn(turn(second, basis).T, basis).T.contiguous()


class _Sum:
    """Sums over tokens; of one vector, or of one per head (leading axis)."""

    def __init__(self) -> None:
        self.second = self.total = self.amax = torch.zeros(())
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x float32 [..., T, K]."""
        self.second = self.second + x.mT @ x
        self.total = self.total + x.sum(-2)
        self.amax = torch.maximum(self.amax, x.abs().amax(-2))
        self.tokens += x.shape[-2]

    def finish(self) -> InputStatistics:
        return InputStatistics(self.second / self.tokens, self.total / self.tokens, self.amax)


def _show(total: _Sum, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    total.add(inputs[0].flatten(0, -2))


def _show_heads(keys: _Sum, values: _Sum, _: Tensor, key: Tensor, value: Tensor) -> None:
    """key, value [B, H_kv, L, d]."""
    keys.add(key.transpose(0, 1).flatten(1, 2))
    values.add(value.transpose(0, 1).flatten(1, 2))
