"""The measure stage: every weight in every candidate scheme, rounded once, scored, and kept in the layer bank.

One linear group at a time: its weights and statistics are read, all candidates are rounded together, each rounding error
is scored, and the packed tensors go to the bank with their score. The sensitivity table is then read off the bank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantlib.calibration.statistics import EmbeddingStatistics, GroupStatistics
from quantlib.checkpoint.bank import LayerBank
from quantlib.formats.weight import QuantizedWeight, dequantize, pack
from quantlib.models.rows import LinearGroup, Weight
from quantlib.pipeline import bytecount
from quantlib.pipeline.calibrate import embedding_statistics, group_statistics
from quantlib.pipeline.run import Run
from quantlib.rounding import RoundingOptions, concatenate, round_group
from quantlib.search import scores
from quantlib.search.sensitivity import Entry, Sensitivity

TASK = "kl"
Scorer = Callable[[Tensor, Tensor], tuple[float, float]]
"""(weight, error) -> (predicted KL per token in nats, its standard error)."""


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
        for scheme in run.schemes:
            found = run.bank.entry(entry_key(run, weight.name, str(scheme))).extra
            size = bytecount.weight_bytes(weight, scheme)
            entries[str(scheme)] = Entry(size, {TASK: found["loss"]}, {TASK: found["error"]})
        rows[weight.name] = entries
    provenance = {"source": run.source_hash, "statistics": run.statistics_hash, "bank": run.rounding_hash}
    return Sensitivity(run.source.fingerprint, (TASK,), rows, provenance)


def entry_key(run: Run, weight: str, scheme: str) -> str:
    """The bank key of a weight in a scheme under this run's rounding."""
    return LayerBank.key(weight, scheme, run.rounding_hash)


def _complete(run: Run, group: LinearGroup) -> bool:
    return all(run.bank.has(entry_key(run, name, str(s))) for name in group.members for s in run.schemes)


def _measure_group(run: Run, group: LinearGroup) -> None:
    started = time.monotonic()
    weights = {name: run.model_map.weight(name) for name in group.members}
    if group.block is None:
        rounded, scorers = _round_embedding(run, weights)
    else:
        rounded, scorers = _round_block_group(run, group, weights)
    seconds = (time.monotonic() - started) / len(rounded)
    with run.bank.batch() as batch:
        for (name, index), (quantized, parts) in rounded.items():
            loss, error = 0.0, 0.0
            for part_weight, part, scorer in zip(parts, _split(quantized, len(parts)), scorers[name], strict=True):
                one, one_error = scorer(part_weight, part - part_weight)
                loss, error = loss + one, error + one_error
            extra = {"loss": loss, "error": error}
            batch.put(name, str(run.schemes[index]), run.rounding_hash, pack(quantized), extra, seconds)


Rounded = dict[tuple[str, int], tuple[QuantizedWeight, list[Tensor]]]
"""(weight name, candidate) -> the whole weight (stacks as [E*N, K]) and its original matrices."""


def _round_block_group(
    run: Run, group: LinearGroup, weights: Mapping[str, Weight]
) -> tuple[Rounded, dict[str, list[Scorer]]]:
    """Round a group inside a block; a stack of experts matrix by matrix, each under its own Hessian."""
    stats = group_statistics(run, group.name)
    originals = {name: list(_matrices(run.source.read(name).float())) for name in weights}
    pieces: dict[tuple[str, int], list[QuantizedWeight]] = {}
    options = RoundingOptions(run.recipe.damping, run.recipe.passes)
    for index, matrix in enumerate(stats.matrices):
        members = {name: originals[name][index] for name in weights}
        layouts = [scheme.segments(next(iter(members.values())).shape[1]) for scheme in run.schemes]
        for key, value in round_group(members, matrix.hessian, layouts, options).items():
            pieces.setdefault(key, []).append(value)
    rounded = {key: (concatenate(parts), originals[key[0]]) for key, parts in pieces.items()}
    return rounded, {name: _block_scorers(run, stats, name) for name in weights}


def _block_scorers(run: Run, stats: GroupStatistics, name: str) -> list[Scorer]:
    """One scorer per matrix; an expert counts by the share of tokens it saw."""
    total = max(m.tokens for m in stats.matrices) if len(stats.matrices) == 1 else run.windows.numel()
    generator = torch.Generator().manual_seed(run.recipe.seed)

    def scorer(index: int) -> Scorer:
        matrix = stats.matrices[index]
        share = matrix.tokens / total

        def score(weight: Tensor, error: Tensor) -> tuple[float, float]:
            if matrix.has_gradients:
                loss = scores.fisher_score(error, matrix, name) * share
            else:
                loss = scores.output_score(weight, error, matrix) * share
            return loss, loss * scores.relative_error(error, matrix, name, generator)

        return score

    return [scorer(index) for index in range(len(stats.matrices))]


def _round_embedding(run: Run, weights: Mapping[str, Weight]) -> tuple[Rounded, dict[str, list[Scorer]]]:
    """Round an embedding, a head, or both in one tied weight."""
    stats = embedding_statistics(run)
    options = RoundingOptions(run.recipe.damping, run.recipe.passes)
    rounded: Rounded = {}
    scorers: dict[str, list[Scorer]] = {}
    for name, weight in weights.items():
        head = weight.kind == "head" or weight.head is not None
        lookup = weight.kind == "embedding"
        original = run.source.read(name).float()
        layouts = [scheme.segments(original.shape[1]) for scheme in run.schemes]
        hessian = embedding_hessian(stats, head, lookup)
        for key, value in round_group({name: original}, hessian, layouts, options).items():
            rounded[key] = (value, [original])
        scorers[name] = [_embedding_scorer(stats, head, lookup, run.recipe.seed)]
    return rounded, scorers


def embedding_hessian(stats: EmbeddingStatistics, head: bool, lookup: bool) -> Tensor:
    """One Hessian [D, D] for all rows of an embedding: the average row's.

    As a head, row v costs variance_v h h^T; as an embedding, frequency_v times the gradient's second moment.
    """
    rows = len(stats.variance)
    hessian = torch.zeros_like(stats.head_input)
    if head:
        hessian += stats.head_input * (stats.variance.sum() / rows)
    if lookup:
        hessian += torch.diag(stats.gradient) / rows
    return hessian


def _embedding_scorer(stats: EmbeddingStatistics, head: bool, lookup: bool, seed: int) -> Scorer:
    generator = torch.Generator().manual_seed(seed)

    def score(_: Tensor, error: Tensor) -> tuple[float, float]:
        loss = scores.embedding_score(error, stats, head, lookup)
        return loss, loss * scores.embedding_relative_error(error, stats, generator)

    return score


def _matrices(weight: Tensor) -> tuple[Tensor, ...]:
    """The matrices [N, K] of a weight [N, K] or a stack [E, N, K]."""
    return weight.unbind(0) if weight.dim() == 3 else (weight,)


def _split(quantized: QuantizedWeight, parts: int) -> tuple[Tensor, ...]:
    """Dequantized matrices of a stack that is stored as [E*N, K]."""
    return dequantize(quantized).chunk(parts)


