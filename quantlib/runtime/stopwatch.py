"""What a running model takes: milliseconds of a decoded token and of a prompt, on the native
engine.

The sum of a model's products (`kernels.timing`) is not yet its latency: attention, norms, the way
in and out of every layer and the engine's own call come on top. None of this depends on how the
weights are stored, so it is measured once, on a model of the same shape with random weights. Two
such models, in the cheapest and in the dearest scheme, also show whether products take the same
time inside the engine as alone; `Fit` turns both into two numbers.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.formats.scheme import Scheme
from quantlib.kernels.cpu import stopwatch
from quantlib.kernels.cpu.engine_library import Decoder, Linear
from quantlib.kernels.layouts import TiledWeight, tile, tiled_bytes
from quantlib.kernels.packed import PackedWeight
from quantlib.runtime.engine import Engine
from quantlib.runtime.engine_changes import NO_CHANGES, Changes
from quantlib.runtime.engine_spec import EngineSpec
from quantlib.runtime.engine_weights import Plan, assemble, layer_prefix, plan_of
from quantlib.search.latency import phase_of

ROUNDS = 5
"""Turns in which the models are timed; the median of all counts."""
STEPS = 8
"""Tokens decoded in one turn."""
FACTORS = (0.5, 2.0)
"""A product that takes less or more of its own time inside the engine is a disturbance."""
_LAYER = re.compile(r"\.(\d+)\.")
"""The number of a layer in a name."""

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Fit:
    """Latency of a model = fixed + factor * sum of its products, in milliseconds."""

    fixed: float
    factor: float

    @staticmethod
    def through(sums: Sequence[float], totals: Sequence[float]) -> Fit:
        """The line through models of these sums of products and these measured totals.

        Where the sums hardly differ (a prompt's products take the same time in all schemes) the
        products count as they are. Nothing fixed is below zero: then the factor takes it all.
        """
        spread = max(sums) - min(sums)
        factor = 1.0
        if spread > 0.2 * max(sums):
            factor = statistics.linear_regression(sums, totals).slope
        factor = min(max(factor, FACTORS[0]), FACTORS[1])
        fixed = statistics.fmean(totals) - factor * statistics.fmean(sums)
        if fixed < 0:
            return Fit(0.0, math.fsum(totals) / math.fsum(sums))
        return Fit(fixed, factor)


def latencies(
    models: Mapping[str, Decoder],
    costs: Sequence[str],
    mode: str | None,
    threads: int,
    tick: Tick | None = None,
) -> dict[str, dict[str, float]]:
    """Name -> cost (`search.latency`) -> milliseconds, of models timed in turns.

    mode, threads: the engine's. `tick` is called after each of the ROUNDS * models measurements.
    """
    watches = {name: _Watch(model, costs, mode, threads) for name, model in models.items()}
    found: dict[str, dict[str, list[float]]] = {
        name: {cost: [] for cost in costs} for name in models
    }
    for _ in range(ROUNDS):
        for name, watch in watches.items():
            for cost in costs:
                found[name][cost] += watch.milliseconds(cost)
            if tick is not None:
                tick(name)
    return {
        name: {cost: statistics.median(times) for cost, times in row.items()}
        for name, row in found.items()
    }


class _Watch:
    """One model on an engine with room for the longest of the texts."""

    def __init__(
        self, model: Decoder, costs: Sequence[str], mode: str | None, threads: int
    ) -> None:
        longest = max(phase_of(cost)[1] for cost in costs)
        self._engine = Engine(model, capacity=longest + 1, mode=mode, threads=threads)
        generator = torch.Generator().manual_seed(0)
        self._text = torch.randint(model.vocabulary, (longest,), generator=generator)

    def milliseconds(self, cost: str) -> list[float]:
        """Some measurements: STEPS of a token, or one of a prompt."""
        phase, tokens = phase_of(cost)
        if phase == "prefill":
            self._engine.reset()
            start = time.perf_counter()
            self._engine.prefill(self._text[:tokens])
            return [1e3 * (time.perf_counter() - start)]
        self._fill(tokens)
        times = []
        for _ in range(STEPS + 1):
            start = time.perf_counter()
            self._engine.decode_best(self._text[:1])
            times.append(1e3 * (time.perf_counter() - start))
            self._engine.truncate(0, tokens)
        return times[1:]  # the first finds the caches full of something else

    def _fill(self, tokens: int) -> None:
        """Have `tokens` tokens of context; what is there already stays."""
        length = self._engine.lengths[0]
        if length > tokens:
            self._engine.truncate(0, tokens)
        elif length < tokens:
            self._engine.prefill(self._text[length:tokens])


def random_model(
    spec: EngineSpec, scheme: str, own_head: bool, changes: Changes = NO_CHANGES
) -> Decoder:
    """A model of this shape with random weights, all matrices in one scheme, which says how their
    inputs are rounded too. changes: what else a checkpoint may ask for while it runs.

    Layers beyond what the caches hold share the weights of those before: what has left the caches
    by the time it is used again need not be there twice.
    """
    plan = plan_of(spec, own_head)
    return assemble(_RandomParts(scheme, plan), spec, plan, changes)


class _RandomParts:
    """Matrices and norms of a random model: `engine_weights.Parts`."""

    def __init__(self, scheme: str, plan: Plan) -> None:
        self._scheme, self._plan = scheme, plan
        parsed, first = Scheme.parse(scheme), layer_prefix(0)
        size = sum(
            tiled_bytes(shape, parsed.segments(shape[1]))
            for name, shape in plan.matrices.items()
            if name.startswith(first)
        )
        self._distinct = 1 + math.ceil(stopwatch.footprint() / size)
        self._packed: dict[tuple[int, int], PackedWeight] = {}
        self._tiled: dict[str, TiledWeight] = {}

    def linear(self, name: str, bias: str | None = None) -> Linear:
        key = _LAYER.sub(lambda match: f".{int(match[1]) % self._distinct}.", name, count=1)
        if key not in self._tiled:
            self._tiled[key] = tile(self._weight(self._plan.matrices[name]))
        vector = None if bias is None else torch.zeros(self._plan.vectors[bias])
        activations = Scheme.parse(self._scheme).activations(self._plan.matrices[name][1])
        return Linear(self._tiled[key], vector, activations=activations)

    def norm(self, name: str) -> Tensor:
        return torch.ones(self._plan.vectors[name])

    def _weight(self, shape: tuple[int, int]) -> PackedWeight:
        """Every weight of a shape has the same numbers, and tiles of its own."""
        if shape not in self._packed:
            self._packed[shape] = stopwatch.random_weight(*shape, self._scheme)
        return self._packed[shape]
