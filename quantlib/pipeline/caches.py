"""How many bits the KV cache of every layer deserves, keys and values apart (`--kv 5.2`).

A layer's keys and values are cached in any of `SIDES`. For each, the keys (or values) of a few
calibration windows are rounded while everything else stays exact, and what that changes behind the
output projection is priced like a rounding error of weights: by the Fisher information of its
outputs, or, without gradients, relative to their energy. The least sum within the mean bits that
are asked for, scales and zero points counted, is found by the solver that allocates weights.

Keys lose more than values, and some layers' keys much more than others': one format for all pays
for the few.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantlib.calibration.stream import BlockStream
from quantlib.checkpoint.provenance import digest
from quantlib.errors import FormatError, UsageError
from quantlib.kernels.kv_format import KvFormat, SideFormat
from quantlib.models import skeleton
from quantlib.pipeline.calibrate import group_statistics
from quantlib.pipeline.run import Run
from quantlib.rounding.objective import OutputMetric
from quantlib.search.problem import Choice, Item, Problem
from quantlib.search.solve import solve
from quantlib.transforms.attention import attach_attention, changed_attention
from quantlib.transforms.binding import wire
from quantlib.transforms.wiring import Attention

KIND, CHOSEN = "caches", "cache formats"
CACHES_VERSION = 1
"""Raise when losses come out differently: caches are then measured again."""
SIDES = ("int4", "int4g32", "int4g16", "int4h16", "int8")
WINDOWS = 6
"""Of calibration, that losses are taken on."""
EXACT = SideFormat(32)

Side = Literal["key", "value"]
Losses = dict[str, dict[str, dict[str, float]]]
"""Attention module -> side -> format -> loss."""


def allocated_caches(run: Run) -> dict[str, KvFormat]:
    """Attention module -> the format of its cache, within the recipe's mean bits.

    Measured and solved once per work directory. Raises UsageError when so few bits cannot be had.
    """
    bits = run.recipe.kv_bits
    assert bits is not None
    key = run.work.key(CHOSEN, losses=_losses_key(run), bits=bits)
    if not run.work.has(key):
        attentions = {a.module: a for a in wire(skeleton.build(run.source)).attentions}
        formats = allocate(measured_losses(run), attentions, bits)
        run.work.commit(key, CHOSEN, {}, {name: str(kv) for name, kv in formats.items()})
    return {name: KvFormat.parse(text) for name, text in run.work.unit(key).values.items()}


def allocate(
    losses: Losses, attentions: Mapping[str, Attention], bits: float
) -> dict[str, KvFormat]:
    """The formats of least loss with at most so many mean bits per cached number."""
    items = [
        Item(f"{module} {side}", (f"{module} {side}",), tuple(_choices(attentions[module], found)))
        for module, sides in losses.items()
        for side, found in sides.items()
    ]
    problem = Problem(tuple(items))
    budget = check_bits([attentions[module] for module in losses], bits)
    chosen = problem.chosen(solve(problem, budget).picks)
    named = {item.name: SideFormat.parse(c.scheme) for item, c in zip(items, chosen, strict=True)}
    return {module: KvFormat(named[f"{module} key"], named[f"{module} value"]) for module in losses}


def check_bits(attentions: Sequence[Attention], bits: float) -> int:
    """Bytes of one position of all caches at these mean bits. Raises UsageError when no formats
    have so few."""
    numbers = sum(2 * a.kv_heads * a.head_dim for a in attentions)
    least = sum(2 * a.kv_heads * _smallest(a.head_dim) for a in attentions)
    budget = int(numbers * bits / 8)
    if budget < least:
        raise UsageError(
            f"a KV cache of {bits:g} bits cannot be had: scales and zero points counted, the least "
            f"is {8 * least / numbers:.3f} bits; give --kv that, or more"
        )
    return budget


def _smallest(head_dim: int) -> int:
    """The fewest bytes of one head's position."""
    return min(SideFormat.parse(name).bytes_per_position(head_dim) for name in _possible(head_dim))


def _choices(attention: Attention, losses: Mapping[str, float]) -> Iterator[Choice]:
    """What one position of a side's cache can be: bytes of all its heads."""
    for name, loss in losses.items():
        size = SideFormat.parse(name).bytes_per_position(attention.head_dim)
        yield Choice(name, attention.kv_heads * size, loss)


def measured_losses(run: Run) -> Losses:
    """What every format of every side loses, kept as a unit of the work directory."""
    key = _losses_key(run)
    if not run.work.has(key):
        run.work.commit(key, KIND, {}, {"losses": _measure(run)})
    losses: Losses = run.work.unit(key).values["losses"]
    return losses


def _losses_key(run: Run) -> str:
    inputs = digest([run.statistics_hash, SIDES, WINDOWS, CACHES_VERSION])
    return run.work.key(KIND, inputs=inputs)


@torch.no_grad()
def _measure(run: Run) -> Losses:
    stream = BlockStream(run.source, run.model_map)
    attach_attention(stream.model, {})  # masks are of the kind that stated attention wants
    attentions = wire(skeleton.build(run.source)).attentions
    count = len(run.windows)
    chosen = torch.linspace(0, count - 1, min(WINDOWS, count)).round().long()
    hidden = [stream.embed(ids) for ids in run.windows[chosen]]
    losses: Losses = {}
    with run.stage("cache", len(stream.block_names)) as progress:
        for index, name in enumerate(stream.block_names):
            with stream.block(index) as block:
                for attention in (a for a in attentions if a.block == name):
                    output = partial(_output, stream, index, block, attention)
                    losses[attention.module] = _losses(
                        run, stream, attention, output, hidden, chosen
                    )
                hidden = [stream.run(index, block, one) for one in hidden]
            progress.tick(name)
    return losses


def _losses(
    run: Run,
    stream: BlockStream,
    attention: Attention,
    output: Any,
    hidden: list[Tensor],
    chosen: Tensor,
) -> dict[str, dict[str, float]]:
    """Of one attention: side -> format -> mean loss over the windows `chosen`."""
    exact = torch.stack([output(one) for one in hidden])
    metric = _metric(run, attention, exact, chosen)
    found: dict[str, dict[str, float]] = {}
    sides: tuple[Side, ...] = ("key", "value")
    for side in sides:
        found[side] = {}
        for name in _possible(attention.head_dim):
            form = SideFormat.parse(name)
            kv = KvFormat(form, EXACT) if side == "key" else KvFormat(EXACT, form)
            with changed_attention(stream.model, {attention.module: {"kv": kv}}):
                errors = [output(one) - truth for one, truth in zip(hidden, exact, strict=True)]
            losses = [metric.loss(error, window) for window, error in enumerate(errors)]
            found[side][name] = float(torch.stack(losses).mean())
    return found


def _possible(head_dim: int) -> list[str]:
    """Those of SIDES that heads of this size can have, no two of the same groups."""
    found: dict[Any, str] = {}
    for name in SIDES:
        form = SideFormat.parse(name)
        with suppress(FormatError):
            form.check(head_dim)
            found.setdefault(form.groups(head_dim), name)
    return list(found.values())


def _metric(run: Run, attention: Attention, exact: Tensor, chosen: Tensor) -> OutputMetric:
    """What errors behind the output projection, [windows, T, D], cost."""
    name = attention.output.weight
    (matrix,) = group_statistics(run, run.model_map.weight(name).group).matrices
    if not matrix.has_gradients:
        return OutputMetric.relative(exact)
    weights = matrix.token_weight.reshape(len(run.windows), -1)[chosen]
    shape = (weights.shape[0], weights.shape[1])
    return OutputMetric.fisher(weights.reshape(-1), matrix.fisher[name], shape)


class _Reached(Exception):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _output(
    stream: BlockStream, index: int, block: nn.Module, attention: Attention, hidden: Tensor
) -> Tensor:
    """What leaves the output projection [T, D] for one window's hidden states [1, T, D]; nothing
    behind it is run."""

    def stop(_: nn.Module, __: Any, output: Tensor) -> None:
        raise _Reached(output[0].float())

    module = stream.model.get_submodule(attention.output.weight.rpartition(".")[0])
    handle = module.register_forward_hook(stop)
    try:
        stream.run(index, block, hidden)
    except _Reached as reached:
        return reached.output
    finally:
        handle.remove()
    raise AssertionError(f"{attention.module} ran without its output projection")
