"""Statistics of several streams as those of one: of the loss sum_s weight_s loss_s.

What the statistics describe is the curvature of the loss, so a stream's weight multiplies its
second moments of gradients: as if its gradients had been scaled by the root of the weight. Sums
over tokens are recovered from the means, weighted, and made means again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantlib.calibration.statistics import (
    EmbeddingStatistics,
    GroupStatistics,
    MatrixStatistics,
)
from quantlib.calibration.streams import StreamStatistics
from quantlib.errors import DataError


def combined(
    parts: Sequence[StreamStatistics], weights: Mapping[str, float], name: str = "all"
) -> StreamStatistics:
    """All streams as one; their windows are numbered one stream after the other.

    weights: of each stream, by name. Raises DataError when there is no stream, or a weight is
    negative or no number.
    """
    if not parts:
        raise DataError("there is no calibration stream: give at least one")
    for part in parts:
        if not 0 <= weights[part.name] < math.inf:
            raise DataError(
                f"the calibration stream {part.name!r} has the weight {weights[part.name]}: give "
                "a number from 0 up"
            )
    scale = [weights[part.name] for part in parts]
    first = [sum(part.samples for part in parts[:index]) for index in range(len(parts))]
    return StreamStatistics(
        name=name,
        terms=sum(part.terms for part in parts),
        samples=sum(part.samples for part in parts),
        groups={
            group: combined_group([part.groups[group] for part in parts], scale, first)
            for group in parts[0].groups
        },
        embeddings={
            group: combined_embedding([part.embeddings[group] for part in parts], scale, first)
            for group in parts[0].embeddings
        },
        ran=frozenset().union(*(part.ran for part in parts)),
    )


def combined_group(
    parts: Sequence[GroupStatistics], scale: Sequence[float], first: Sequence[int]
) -> GroupStatistics:
    """One group's statistics of all streams as one.

    scale: weight of each stream's loss. first: number of windows before the first of each.
    """
    columns = zip(*(part.matrices for part in parts), strict=True)
    return GroupStatistics(parts[0].name, [_matrix(same, scale, first) for same in columns])


def _matrix(
    parts: Sequence[MatrixStatistics], scale: Sequence[float], first: Sequence[int]
) -> MatrixStatistics:
    seen = [(m, s, f) for m, s, f in zip(parts, scale, first, strict=True) if m.tokens]
    if not seen:
        return parts[0]
    tokens = sum(m.tokens for m, _, _ in seen)
    weight_sum = math.fsum(s * m.energy for m, s, _ in seen)
    hessian = torch.zeros_like(seen[0][0].hessian)
    for m, s, _ in seen:
        hessian.add_(m.hessian, alpha=s * m.energy / weight_sum if weight_sum > 0 else 0.0)
    fisher = {
        name: _sum([m.fisher[name] * (s * m.tokens / tokens) for m, s, _ in seen])
        for name in seen[0][0].fisher
    }
    return MatrixStatistics(
        hessian=hessian,
        tokens=tokens,
        weight_sum=weight_sum,
        fisher=fisher,
        sample_x=torch.cat([m.sample_x for m, _, _ in seen]),
        sample_g={
            name: torch.cat([m.sample_g[name] * math.sqrt(s) for m, s, _ in seen])
            for name in seen[0][0].sample_g
        },
        sample_window=torch.cat([m.sample_window + f for m, _, f in seen]),
        token_weight=torch.cat([m.token_weight * s for m, s, _ in seen]),
    )


def combined_embedding(
    parts: Sequence[EmbeddingStatistics], scale: Sequence[float], first: Sequence[int]
) -> EmbeddingStatistics:
    """As `combined_group`, for an embedding or a head.

    Of the head's inputs each stream counts by what it predicts, sum_v variance_v per term: the
    loss of a rounded head is the product of the two."""
    terms = sum(part.tokens for part in parts)
    lookups = math.fsum(float(part.frequency.sum()) for part in parts)
    gradient = _sum(
        [p.gradient * (s * float(p.frequency.sum())) for p, s in zip(parts, scale, strict=True)]
    )
    variances = [p.variance * (s * p.tokens) for p, s in zip(parts, scale, strict=True)]
    predicted = math.fsum(float(variance.sum()) for variance in variances)
    heads = [
        p.head_input * (float(variance.sum()) / predicted if predicted > 0 else 0.0)
        for p, variance in zip(parts, variances, strict=True)
    ]
    return EmbeddingStatistics(
        frequency=_sum([part.frequency for part in parts]),
        gradient=gradient / max(lookups, 1.0),
        head_input=_sum(heads),
        variance=_sum(variances) / terms,
        sample_h=torch.cat([part.sample_h for part in parts]),
        sample_window=torch.cat([p.sample_window + f for p, f in zip(parts, first, strict=True)]),
        tokens=terms,
    )


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0)
