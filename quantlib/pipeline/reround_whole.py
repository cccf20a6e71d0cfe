"""`--refine` for models that are run as a whole: every block of every stack is rounded again, with
the inputs that the already rounded parts before it produce.

What `reround` does to a language model, for models that cannot be taken apart (`replay`). Both
models are in memory: the full-precision one, and a copy that holds the plan's bank entries, rounds
inputs, keys and values as the plan says, and takes over what was rounded again. Units (blocks, and
linears outside of them, such as a projector's) are gone through in the order in which records run
them. Each is recorded in both models and replayed for its groups one by one: the target is moved
towards what makes good what the stream lacks behind it (`rounding.asymmetric`), and rounded under
the moments of the inputs it will really have, tokens and streams weighed as calibration weighs
them. A group's new weights are kept if the unit then loses less on every fifth record of each
stream, which is not fitted.

Convolutions, embeddings, heads, stacks of experts and weights that stay as they are keep what the
bank has; so do units that give something else when they are run alone, and those that no record
runs. Clip factors of inputs stay 1, and no codes are learned. Whether the whole ships is decided by
the tasks' true losses on held-back records (`apply.py`).

A finished unit is in the bank, so a run that was killed goes on behind the last.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.calibration.statistics import MatrixStatistics
from quantlib.checkpoint.bank import LayerBank
from quantlib.checkpoint.provenance import digest
from quantlib.formats.composite import StoredWeight, dequantize_stored, pack_stored
from quantlib.formats.scheme import KEPT, Scheme
from quantlib.models.rows import LinearGroup
from quantlib.pipeline import parts
from quantlib.pipeline.block_rounding import TOKEN_POWER
from quantlib.pipeline.dense import DensePlan
from quantlib.pipeline.inputs import round_cache
from quantlib.pipeline.planned_block import Windows
from quantlib.pipeline.replay import Discovery, Unit, discover, recorded, records_of, units_of
from quantlib.pipeline.replayed_unit import CallMetric, Pair, ReplayedUnit
from quantlib.pipeline.row_blocks import stored_weight
from quantlib.pipeline.run import Run
from quantlib.rounding import RoundingOptions, round_members
from quantlib.rounding.asymmetric import least_squares_targets
from quantlib.rounding.rows import block_of_rows

REROUND_WHOLE_VERSION = 1
"""Raise when re-rounding changes: plans are then re-rounded again."""


def reround_whole_inputs(run: Run, schemes: Mapping[str, str]) -> str:
    """What re-rounded entries of this plan depend on: the `inputs_hash` of their bank keys."""
    how: list[Any] = [run.recipe.kv, run.recipe.strength, "whole", REROUND_WHOLE_VERSION]
    return digest([run.rounding_hash, dict(schemes), how])


def reround_whole(run: Run, schemes: Mapping[str, str]) -> dict[str, str]:
    """Re-round a plan (weight -> scheme). Returns weight -> bank key of what was re-rounded."""
    inputs = reround_whole_inputs(run, schemes)
    units = units_of(run.model_map)
    keys = {
        unit.name: {
            name: LayerBank.key(name, schemes[name], inputs)
            for name in unit.members
            if is_rerounded(schemes[name])
        }
        for unit in units
    }
    if not all(_has(run, own) for own in keys.values()):
        _reround_units(run, schemes, inputs, units, keys)
    return {name: key for own in keys.values() for name, key in own.items()}


def is_rerounded(scheme: str) -> bool:
    """Whether a linear in this scheme is rounded again: not one that stays as it is, and not one
    that has factors beside it."""
    return scheme not in KEPT and Scheme.parse(scheme).low_rank is None


def _has(run: Run, keys: Mapping[str, str]) -> bool:
    return all(run.bank.has(key) for key in keys.values())


@torch.no_grad()
def _reround_units(
    run: Run,
    schemes: Mapping[str, str],
    inputs: str,
    units: Sequence[Unit],
    keys: Mapping[str, Mapping[str, str]],
) -> None:
    """Re-round what the bank lacks, unit by unit in the order in which they run."""
    exact, plan = parts.whole_model(run), DensePlan(run)
    round_cache(plan.model, run)
    by_name = {unit.name: unit for unit in units}
    count = sum(len(run.streams.calibration[task]) for task in run.tasks)
    with run.stage("re-round", count + len(units)) as progress:
        found = discover(run.streams, exact, units, progress.tick)
        never = [unit.name for unit in units if unit.name not in found.order]
        plan.load(schemes)
        carried: dict[str, list[Pair]] = {}
        for place, name in enumerate((*found.order, *never)):
            unit, own, given = by_name[name], keys[name], carried
            carried = {}
            if _has(run, own):
                plan.load({member: schemes[member] for member in own}, own)
                progress.tick(name)
                continue
            started = time.monotonic()
            work = _Rounding(run, unit, schemes)
            if name in found.order and own:
                pairs = given[name] if name in given else _recorded(run, exact, plan, name, found)
                work.run_on(exact, plan, found, pairs)
                for following in found.order[place + 1 : place + 2]:
                    if work.replayed is not None and found.before.get(following) == name:
                        carried = {following: work.replayed.carry(work.dense(work.weights))}
            _keep(run, work, schemes, inputs, time.monotonic() - started)
            plan.load({member: schemes[member] for member in own}, own)
            progress.tick(f"{name}: {work.outcome}")


def _recorded(
    run: Run, exact: nn.Module, plan: DensePlan, unit: str, found: Discovery
) -> list[Pair]:
    """All calls of a unit in both models, by passes over all records."""
    models = (exact, plan.model)
    mine, theirs = recorded(run.streams, exact, models, unit, found.calls[unit])
    return [Pair(a, b) for a, b in zip(mine, theirs, strict=True)]


def _keep(
    run: Run, work: _Rounding, schemes: Mapping[str, str], inputs: str, seconds: float
) -> None:
    """Put the weights of a unit into the bank, all or none."""
    extra = {"before": work.before, "after": work.after}
    with run.bank.batch() as batch:
        for name, weight in work.weights.items():
            batch.put(name, schemes[name], inputs, pack_stored(weight), extra, seconds)


class _Rounding:
    """The rounding of one unit in progress.

    weights: name -> what it is rounded to by now; the bank's entries at first.
    before, after: what the unit's output loses on the calls that judge, relative to all of it, with
             the bank's entries and with `weights`; 0 where that was not measured.
    kept:    groups whose re-rounding was better than what the bank has.
    outcome: what happened, in words.
    replayed: the unit, once it was run alone and gave what the model gives.
    """

    def __init__(self, run: Run, unit: Unit, schemes: Mapping[str, str]) -> None:
        self.run, self.unit, self.schemes = run, unit, schemes
        names = [name for name in unit.members if is_rerounded(schemes[name])]
        self.weights = {name: stored_weight(run, name, schemes[name]) for name in names}
        self.before = self.after = 0.0
        self.kept: list[str] = []
        self.replayed: ReplayedUnit | None = None
        self.outcome = "as the bank has it: no record runs it" if names else "stays as it is"

    def run_on(
        self, exact: nn.Module, plan: DensePlan, found: Discovery, pairs: Sequence[Pair]
    ) -> None:
        """Re-round the unit's groups. pairs: all its calls."""
        name, started = self.unit.name, time.monotonic()
        mine = [pair.exact for pair in pairs]
        if not found.faithful(name, exact.get_submodule(name), mine):
            self.outcome = "as the bank has it: run alone, it gives something else"
            return
        fit, held = _split(self.run, [pair.record for pair in pairs])
        replayed = ReplayedUnit(self.unit, exact, plan.model, pairs, fit, held)
        self.replayed = replayed
        replayed.observe()
        importance = _Importance(self.run, replayed)
        metric = importance.metric()
        self.before = self.after = replayed.judge(self.dense(self.weights), metric)
        for group in replayed.groups:
            self._group(replayed, group, importance.of(group), metric)
        kept = ", ".join(self.kept) or "nothing"
        seconds = time.monotonic() - started
        self.outcome = (
            f"{self.before:.4g} -> {self.after:.4g} in {seconds:.0f} s (re-rounded {kept})"
        )

    def _group(
        self,
        replayed: ReplayedUnit,
        group: LinearGroup,
        token_weight: Sequence[Tensor],
        metric: CallMetric,
    ) -> None:
        """Round one group again, and keep it if the unit loses less."""
        members = [name for name in group.members if name in self.weights]
        if not members:
            return
        run, dense = self.run, self.dense(self.weights)
        fit, held = replayed.moments(group, members, dense, token_weight)
        originals = {name: replayed.originals[name].float() for name in members}
        targets = least_squares_targets(originals, fit, held, run.recipe.strength)
        hessian = fit.together(held).hessian
        order = run.orders.get(members[0])
        rounded = round_members(
            {name: self._packed(name, target.weight) for name, target in targets.items()},
            hessian if order is None else hessian[order][:, order],
            {name: Scheme.parse(self.schemes[name]) for name in members},
            {name: block_of_rows(self.weights[name]) for name in members},
            RoundingOptions(run.damping, run.recipe.passes),
        )
        loss = replayed.judge(self.dense({**self.weights, **rounded}), metric)
        if loss < self.after:
            self.weights |= rounded
            self.after = loss
            self.kept.append(group.name)

    def dense(self, weights: Mapping[str, StoredWeight]) -> dict[str, Tensor]:
        """Dequantized, with columns in the order of the model's inputs."""
        found = {name: dequantize_stored(weight) for name, weight in weights.items()}
        orders = {name: self.run.orders.get(name) for name in found}
        return {
            name: value if (order := orders[name]) is None else value[:, torch.argsort(order)]
            for name, value in found.items()
        }

    def _packed(self, name: str, value: Tensor) -> Tensor:
        """Columns [N, K] from the order of the model's inputs to that of packing."""
        order = self.run.orders.get(name)
        return value if order is None else value[:, order]


def _split(run: Run, records: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices of the calls that are fitted, and of those that judge; records: the record of each.

    Every fifth record of a stream judges (`Windows.split`), of those that call the unit."""
    fit: list[int] = []
    held: list[int] = []
    for own in records_of(run.streams).values():
        seen = [record for record in dict.fromkeys(records) if record in own]
        if not seen:
            continue
        chosen = Windows.split(len(seen))
        fitted, judging = ({seen[i] for i in part} for part in (chosen.fit, chosen.held))
        fit += [call for call, record in enumerate(records) if record in fitted]
        held += [call for call, record in enumerate(records) if record in judging]
    return fit, held


class _Importance:
    """How much each token of a unit's calls counts: a stream by the energy of its gradients
    relative to the full-precision loss, a token within it by its own gradient."""

    def __init__(self, run: Run, replayed: ReplayedUnit) -> None:
        self.run, self.replayed = run, replayed
        records = [pair.record for pair in replayed.pairs]
        self.calls = {
            task: [call for call, record in enumerate(records) if record in own]
            for task, own in records_of(run.streams).items()
        }
        self.scales = parts.stream_weights(run)
        self.once = len(set(records)) == len(records)

    def of(self, group: LinearGroup) -> list[Tensor]:
        """Token weights [T] of a group's rows in every call, for moments: of mean 1, tempered as
        `block_rounding` tempers them."""
        by_energy = self.run.recipe.stream_weighting == "token"
        return self._weights(group, TOKEN_POWER if by_energy else 1.0)

    def metric(self) -> CallMetric:
        """What errors at the unit's output cost: squared gradients, as far as calibration kept
        them; all tokens of a stream alike where no group's gradients are those of the output."""
        felt = self.replayed.feels
        lengths = [len(output) for output in self.replayed.outputs]
        widths = [output.shape[1] for output in self.replayed.outputs]
        if felt is None or self.replayed.tokens[felt.name] != lengths:
            return CallMetric(
                [torch.ones(length) for length in lengths],
                [torch.ones(width) for width in widths],
            )
        power = 2.0 if self.run.recipe.stream_weighting == "root" else 1.0
        outputs = [torch.ones(width) for width in widths]
        for task, matrix in self._matrices(felt).items():
            fisher = matrix.fisher.get(felt.members[0])
            if fisher is not None and float(fisher.sum()) > 0:
                for call in self.calls[task]:
                    outputs[call] = fisher / fisher.sum()
        return CallMetric(self._weights(felt, power), outputs)

    def _matrices(self, group: LinearGroup) -> dict[str, MatrixStatistics]:
        return {
            task: stats.matrices[0]
            for task, stats in parts.group_parts(self.run, group.name).items()
        }

    def _weights(self, group: LinearGroup, power: float) -> list[Tensor]:
        """Weights of mean 1 of a group's rows in every call: those of a stream sum to its energy,
        within it they are calibration's token weights to a power; all alike where these are of
        other rows (a unit that a record calls several times)."""
        rows = self.replayed.tokens[group.name]
        found = [torch.zeros(count) for count in rows]
        for task, matrix in self._matrices(group).items():
            own = self.calls[task]
            count = sum(rows[call] for call in own)
            known = matrix.token_weight[:count].clamp(min=0).double().pow(power)
            if not self.once or len(known) < count or not float(known.sum()) > 0:
                known = torch.ones(count, dtype=torch.float64)
            known = known * (self.scales[task] * matrix.energy / known.sum().clamp(min=1e-300))
            for call, weight in zip(own, known.split([rows[call] for call in own]), strict=True):
                found[call] = weight
        every = torch.cat([weight.double() for weight in found])
        mean = float(every.mean()) if len(every) else 0.0
        if not mean > 0:
            return [torch.ones(count) for count in rows]
        return [(weight / mean).float() for weight in found]
