"""The measure stage: every weight in every candidate scheme, rounded once, scored, and kept in the
layer bank.

One linear group at a time: its weights and statistics are read, all candidates are rounded
together, each rounding error is scored in every task, and the packed tensors go to the bank with
their scores. The sensitivity table is then read off the bank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.calibration.statistics import EmbeddingStatistics, GroupStatistics
from quantlib.checkpoint.bank import LayerBank
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import QuantizedWeight, pack
from quantlib.models.rows import LinearGroup, Weight
from quantlib.pipeline import bytecount, parts
from quantlib.pipeline.calibrate import embedding_statistics, group_statistics
from quantlib.pipeline.plan import TASK
from quantlib.pipeline.run import Run
from quantlib.pipeline.scoring import (
    EmbeddingPart,
    Matrix,
    Part,
    embedding_matrix,
    matrix_of,
    scored,
)
from quantlib.rounding import RoundingOptions, concatenate, round_group
from quantlib.search.sensitivity import Entry, Sensitivity


def measure(run: Run) -> Sensitivity:
    """Fill the bank and return the table, without a calibration to measured KL (see `probe`)."""
    missing = [group for group in run.model_map.groups if not _complete(run, group)]
    with run.stage("measure", len(missing)) as progress:
        for group in missing:
            _measure_group(run, group)
            progress.tick(group.name)
    return sensitivity(run)


def sensitivity(run: Run) -> Sensitivity:
    """The table, read off the bank."""
    rows = {}
    for weight in run.model_map.weights:
        entries = {}
        for scheme in run.candidates[weight.name]:
            found = run.bank.entry(entry_key(run, weight.name, str(scheme))).extra
            entries[str(scheme)] = Entry(
                bytecount.weight_bytes(weight, scheme),
                {task: found[_extra("loss", task)] for task in run.tasks},
                {task: found[_extra("error", task)] for task in run.tasks},
            )
        rows[weight.name] = entries
    provenance = {
        "source": run.source_hash,
        "statistics": run.statistics_hash,
        "bank": run.rounding_hash,
    }
    whole = run.workload is not None
    return Sensitivity(
        run.model_map.fingerprint,
        run.tasks,
        rows,
        provenance,
        extra_bytes=run.extra_bytes,
        baseline={task: parts.baseline(run, task) for task in run.tasks} if whole else {},
    )


def _extra(what: str, task: str) -> str:
    """Under which name a bank entry keeps its loss, or the error of that, in a task."""
    return what if task == TASK else f"{what} {task}"


def entry_key(run: Run, weight: str, scheme: str) -> str:
    """The bank key of a weight in a scheme under this run's rounding."""
    return LayerBank.key(weight, scheme, run.rounding_hash)


def measured_groups(run: Run) -> int:
    """How many groups are in the bank in every candidate scheme."""
    return sum(_complete(run, group) for group in run.model_map.groups)


def _complete(run: Run, group: LinearGroup) -> bool:
    return all(
        run.bank.has(entry_key(run, name, str(scheme)))
        for name in group.members
        for scheme in run.candidates[name]
    )


def _measure_group(run: Run, group: LinearGroup) -> None:
    """Round, score and keep what the bank lacks of one group; what it has is not touched."""
    started = time.monotonic()
    weights = [run.model_map.weight(name) for name in group.members]
    missing = [
        (weight.name, str(scheme))
        for weight in weights
        for scheme in run.candidates[weight.name]
        if not run.bank.has(entry_key(run, weight.name, str(scheme)))
    ]
    wanted = {name for _, name in missing}
    schemes = [s for s in run.candidates[weights[0].name] if str(s) in wanted]
    if group.kind in ("embedding", "head"):
        candidates = _round_embedding(run, group, weights, schemes)
    else:
        candidates = _round_matrices(run, group, schemes)
    seconds = (time.monotonic() - started) / len(missing)
    with run.bank.batch() as batch:
        for key in missing:
            quantized, matrices = candidates[key]
            found = scored(quantized, matrices, key[1])
            extra = {_extra("loss", task): loss for task, (loss, _) in found.items()}
            extra |= {_extra("error", task): error for task, (_, error) in found.items()}
            batch.put(*key, run.rounding_hash, pack(quantized), extra, seconds)


Candidates = dict[tuple[str, str], tuple[QuantizedWeight, list[Matrix]]]
"""(weight name, scheme) -> the whole weight (stacks as [E*N, K]), and what it was rounded from."""


@dataclass(frozen=True)
class _Known:
    """Of a group: the statistics it is rounded under, and those of every task."""

    together: GroupStatistics
    parts: list[Part]


def _known(run: Run, group: LinearGroup) -> _Known:
    if run.workload is None:
        found = ordered_statistics(run, group)
        return _Known(found, [Part(TASK, found, run.windows.numel())])
    streams = parts.group_parts(run, group.name)
    return _Known(
        parts.summed_group(run, streams),
        [Part(task, own, parts.summary(run, task).terms) for task, own in streams.items()],
    )


def _round_matrices(run: Run, group: LinearGroup, schemes: list[Scheme]) -> Candidates:
    """Round linears or a convolution; a stack of experts matrix by matrix, each under its own
    Hessian."""
    known = _known(run, group)
    originals = {name: _matrices(run, name) for name in group.members}
    options = RoundingOptions(run.recipe.damping, run.recipe.passes)
    columns = run.model_map.weight(group.members[0]).in_features
    segments = [scheme.segments(columns) for scheme in schemes]
    layouts = list(dict.fromkeys(segments))  # candidates may differ in their activations alone
    pieces: dict[tuple[str, int], list[QuantizedWeight]] = {}
    for index, statistics in enumerate(known.together.matrices):
        members = {name: originals[name][index] for name in group.members}
        for key, value in round_group(members, statistics.hessian, layouts, options).items():
            pieces.setdefault(key, []).append(value)
    seed = run.recipe.seed
    matrices = {
        name: [
            matrix_of(original, known.parts, index, name, seed)
            for index, original in enumerate(originals[name])
        ]
        for name in group.members
    }
    whole = {key: concatenate(values) for key, values in pieces.items()}
    return {
        (name, str(scheme)): (whole[name, layouts.index(layout)], matrices[name])
        for name in group.members
        for scheme, layout in zip(schemes, segments, strict=True)
    }


def ordered_weight(run: Run, name: str) -> Tensor:
    """A weight of the source as it is rounded ([N, K], or [E, N, K]), float32, with its columns in
    the order it is packed in."""
    weight = run.model_map.weight(name).matrix(run.source.read(name)).float()
    order = run.orders.get(name)
    return weight if order is None else weight[..., order]


def ordered_statistics(run: Run, group: LinearGroup) -> GroupStatistics:
    """The statistics of a group, of inputs in the order its members are packed in."""
    stats = group_statistics(run, group.name)
    order = run.orders.get(group.members[0])
    if order is None:
        return stats
    return GroupStatistics(group.name, [matrix.reordered(order) for matrix in stats.matrices])


def _round_embedding(
    run: Run, group: LinearGroup, weights: Sequence[Weight], schemes: list[Scheme]
) -> Candidates:
    """Round an embedding, a head, or both in one tied weight."""
    if run.workload is None:
        stats = embedding_statistics(run)
        known = [EmbeddingPart(TASK, stats)]
    else:
        streams = parts.embedding_parts(run, group.name)
        stats = parts.summed_embedding(run, streams)
        known = [EmbeddingPart(task, own) for task, own in streams.items()]
    recipe = run.recipe
    options = RoundingOptions(recipe.damping, recipe.passes)
    candidates: Candidates = {}
    for weight in weights:
        head = weight.kind == "head" or weight.head is not None
        lookup = weight.kind == "embedding"
        original = run.source.read(weight.name).float()
        layouts = [scheme.segments(weight.in_features) for scheme in schemes]
        hessian = embedding_hessian(stats, head, lookup)
        matrix = embedding_matrix(original, known, head, lookup, recipe.gradients, recipe.seed)
        rounded = round_group({weight.name: original}, hessian, layouts, options)
        for (name, index), value in rounded.items():
            candidates[name, str(schemes[index])] = value, [matrix]
    return candidates


def embedding_hessian(stats: EmbeddingStatistics, head: bool, lookup: bool) -> Tensor:
    """One Hessian [D, D] for all rows of an embedding: the average row's.

    As a head, row v costs variance_v h h^T; as an embedding, frequency_v times the gradient's
    second moment.
    """
    rows = len(stats.variance)
    hessian = torch.zeros_like(stats.head_input)
    if head:
        hessian += stats.head_input * (stats.variance.sum() / rows)
    if lookup:
        lookups = float(stats.frequency.sum()) / max(stats.tokens, 1)  # per term of the loss
        hessian += torch.diag(stats.gradient * lookups) / rows
    return hessian


def _matrices(run: Run, name: str) -> tuple[Tensor, ...]:
    """The matrices [N, K] of a weight: several of a stack."""
    weight = ordered_weight(run, name)
    return weight.unbind(0) if weight.dim() == 3 else (weight,)
