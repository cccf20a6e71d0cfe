"""What every weight would cost in every scheme, in milliseconds, on this machine.

Three things are measured, and kept in the user's cache (`kernels.timing`):

1. every product alone, in the engine's own inner loop: rows x columns x scheme x tokens;
2. three running models of this shape with random weights, in schemes drawn from the smaller half of
   every matrix's candidates, from all of them, and from the larger half;
3. from both, what a running model adds that no scheme changes, and the factor by which products
   differ inside it (`runtime.stopwatch.Fit`).

A plan is then predicted as fixed + factor * (sum of its products). The engine shares out matrices
that read one input without waiting between them. So they are timed as one matrix of all their rows
in one scheme, of which each is charged its share.

What a recipe makes the checkpoint do while it runs is in the models: bases, Hadamard matrices, the
KV cache (`latency_models.changes_of`); they cost the same with all schemes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantlib.errors import UsageError
from quantlib.formats.scheme import Scheme
from quantlib.kernels import timing
from quantlib.kernels.cpu.engine_library import FAST, MODES, Decoder
from quantlib.kernels.cpu.forms import why_not
from quantlib.kernels.timing import Op, TimingTable, this_machine
from quantlib.models.modelmap import ModelMap
from quantlib.models.rows import Weight
from quantlib.pipeline.latency_models import RandomModels, changes_of
from quantlib.pipeline.run import Progress
from quantlib.recipe import Recipe
from quantlib.runtime.engine import CHUNK
from quantlib.runtime.engine_changes import NO_CHANGES
from quantlib.runtime.engine_spec import EngineSpec, unsupported
from quantlib.runtime.engine_weights import plan_of
from quantlib.runtime.load import load
from quantlib.runtime.stopwatch import latencies
from quantlib.search.latency import LatencyBudget, LatencyCosts, phase_of


def latency_costs(
    model_map: ModelMap,
    config: Mapping[str, Any],
    schemes: Mapping[str, Sequence[str]],
    budget: LatencyBudget,
    progress: Progress,
    recipe: Recipe | None = None,
    timings: Path | None = None,
) -> LatencyCosts:
    """Measure what is not in the cache yet, and price every weight.

    config: the model's config.json. schemes: weight -> its candidates. recipe: says what else the
    checkpoint will do while it runs; None: nothing. timings: folder of what is known already, the
    user's cache by default.
    Raises UsageError when the native engine does not run the model, or there are no kernels.
    """
    names = sorted(budget.limits())
    spec = _engine_spec(config, model_map)
    _check_inputs(model_map, schemes)
    machine = this_machine(budget.threads or torch.get_num_threads())
    table = TimingTable.load(machine, timings)
    said = table.problem
    if said:
        progress.say(said)
    prices = _Prices(model_map, budget.mode)
    priced = {cost: list(prices.ops(cost, schemes)) for cost in names}
    _measure_products(table, sorted({op for rows in priced.values() for *_, op in rows}), progress)
    products = {
        cost: {pair: share * table.ms[op.key] for pair, share, op in rows}
        for cost, rows in priced.items()
    }
    models = _random_models(model_map, spec, budget.mode, recipe)
    fits = models.fits(table, products, schemes, progress)
    if table.problem != said:
        progress.say(table.problem)
    free = dict.fromkeys(((weight, s) for weight, found in schemes.items() for s in found), 0.0)
    costs = {
        cost: free | {pair: fits[cost].factor * ms for pair, ms in rows.items()}
        for cost, rows in products.items()
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
    recipe: Recipe | None = None,
    timings: Path | None = None,
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
    config = model_config(folder)
    return latency_costs(model_map, config, schemes, budget, progress, recipe, timings)


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


def reference_models(
    model_map: ModelMap,
    folder: Path,
    schemes: Mapping[str, Sequence[str]],
    mode: str | None,
    recipe: Recipe | None = None,
) -> list[tuple[dict[str, str], Decoder]]:
    """The random models that predictions rest on: the scheme of every matrix, and the model."""
    spec = _engine_spec(model_config(folder), model_map)
    return _random_models(model_map, spec, mode, recipe).drawn(schemes)


def _random_models(
    model_map: ModelMap, spec: EngineSpec, mode: str | None, recipe: Recipe | None
) -> RandomModels:
    own_head = not any(weight.head for weight in model_map.weights)
    changes = NO_CHANGES if recipe is None else changes_of(recipe, spec, own_head)
    return RandomModels(spec, plan_of(spec, own_head), changes, mode)


class _Prices:
    """Which operations a model's weights are, for one mode."""

    def __init__(self, model_map: ModelMap, mode: str | None) -> None:
        self._mode, self._weights = mode, model_map.weights
        self._rows = {
            group.name: sum(weight.out_features for weight in model_map.members(group))
            for group in model_map.groups
        }

    def ops(
        self, cost: str, schemes: Mapping[str, Sequence[str]]
    ) -> Iterator[tuple[tuple[str, str], float, Op]]:
        """(weight, scheme), how many of the operation it is, operation. An embedding that is no
        head costs nothing: its rows are looked up."""
        for weight in self._weights:
            if weight.kind == "embedding" and weight.head is None:
                continue
            rows = self._rows[weight.group] if weight.kind == "linear" else weight.out_features
            for name in schemes[weight.name]:
                op = self._op(cost, weight, rows, Scheme.parse(name))
                yield (weight.name, name), weight.out_features / rows * _times(cost, op), op

    def _op(self, cost: str, weight: Weight, rows: int, scheme: Scheme) -> Op:
        phase, tokens = phase_of(cost)
        # only the last token of a prompt is given to the head
        at_once = 1 if phase == "decode" or weight.kind != "linear" else min(tokens, CHUNK)
        columns = str(Scheme(scheme.weight, high=scheme.high, higher=scheme.higher))
        return Op(
            rows, weight.in_features, columns, at_once, self._inputs(scheme, weight.in_features)
        )

    def _inputs(self, scheme: Scheme, columns: int) -> str:
        """How the engine takes a weight's inputs in this mode: the mode of its Op."""
        if self._mode in (None, FAST) and scheme.activation.is_integer:
            # as the kernels do: what all groups are multiples of
            group = math.gcd(*(part.format.group for part in scheme.activations(columns)))
        elif self._mode is None or MODES[self._mode] is None:
            return "exact"
        else:
            group = MODES[self._mode] or 0
        return f"int8g{group}" if group else "int8"


def _times(cost: str, op: Op) -> float:
    """How many of this operation the phase takes: a long prompt is read in pieces."""
    phase, tokens = phase_of(cost)
    return tokens / op.tokens if phase == "prefill" and op.tokens > 1 else 1.0


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
            if parsed.is_composite:
                reason: str | None = "it is several matrices"
            else:
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


def _mode_text(mode: str | None) -> str:
    return "activations as the scheme says" if mode is None else f"activations {mode}"
