"""Random models that tie the times of products to those of whole steps.

They have the shape of the model to be priced, do while they run what its checkpoints will do, and
take their schemes by lot, as a plan's matrices have theirs: of the smaller half of every matrix's
candidates, of all of them, and of the larger half.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from quantlib.formats.scheme import Scheme
from quantlib.formats.size import true_bits
from quantlib.kernels.cpu.engine_library import Decoder
from quantlib.kernels.kv_format import KvFormat
from quantlib.kernels.timing import TimingTable
from quantlib.pipeline.run import Progress
from quantlib.recipe import Recipe
from quantlib.runtime import stopwatch
from quantlib.runtime.engine_changes import Changes, typical_changes
from quantlib.runtime.engine_spec import EngineSpec
from quantlib.runtime.engine_weights import HEAD, Plan
from quantlib.runtime.stopwatch import Fit, draw, latencies, random_model

_KEPT = "bf16"


def changes_of(recipe: Recipe, spec: EngineSpec, own_head: bool) -> Changes:
    """What a checkpoint of this recipe does while it runs, as far as it takes time.

    own_head: its head has a weight of its own, into which the last change of basis is fused.
    """
    turned = recipe.rotation != "none"
    return typical_changes(
        spec, residual=turned and not own_head, rotated=turned, kv=_kv_format(recipe)
    )


def _kv_format(recipe: Recipe) -> KvFormat:
    """Where formats are to be found for a number of bits, those that have about as many."""
    bits = recipe.kv_bits
    if bits is None:
        return KvFormat.parse(recipe.kv)
    return KvFormat.parse("int4" if bits < 6 else "int8/int4" if bits < 7.5 else "int8")


class RandomModels:
    """Random models of one shape that do what checkpoints will do, in one mode."""

    def __init__(self, spec: EngineSpec, plan: Plan, changes: Changes, mode: str | None) -> None:
        self._spec, self._plan, self._changes, self._mode = spec, plan, changes, mode

    def drawn(self, schemes: Mapping[str, Sequence[str]]) -> list[tuple[dict[str, str], Decoder]]:
        """The models, made anew: the scheme of every matrix, and the model."""
        return [(one, self._build(one)) for one in self._draw(schemes)]

    def _build(self, drawn: Mapping[str, str]) -> Decoder:
        return random_model(self._spec, drawn, HEAD in self._plan.matrices, self._changes)

    def fits(
        self,
        table: TimingTable,
        products: Mapping[str, Mapping[tuple[str, str], float]],
        schemes: Mapping[str, Sequence[str]],
        progress: Progress,
    ) -> dict[str, Fit]:
        """Cost -> its Fit. products: cost -> (weight, scheme) -> ms alone."""
        drawn = self._draw(schemes)
        totals = self._running(table, list(products), drawn, progress)
        return {
            cost: Fit.through(
                [math.fsum(rows.get(pair, 0.0) for pair in one.items()) for one in drawn],
                [found[cost] for found in totals],
            )
            for cost, rows in products.items()
        }

    def _draw(self, schemes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
        """The schemes of the models: matrix -> scheme. One for each that is different."""
        known = {name: schemes.get(name, (_KEPT,)) for name in self._plan.matrices}
        ordered = {
            name: sorted(found, key=lambda scheme: (self._bits(name, scheme), scheme))
            for name, found in known.items()
        }
        halves = [
            {name: found[: (len(found) + 1) // 2] for name, found in ordered.items()},
            ordered,
            {name: found[len(found) // 2 :] for name, found in ordered.items()},
        ]
        drawn = [draw(self._plan, half) for half in halves]
        return [one for index, one in enumerate(drawn) if one not in drawn[:index]]

    def _bits(self, name: str, scheme: str) -> float:
        return true_bits(Scheme.parse(scheme), self._plan.matrices[name])[0]

    def _running(
        self,
        table: TimingTable,
        costs: Sequence[str],
        drawn: Sequence[Mapping[str, str]],
        progress: Progress,
    ) -> list[dict[str, float]]:
        """Cost -> milliseconds of each of these models, from the table or measured now."""
        about = f"{self._shape()} {self._mode or 'auto'}"
        names = [f"model {_digest(sorted(one.items()))} {about}" for one in drawn]
        missing = {
            name: one
            for name, one in zip(names, drawn, strict=True)
            if any(f"{name} {cost}" not in table.ms for cost in costs)
        }
        if missing:
            progress.start("time model", stopwatch.ROUNDS * len(missing))
            try:
                models = {name: self._build(one) for name, one in missing.items()}
                threads = table.machine.threads
                found = latencies(models, costs, self._mode, threads, progress.tick)
            finally:
                progress.finish()
            table.add({f"{n} {cost}": ms for n, row in found.items() for cost, ms in row.items()})
        return [{cost: table.ms[f"{name} {cost}"] for cost in costs} for name in names]

    def _shape(self) -> str:
        """A digest of everything that the fixed part depends on."""
        spec, changes = self._spec, self._changes
        lengths = [len(rope.inverse_frequencies) for rope in spec.ropes]
        hidden = {layer: turn.size for layer, turn in changes.hidden.items()}
        caches = {layer: str(cache) for layer, cache in changes.caches.items()}
        online = [changes.residual is not None, sorted(changes.key_bases), hidden, caches]
        return _digest([replace(spec, ropes=()), lengths, HEAD in self._plan.matrices, online])


def _digest(what: object) -> str:
    """Of something whose text says all."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
