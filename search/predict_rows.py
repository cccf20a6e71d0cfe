"""Sensitivities from a few rows: rows of a weight are rounded independently of each other, so a
sample of them says what all lose.

Rows lose very different amounts, mostly because some outputs matter a thousand times more than
others. What is cheap to know of every row, its `size` (what rounding it to nearest would lose),
explains nearly all of that. So rows are drawn in proportion to size (Hansen and Hurwitz, 1943), and
the loss of the whole is

    sum of all sizes x mean over the draws of loss / size

which is unbiased, and whose error is the spread of those ratios alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.calibration.statistics import EmbeddingStatistics
from quantlib.errors import SearchError


@dataclass(frozen=True, eq=False)
class RowSample:
    """Rows that were drawn.

    rows:  int64 [R], different ones, ascending.
    times: float64 [R], how often each was drawn.
    share: float64 [R], by what the loss of each is multiplied to count for all.
    exact: every row that can lose anything is there.
    """

    rows: Tensor
    times: Tensor
    share: Tensor
    exact: bool

    def total(self, losses: Tensor) -> tuple[float, float]:
        """(loss of all rows, its standard error from the sampling), from the losses [R]."""
        parts = losses.double() * self.share
        estimate, draws = float(parts.sum()), float(self.times.sum())
        if self.exact or draws < 2:
            return estimate, 0.0
        each = parts / self.times  # what every single draw contributes
        spread = float((self.times * (each - estimate / draws).square()).sum())
        return estimate, math.sqrt(spread * draws / (draws - 1))


def draw_rows(sizes: Tensor, count: int, generator: torch.Generator) -> RowSample:
    """`count` draws of rows in proportion to `sizes` [N]; every row where there are not more.

    The draws are systematic (equal steps through the running sum of sizes from a random start):
    never worse than independent ones, and a row larger than a step is always drawn. A row of size 0
    loses nothing and is not drawn. Raises SearchError for sizes that are no numbers >= 0.
    """
    sizes = sizes.double()
    if not bool((torch.isfinite(sizes) & (sizes >= 0)).all()) or count < 1:
        raise SearchError(
            "rows are drawn in proportion to sizes, and these are not all finite and >= 0"
        )
    used = sizes.nonzero().flatten()
    if len(used) <= count:
        return RowSample(used, torch.ones(len(used)).double(), torch.ones(len(used)).double(), True)
    step = float(sizes.sum()) / count
    start = float(torch.rand((), generator=generator, dtype=torch.float64))
    marks = (torch.arange(count, dtype=torch.float64) + start) * step
    drawn = torch.searchsorted(sizes[used].cumsum(0), marks).clamp(max=len(used) - 1)
    rows, times = torch.unique(used[drawn], return_counts=True)
    return RowSample(rows, times.double(), times * step / sizes[rows], False)


def linear_rows(error: Tensor, hessian: Tensor, fisher: Tensor) -> Tensor:
    """Predicted KL per token of every row of a rounding error [N, K]: float64 [N], whose sum is
    `scores.fisher_score`. A Hessian of one dimension is a diagonal."""
    return 0.5 * fisher.double() * _energies(error, hessian)


def embedding_rows(
    error: Tensor, statistics: EmbeddingStatistics, head: bool, lookup: bool, diagonal: bool = False
) -> Tensor:
    """The same of an embedding, a head, or both in one weight (`scores.embedding_score`); diagonal:
    as if the head's inputs were uncorrelated, which costs little to compute."""
    found = torch.zeros(len(error), dtype=torch.float64)
    if head:
        inputs = statistics.head_input
        energies = _energies(error, inputs.diagonal() if diagonal else inputs)
        found += 0.5 * statistics.variance.double() * energies
    if lookup:
        frequency = statistics.frequency.double() / statistics.tokens
        found += 0.5 * frequency * _energies(error, statistics.gradient)
    return found


def _energies(error: Tensor, moment: Tensor) -> Tensor:
    """e_n M e_n^T of every row, float64 [N]; M [K, K], or its diagonal [K]."""
    if moment.dim() == 1:
        return (error.square() @ moment).double()
    return ((error @ moment) * error).sum(1).clamp(min=0).double()
