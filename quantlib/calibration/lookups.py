"""Sums over one embedding, one head, or the weight that is both, and what is left of them.

As a lookup, a row feels the gradient at the embedding's output as often as it is looked up. As a
head, it feels the variance p(1 - p) of what it predicts. Only positions that a loss depends on
count: the logits of a question are computed too, and nobody reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantlib.calibration.passes import SAMPLED_HEAD_TOKENS
from quantlib.calibration.statistics import EmbeddingStatistics


@dataclass
class LookupSums:
    """Sums for a weight [V, D]; `statistics` turns them into means.

    frequency [V], gradient [D]: lookups, and the sum of their squared gradients.
    head [D, D], variance [V]:   of head inputs h h^T, and of p(1 - p).
    positions:                   how many head inputs were summed.
    """

    vocabulary: int
    width: int
    generator: torch.Generator
    frequency: Tensor = field(init=False)
    gradient: Tensor = field(init=False)
    head: Tensor = field(init=False)
    variance: Tensor = field(init=False)
    positions: int = 0
    sample_h: list[Tensor] = field(default_factory=list)
    sample_window: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.frequency, self.variance = (torch.zeros(self.vocabulary) for _ in range(2))
        self.gradient, self.head = torch.zeros(self.width), torch.zeros(self.width, self.width)

    def looked_up(self, ids: Tensor, gradient: Tensor) -> None:
        """Rows `ids` [T] were read; the loss has the gradient [T, D] at what was read."""
        felt = gradient.ne(0).any(-1)
        self.frequency += torch.bincount(ids[felt], minlength=self.vocabulary).float()
        self.gradient += gradient[felt].float().square().sum(0)

    def predicted(self, h: Tensor, logits: Tensor, gradient: Tensor, window: int) -> None:
        """Inputs h [T, D] became logits [T, V], at which the loss has this gradient [T, V]."""
        felt = gradient.ne(0).any(-1)
        h, probability = h[felt].float(), logits[felt].float().softmax(-1)
        self.variance += (probability * (1 - probability)).sum(0)
        self.head.addmm_(h.T, h)
        self.positions += len(h)
        chosen = torch.randperm(len(h), generator=self.generator)[:SAMPLED_HEAD_TOKENS]
        self.sample_h.append(h[chosen])
        self.sample_window.append(torch.full((len(chosen),), window))

    def statistics(self, terms: int) -> EmbeddingStatistics:
        """Means: gradients per lookup, head inputs per position, the rest per term of the loss."""
        return EmbeddingStatistics(
            frequency=self.frequency,
            gradient=self.gradient / self.frequency.sum().clamp(min=1.0),
            head_input=self.head / max(self.positions, 1),
            variance=self.variance / max(terms, 1),
            sample_h=torch.cat([*self.sample_h, torch.empty(0, self.width)]),
            sample_window=torch.cat([*self.sample_window, torch.empty(0, dtype=torch.int64)]),
            tokens=terms,
        )
