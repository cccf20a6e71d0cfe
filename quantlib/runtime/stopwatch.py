"""What a running model takes: milliseconds of a decoded token and of a prompt, on the native
engine.

The sum of a model's products (`kernels.timing`) is not yet its latency: attention, norms, the way
in and out of every layer and the engine's own call come on top. None of this depends on how the
weights are stored, so it is measured once, on models of the same shape with random weights. Several
of them, of small, all and large schemes, also show whether products take the same time inside the
engine as alone; `Fit` turns that into two numbers. Their matrices take schemes by lot, as those of
a plan do: where neighbours differ, code and tables are new to the processor each time.
"""

from __future__ import annotations

import math
import random
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
from quantlib.kernels.timing import undisturbed
from quantlib.runtime.engine import Engine
from quantlib.runtime.engine_changes import NO_CHANGES, Changes
from quantlib.runtime.engine_spec import EngineSpec
from quantlib.runtime.engine_weights import Plan, assemble, layer_prefix, plan_of
from quantlib.search.latency import phase_of

ROUNDS = 9
"""Turns in which the models are timed."""
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
        """The line near models of these sums of products and these measured totals: the least sum
        of squares of relative errors.

        Where the sums hardly differ (a prompt's products take the same time in all schemes) the
        products count as they are. Nothing fixed is below zero: then the factor takes it all.
        """
        spread = max(sums) - min(sums)
        # relative errors: every model counts by the inverse square of its total
        weights = [total**-2 for total in totals]
        mean_sum, mean_total = _mean(sums, weights), _mean(totals, weights)
        factor = 1.0
        if spread > 0.2 * max(sums):
            products = [
                (one - mean_sum) * (total - mean_total)
                for one, total in zip(sums, totals, strict=True)
            ]
            squares = [(one - mean_sum) ** 2 for one in sums]
            factor = _mean(products, weights) / _mean(squares, weights)
        factor = min(max(factor, FACTORS[0]), FACTORS[1])
        fixed = mean_total - factor * mean_sum
        if fixed < 0:
            ratios = [total / one for one, total in zip(sums, totals, strict=True)]
            return Fit(0.0, statistics.fmean(ratios))
        return Fit(fixed, factor)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)


def latencies(
    models: Mapping[str, Decoder],
    costs: Sequence[str],
    mode: str | None,
    threads: int,
    tick: Tick | None = None,
) -> dict[str, dict[str, float]]:
    """Name -> cost (`search.latency`) -> milliseconds (`undisturbed`), of models timed in turns.

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
        name: {cost: undisturbed(times) for cost, times in row.items()}
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
    spec: EngineSpec,
    schemes: str | Mapping[str, str],
    own_head: bool,
    changes: Changes = NO_CHANGES,
) -> Decoder:
    """A model of this shape with random weights.

    schemes: of all matrices, or of each by the checkpoint's name (`draw`); they say how inputs are
             rounded too. One that does not quantize makes a bfloat16 matrix.
    changes: what else a checkpoint may ask for while it runs.

    Layers beyond what the caches hold share the weights of those before, where they have the same
    schemes: what has left the caches by the time it is used again need not be there twice.
    """
    plan = plan_of(spec, own_head)
    if isinstance(schemes, str):
        schemes = dict.fromkeys(plan.matrices, schemes)
    return assemble(_RandomParts(schemes, plan), spec, plan, changes)


def draw(plan: Plan, schemes: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """One of its schemes for every matrix of a plan, by lot, always the same.

    Layers beyond what the caches hold get the schemes of those before, so that `random_model` need
    not have them twice.
    """
    lot = random.Random(0)
    distinct = _distinct(plan, schemes)
    drawn: dict[str, str] = {}
    for name in plan.matrices:
        key = _like(name, distinct)
        drawn[name] = drawn[key] if key in drawn else lot.choice(schemes[name])
    return drawn


def _distinct(plan: Plan, schemes: Mapping[str, Sequence[str]]) -> int:
    """How many layers, in schemes like these, the caches do not hold."""
    first = layer_prefix(0)
    size = math.fsum(
        statistics.fmean(_bytes(plan.matrices[name], scheme) for scheme in schemes[name])
        for name in plan.matrices
        if name.startswith(first)
    )
    return 1 + math.ceil(stopwatch.footprint() / size)


def _bytes(shape: tuple[int, int], scheme: str) -> int:
    parsed = Scheme.parse(scheme)
    dense = 2 * math.prod(shape)
    return dense if parsed.weight is None else tiled_bytes(shape, parsed.segments(shape[1]))


def _like(name: str, distinct: int) -> str:
    """The matrix of the first `distinct` layers that stands for this one."""
    return _LAYER.sub(lambda match: f".{int(match[1]) % distinct}.", name, count=1)


class _RandomParts:
    """Matrices and norms of a random model: `engine_weights.Parts`."""

    def __init__(self, schemes: Mapping[str, str], plan: Plan) -> None:
        self._schemes, self._plan = schemes, plan
        self._distinct = _distinct(plan, {name: (schemes[name],) for name in plan.matrices})
        self._packed: dict[tuple[tuple[int, int], str], PackedWeight] = {}
        self._tiled: dict[tuple[str, str], TiledWeight] = {}

    def linear(self, name: str, bias: str | None = None) -> Linear:
        scheme, shape = self._schemes[name], self._plan.matrices[name]
        vector = None if bias is None else torch.zeros(self._plan.vectors[bias])
        parsed = Scheme.parse(scheme)
        if parsed.weight is None:
            return Linear(torch.full(shape, 0.01, dtype=torch.bfloat16, device="cpu"), vector)
        key = _like(name, self._distinct), scheme
        if key not in self._tiled:
            self._tiled[key] = tile(self._weight(shape, scheme))
        return Linear(self._tiled[key], vector, activations=parsed.activations(shape[1]))

    def norm(self, name: str) -> Tensor:
        return torch.ones(self._plan.vectors[name])

    def _weight(self, shape: tuple[int, int], scheme: str) -> PackedWeight:
        """Every weight of a shape and a scheme has the same numbers, and tiles of its own."""
        if (shape, scheme) not in self._packed:
            self._packed[shape, scheme] = stopwatch.random_weight(*shape, scheme)
        return self._packed[shape, scheme]
