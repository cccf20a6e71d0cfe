"""What a rounding error costs each task: predicted from the task's own statistics.

A run on text has one task, KL per token; a run on streams has one per stream, its loss per term.
Statistics are means over the tokens a matrix read, so a score is one per such token: it is
multiplied with how many of them there are for every term of the loss. For a dense linear of a
language model that is 1; an expert sees a share of the tokens, a vision tower may read hundreds of
patches for an answer of two words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.calibration.statistics import EmbeddingStatistics, GroupStatistics
from quantlib.formats.activation import fake_quantize
from quantlib.formats.composite import StoredWeight, dequantize_stored
from quantlib.formats.scheme import Scheme
from quantlib.search import scores

Score = tuple[float, float]
"""(predicted loss per term of the task, its standard error)."""


@dataclass(frozen=True)
class Part:
    """What one task knows of a group, and of how many terms its loss is the sum."""

    task: str
    statistics: GroupStatistics
    terms: int


@dataclass(frozen=True)
class EmbeddingPart:
    """The same of an embedding or a head."""

    task: str
    statistics: EmbeddingStatistics


@dataclass(frozen=True)
class TaskScore:
    """What rounding a matrix [N, K] costs one task.

    weight: of the rounded matrix alone. inputs: what rounding the inputs of the rounded matrix adds
    to that, in the same unit.
    """

    weight: Callable[[Tensor], Score]
    inputs: Callable[[Tensor, Scheme], float]


@dataclass(frozen=True)
class Matrix:
    """One original matrix [N, K] of a weight (of a stack there are several), and the scores of its
    rounding in every task."""

    original: Tensor
    scores: dict[str, TaskScore]


def scored(
    quantized: StoredWeight, matrices: Sequence[Matrix], schemes: Sequence[str]
) -> dict[str, dict[str, Score]]:
    """Scheme -> task -> score of a whole weight: matrices add, and so do their errors, which are of
    the same windows.

    schemes: all that round the weight to `quantized`, and differ in how they round its inputs.
    """
    found: dict[str, dict[str, Score]] = {name: {} for name in schemes}
    if not found:
        return found
    values = dequantize_stored(quantized).chunk(len(matrices))
    parsed = {name: Scheme.parse(name) for name in schemes}
    for task in matrices[0].scores:
        pairs = [(m.scores[task], value) for m, value in zip(matrices, values, strict=True)]
        alone = [score.weight(value) for score, value in pairs]
        for name, scheme in parsed.items():
            added = [score.inputs(value, scheme) for score, value in pairs]
            both = [together(*one, more) for one, more in zip(alone, added, strict=True)]
            losses, errors = zip(*both, strict=True)
            found[name][task] = math.fsum(losses), math.fsum(errors)
    return found


def together(loss: float, spread: float, inputs: float) -> Score:
    """Rounding errors of weights and of inputs are independent, so their losses add; so do their
    relative errors."""
    return loss + inputs, spread * (1 + inputs / loss if loss > 0 else 1.0)


def matrix_of(original: Tensor, parts: Sequence[Part], index: int, name: str, seed: int) -> Matrix:
    """Matrix `index` of the weight `name`; seed: of the resampled windows of standard errors."""
    return Matrix(original, {p.task: _matrix_score(original, p, index, name, seed) for p in parts})


def _matrix_score(original: Tensor, part: Part, index: int, name: str, seed: int) -> TaskScore:
    """What the task never runs costs it nothing."""
    statistics = part.statistics.matrices[index]
    share = statistics.tokens / part.terms

    def weight_score(value: Tensor) -> Score:
        if not statistics.tokens:
            return 0.0, 0.0
        error = value - original
        if statistics.has_gradients:
            loss = scores.fisher_score(error, statistics, name) * share
        else:
            loss = scores.output_score(original, error, statistics) * share
        return loss, loss * scores.relative_error(error, statistics, name, _bootstrap(seed))

    def inputs_score(value: Tensor, scheme: Scheme) -> float:
        """Of rounding the inputs, on the sampled tokens."""
        segments = scheme.activations(value.shape[1])
        if not segments or not statistics.tokens or not len(statistics.sample_x):
            return 0.0
        x = statistics.sample_x.float()
        error = fake_quantize(x, segments) - x
        return scores.activation_score(value, error, statistics, name) * share

    return TaskScore(weight_score, inputs_score)


def embedding_matrix(
    original: Tensor,
    parts: Sequence[EmbeddingPart],
    head: bool,
    lookup: bool,
    gradients: bool,
    seed: int,
) -> Matrix:
    """An embedding (`lookup`), a head, or both in one tied weight.

    gradients: False scores relative to the whole weight's, in each of its uses, to be comparable
    with the scores of blocks.
    """
    uses = [use for use in ((True, False), (False, True)) if use[0] <= head and use[1] <= lookup]

    def score_of(stats: EmbeddingStatistics) -> TaskScore:
        def score(value: Tensor) -> Score:
            error = value - original
            if gradients:
                loss = scores.embedding_score(error, stats, head, lookup)
            else:
                loss = math.fsum(
                    scores.embedding_score(error, stats, *use)
                    / max(scores.embedding_score(original, stats, *use), 1e-30)
                    for use in uses
                )
            if not len(stats.sample_h):
                return loss, 0.0
            return loss, loss * scores.embedding_relative_error(error, stats, _bootstrap(seed))

        return TaskScore(score, lambda _, __: 0.0)

    return Matrix(original, {part.task: score_of(part.statistics) for part in parts})


def _bootstrap(seed: int) -> torch.Generator:
    """The same resampled windows for every candidate: their errors differ by what differs."""
    return torch.Generator().manual_seed(seed)
