"""The measure stage: every weight in every candidate scheme, rounded once, scored, and kept in the
layer bank.

One linear group at a time: its weights and statistics are read, all candidates are rounded
together, each rounding error is scored, and the packed tensors go to the bank with their score. The
sensitivity table is then read off the bank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.calibration.statistics import EmbeddingStatistics, GroupStatistics
from quantlib.checkpoint.bank import LayerBank
from quantlib.formats.activation import fake_quantize
from quantlib.formats.scheme import Scheme
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
        for scheme in run.candidates[weight.name]:
            found = run.bank.entry(entry_key(run, weight.name, str(scheme))).extra
            size = bytecount.weight_bytes(weight, scheme)
            entries[str(scheme)] = Entry(size, {TASK: found["loss"]}, {TASK: found["error"]})
        rows[weight.name] = entries
    provenance = {
        "source": run.source_hash,
        "statistics": run.statistics_hash,
        "bank": run.rounding_hash,
    }
    return Sensitivity(
        run.model_map.fingerprint, (TASK,), rows, provenance, extra_bytes=run.extra_bytes
    )


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
    if group.block is None:
        candidates = _round_embedding(run, weights, schemes)
    else:
        candidates = _round_block_group(run, group, schemes)
    seconds = (time.monotonic() - started) / len(missing)
    with run.bank.batch() as batch:
        for key in missing:
            quantized, matrices = candidates[key]
            losses, errors = zip(*_scored(quantized, matrices, key[1]), strict=True)
            extra = {"loss": math.fsum(losses), "error": math.fsum(errors)}
            batch.put(*key, run.rounding_hash, pack(quantized), extra, seconds)


@dataclass(frozen=True)
class _Matrix:
    """One original matrix [N, K] of a weight (of a stack there are several), and how its rounding
    error is scored; `rounded_inputs` scores the rounding of its inputs, where there is any."""

    original: Tensor
    score: Scorer
    rounded_inputs: Callable[[Tensor, Scheme], float] = lambda weight, scheme: 0.0


Candidates = dict[tuple[str, str], tuple[QuantizedWeight, list[_Matrix]]]
"""(weight name, scheme) -> the whole weight (stacks as [E*N, K]), and what it was rounded from."""


def _scored(
    quantized: QuantizedWeight, matrices: list[_Matrix], scheme: str
) -> Iterator[tuple[float, float]]:
    """(loss, standard error) of every matrix of a weight: rounding errors of weights and of inputs
    are independent, so their losses add; so do their relative errors, which are of the windows."""
    parsed = Scheme.parse(scheme)
    for matrix, value in zip(matrices, dequantize(quantized).chunk(len(matrices)), strict=True):
        loss, error = matrix.score(matrix.original, value - matrix.original)
        inputs = matrix.rounded_inputs(value, parsed)
        yield loss + inputs, error * (1 + inputs / loss if loss > 0 else 1.0)


def _round_block_group(run: Run, group: LinearGroup, schemes: list[Scheme]) -> Candidates:
    """Round a group inside a block; a stack of experts matrix by matrix, each under its own
    Hessian."""
    stats = ordered_statistics(run, group)
    originals = {name: _matrices(ordered_weight(run, name)) for name in group.members}
    options = RoundingOptions(run.recipe.damping, run.recipe.passes)
    columns = run.model_map.weight(group.members[0]).in_features
    segments = [scheme.segments(columns) for scheme in schemes]
    layouts = list(dict.fromkeys(segments))  # candidates may differ in their activations alone
    pieces: dict[tuple[str, int], list[QuantizedWeight]] = {}
    for index, statistics in enumerate(stats.matrices):
        members = {name: originals[name][index] for name in group.members}
        for key, value in round_group(members, statistics.hessian, layouts, options).items():
            pieces.setdefault(key, []).append(value)
    matrices = {
        name: [
            _Matrix(
                original,
                _block_scorer(run, stats, index, name),
                _input_scorer(run, stats, index, name),
            )
            for index, original in enumerate(originals[name])
        ]
        for name in group.members
    }
    whole = {key: concatenate(parts) for key, parts in pieces.items()}
    return {
        (name, str(scheme)): (whole[name, layouts.index(layout)], matrices[name])
        for name in group.members
        for scheme, layout in zip(schemes, segments, strict=True)
    }


def _block_scorer(run: Run, stats: GroupStatistics, index: int, name: str) -> Scorer:
    """The score of one matrix; an expert counts by the share of tokens it saw."""
    statistics = stats.matrices[index]
    share = statistics.tokens / run.windows.numel() if len(stats.matrices) > 1 else 1.0

    def score(weight: Tensor, error: Tensor) -> tuple[float, float]:
        if statistics.has_gradients:
            loss = scores.fisher_score(error, statistics, name) * share
        else:
            loss = scores.output_score(weight, error, statistics) * share
        return loss, loss * scores.relative_error(error, statistics, name, _bootstrap(run))

    return score


def _input_scorer(
    run: Run, stats: GroupStatistics, index: int, name: str
) -> Callable[[Tensor, Scheme], float]:
    """The score of rounding the inputs of one matrix, on the sampled tokens."""
    statistics = stats.matrices[index]
    share = statistics.tokens / run.windows.numel() if len(stats.matrices) > 1 else 1.0

    def score(weight: Tensor, scheme: Scheme) -> float:
        segments = scheme.activations(weight.shape[1])
        if not segments or not len(statistics.sample_x):
            return 0.0
        x = statistics.sample_x.float()
        error = fake_quantize(x, segments) - x
        return scores.activation_score(weight, error, statistics, name) * share

    return score


def ordered_weight(run: Run, name: str) -> Tensor:
    """A weight of the source, float32, with its columns in the order it is packed in."""
    weight = run.source.read(name).float()
    order = run.orders.get(name)
    return weight if order is None else weight[..., order]


def ordered_statistics(run: Run, group: LinearGroup) -> GroupStatistics:
    """The statistics of a group, of inputs in the order its members are packed in."""
    stats = group_statistics(run, group.name)
    order = run.orders.get(group.members[0])
    if order is None:
        return stats
    return GroupStatistics(group.name, [matrix.reordered(order) for matrix in stats.matrices])


def _bootstrap(run: Run) -> torch.Generator:
    """The same resampled windows for every candidate: their errors differ by what differs."""
    return torch.Generator().manual_seed(run.recipe.seed)


def _round_embedding(run: Run, weights: list[Weight], schemes: list[Scheme]) -> Candidates:
    """Round an embedding, a head, or both in one tied weight."""
    stats = embedding_statistics(run)
    options = RoundingOptions(run.recipe.damping, run.recipe.passes)
    candidates: Candidates = {}
    for weight in weights:
        head = weight.kind == "head" or weight.head is not None
        lookup = weight.kind == "embedding"
        original = run.source.read(weight.name).float()
        layouts = [scheme.segments(weight.in_features) for scheme in schemes]
        hessian = embedding_hessian(stats, head, lookup)
        matrix = _Matrix(original, _embedding_scorer(run, stats, head, lookup))
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
        hessian += torch.diag(stats.gradient) / rows
    return hessian


def _embedding_scorer(run: Run, stats: EmbeddingStatistics, head: bool, lookup: bool) -> Scorer:
    """Its Fisher score; without gradients relative to the whole weight's, in each of its uses, to
    be comparable with the scores of blocks."""
    uses = [use for use in ((True, False), (False, True)) if use[0] <= head and use[1] <= lookup]

    def score(weight: Tensor, error: Tensor) -> tuple[float, float]:
        if run.recipe.gradients:
            loss = scores.embedding_score(error, stats, head, lookup)
        else:
            loss = math.fsum(
                scores.embedding_score(error, stats, *use)
                / max(scores.embedding_score(weight, stats, *use), 1e-30)
                for use in uses
            )
        return loss, loss * scores.embedding_relative_error(error, stats, _bootstrap(run))

    return score


def _matrices(weight: Tensor) -> tuple[Tensor, ...]:
    """The matrices [N, K] of a weight [N, K] or a stack [E, N, K]."""
    return weight.unbind(0) if weight.dim() == 3 else (weight,)
