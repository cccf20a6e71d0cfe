"""What every weight would cost in every scheme, in milliseconds, on this machine.

Three things are measured, and kept in the user's cache (`kernels.timing`):

1. every product alone, in the engine's own inner loop: rows x columns x scheme x tokens;
2. two running models of this shape with random weights, in the cheapest and in the dearest scheme;
3. from both, what a running model adds that no scheme changes, and the factor by which products
   differ inside it (`runtime.stopwatch.Fit`).

A plan is then predicted as fixed + factor * (sum of its products). The engine shares a product out
by strips of 32 rows without waiting between matrices that read one input, which is why products may
be timed alone and added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantlib.errors import UsageError
from quantlib.formats.scheme import Scheme
from quantlib.kernels import timing
from quantlib.kernels.cpu.forms import why_not
from quantlib.kernels.timing import Op, TimingTable, this_machine
from quantlib.models.modelmap import ModelMap
from quantlib.models.rows import Weight
from quantlib.pipeline.run import Progress
from quantlib.runtime import stopwatch
from quantlib.runtime.engine import CHUNK
from quantlib.runtime.engine_spec import EngineSpec, unsupported
from quantlib.runtime.load import load
from quantlib.runtime.stopwatch import Fit, latencies, random_model
from quantlib.search.latency import LatencyBudget, LatencyCosts, phase_of


def latency_costs(
    model_map: ModelMap,
    config: Mapping[str, Any],
    schemes: Mapping[str, Sequence[str]],
    budget: LatencyBudget,
    progress: Progress,
) -> LatencyCosts:
    """Measure what is not in the cache yet, and price every weight.

    config: the model's config.json. schemes: weight -> its candidates.
    Raises UsageError when the native engine does not run the model, or there are no kernels.
    """
    names = sorted(budget.limits())
    spec = _engine_spec(config, model_map)
    _check_inputs(model_map, schemes)
    machine = this_machine(budget.threads or torch.get_num_threads())
    table = TimingTable.load(machine)
    said = table.problem
    if said:
        progress.say(said)
    prices = _Prices(model_map, spec, budget.mode)
    ops = {op for cost in names for _, op in prices.ops(cost, schemes)}
    _measure_products(table, sorted(ops), progress)
    fits = _fits(table, prices, names, schemes, budget, progress)
    if table.problem != said:
        progress.say(table.problem)
    free = dict.fromkeys(((weight, s) for weight, found in schemes.items() for s in found), 0.0)
    costs = {
        cost: free
        | {
            pair: fits[cost].factor * prices.scale(cost, op) * table.ms[op.key]
            for pair, op in prices.ops(cost, schemes)
        }
        for cost in names
    }
    return LatencyCosts(
        costs,
        {cost: fits[cost].fixed for cost in names},
        f"{machine}, {_mode_text(budget.mode)}",
        machine.fingerprint,
        machine.threads,
        budget.mode,
    )


def costs_for(
    model_map: ModelMap,
    folder: Path,
    schemes: Mapping[str, Sequence[str]] | Sequence[str],
    budget: LatencyBudget,
    progress: Progress,
) -> LatencyCosts | None:
    """`latency_costs` of the model in `folder`; None when no latency is limited.

    schemes: those of each weight, or of all.
    """
    if not budget:
        return None
    budget.limits()  # first of all, that the request makes sense
    if not isinstance(schemes, Mapping):
        names = [str(Scheme.parse(name)) for name in schemes]
        schemes = {weight.name: names for weight in model_map.weights}
    return latency_costs(model_map, model_config(folder), schemes, budget, progress)


def measured_ms(
    checkpoint: Path, costs: Sequence[str], threads: int | None, mode: str | None
) -> dict[str, float]:
    """Cost name -> milliseconds that a finished checkpoint really takes here, loaded as a user
    would."""
    model = load(checkpoint, mode=mode)
    threads = threads or torch.get_num_threads()
    return latencies({"it": model.decoder}, costs, mode, threads)["it"]


def model_config(path: Path) -> dict[str, Any]:
    """The config.json of a model. Raises UsageError when it is not there: its weights are not
    needed."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"a latency budget needs the model's config.json, and {path / 'config.json'} cannot be "
            "read: put the model back where it was measured, or give a size instead"
        ) from error
    return dict(config)


class _Prices:
    """Which operations a model's weights are, for one mode."""

    def __init__(self, model_map: ModelMap, spec: EngineSpec, mode: str | None) -> None:
        self.model_map, self.spec, self._mode = model_map, spec, mode

    def ops(
        self, cost: str, schemes: Mapping[str, Sequence[str]]
    ) -> Iterator[tuple[tuple[str, str], Op]]:
        """(weight, scheme), operation. An embedding that is no head costs nothing: its rows are
        looked up."""
        for weight in self.model_map.weights:
            if weight.kind == "embedding" and weight.head is None:
                continue
            for name in schemes[weight.name]:
                yield (weight.name, name), self._op(cost, weight, Scheme.parse(name))

    def scale(self, cost: str, op: Op) -> float:
        """How many of this operation the phase takes: a long prompt is read in pieces."""
        phase, tokens = phase_of(cost)
        return tokens / op.tokens if phase == "prefill" and op.tokens > 1 else 1.0

    def _op(self, cost: str, weight: Weight, scheme: Scheme) -> Op:
        phase, tokens = phase_of(cost)
        # only the last token of a prompt is given to the head
        at_once = 1 if phase == "decode" or weight.kind != "linear" else min(tokens, CHUNK)
        mode = self._mode or ("int8" if scheme.activation.is_integer else "exact")
        columns = str(Scheme(scheme.weight, high=scheme.high))
        return Op(weight.out_features, weight.in_features, columns, at_once, mode)


def _engine_spec(config: Mapping[str, Any], model_map: ModelMap) -> EngineSpec:
    """Raises UsageError for a model that the native engine does not run."""
    from transformers import CONFIG_MAPPING

    settings = {key: value for key, value in config.items() if key != "auto_map"}
    reason = None
    if settings.get("model_type") not in CONFIG_MAPPING:
        reason = f"its model type is {settings.get('model_type')!r}"
    else:
        parsed = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
        reason = unsupported(parsed)
    if reason is not None:
        raise UsageError(
            "latency budgets are for models that the native engine runs, and it does not run this "
            f"one: {reason}; give a size instead"
        )
    return EngineSpec.from_config(parsed)


def _check_inputs(model_map: ModelMap, schemes: Mapping[str, Sequence[str]]) -> None:
    """Raises UsageError for a candidate whose inputs the native engine cannot round."""
    for weight, candidates in schemes.items():
        columns = model_map.weight(weight).in_features
        for name in candidates:
            parsed = Scheme.parse(name)
            reason = why_not(parsed.segments(columns), parsed.activations(columns))
            if reason:
                raise UsageError(
                    f"latency budgets are for what the native engine runs, and it does not run "
                    f"{weight} in {name} ({reason}): leave that scheme out, or give a size instead"
                )


def _measure_products(table: TimingTable, ops: Sequence[Op], progress: Progress) -> None:
    missing = table.missing(ops)
    progress.start("time", timing.ROUNDS * len(missing))
    try:
        table.measure(missing, tick=progress.tick)
    finally:
        progress.finish()


def _fits(
    table: TimingTable,
    prices: _Prices,
    costs: Sequence[str],
    schemes: Mapping[str, Sequence[str]],
    budget: LatencyBudget,
    progress: Progress,
) -> dict[str, Fit]:
    """Cost -> its Fit, from running models in the schemes that take least and most altogether."""
    common = set.intersection(*(set(found) for found in schemes.values()))
    candidates = sorted(common or {s for found in schemes.values() for s in found})
    everywhere = dict.fromkeys(schemes, candidates)
    sums = {cost: dict.fromkeys(candidates, 0.0) for cost in costs}
    for cost in costs:
        for (_, scheme), op in prices.ops(cost, everywhere):
            if op.key not in table.ms:
                _measure_products(table, [op], progress)
            sums[cost][scheme] += prices.scale(cost, op) * table.ms[op.key]
    first = sums[costs[0]]
    anchors = sorted({min(first, key=first.__getitem__), max(first, key=first.__getitem__)})
    totals = _running(table, prices, costs, anchors, budget, progress)
    return {
        cost: Fit.through(
            [sums[cost][scheme] for scheme in anchors], [totals[scheme][cost] for scheme in anchors]
        )
        for cost in costs
    }


def _running(
    table: TimingTable,
    prices: _Prices,
    costs: Sequence[str],
    schemes: Sequence[str],
    budget: LatencyBudget,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Scheme -> cost -> milliseconds of a random model of this shape, from the table or measured
    now."""
    own_head = not any(weight.head for weight in prices.model_map.weights)
    shape = _shape_digest(prices.spec, own_head)

    def key(scheme: str, cost: str) -> str:
        return f"model {shape} {scheme} {budget.mode or 'auto'} {cost}"

    missing = [s for s in schemes if any(key(s, cost) not in table.ms for cost in costs)]
    if missing:
        progress.start("time model", stopwatch.ROUNDS * len(missing))
        try:
            models = {s: random_model(prices.spec, s, own_head) for s in missing}
            threads = table.machine.threads
            found = latencies(models, costs, budget.mode, threads, progress.tick)
        finally:
            progress.finish()
        table.add({key(s, cost): ms for s, row in found.items() for cost, ms in row.items()})
    return {s: {cost: table.ms[key(s, cost)] for cost in costs} for s in schemes}


def _shape_digest(spec: EngineSpec, own_head: bool) -> str:
    """Of everything that the fixed part depends on."""
    plain = replace(spec, ropes=())
    text = f"{plain}{[len(rope.inverse_frequencies) for rope in spec.ropes]}{own_head}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _mode_text(mode: str | None) -> str:
    return "activations as the scheme says" if mode is None else f"activations {mode}"
