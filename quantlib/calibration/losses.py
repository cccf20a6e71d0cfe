"""Losses whose gradients measure what the model's output feels, not how wrong the data is.

A loss on labels *sampled from the model itself* has the Fisher information as the second moment of
its gradient, and that predicts the loss of a small change of the output: the KL divergence of what
is predicted as a distribution (words, image codes), half the squared error over the variance of
what is predicted as numbers (visual vectors, pixels). Every loss is a sum; `terms` says of how much
it is the sum, so that streams of different length can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import ModelError


@dataclass(frozen=True)
class LossSum:
    """value: scalar to differentiate. terms: tokens, vectors or pixels it is summed over."""

    value: Tensor
    terms: int


def sampled_tokens(
    logits: Tensor, generator: torch.Generator, where: Tensor | None = None
) -> LossSum:
    """Negative log-likelihood of a token drawn from every position's own distribution.

    logits: [..., V]. where: bool [...], the positions that count (answers; all by default).
    Raises ModelError when the logits overflow, or when no position counts.
    """
    chosen = logits.reshape(-1, logits.shape[-1])
    if where is not None:
        chosen = chosen[where.reshape(-1)]
    chosen = chosen.float()
    if not len(chosen):
        raise ModelError("a calibration sample has no position whose prediction counts")
    probability = chosen.detach().softmax(-1)
    _check(probability)
    labels = torch.multinomial(probability, 1, generator=generator)[:, 0]
    value = torch.nn.functional.cross_entropy(chosen, labels, reduction="sum")
    return LossSum(value, len(chosen))


def sampled_vectors(
    vectors: Tensor, generator: torch.Generator, deviation: float | None = None
) -> LossSum:
    """Negative log-likelihood, up to a constant, of vectors drawn around the model's own.

    vectors:   [..., D].
    deviation: standard deviation of every number; by default the root mean square of `vectors`, so
               that the loss is in relative squared errors.
    """
    found = vectors.detach().float()
    _check(found)
    scale = deviation or float(found.square().mean().sqrt()) or 1.0
    noise = torch.randn(found.shape, generator=generator)
    # the gradient of |v - (v + scale * noise)|^2 / (2 scale^2), without the difference of equals
    value = (vectors.float() * noise).sum() / scale
    return LossSum(value, found[..., 0].numel())


def _check(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ModelError("the model's output is inf or nan on a calibration sample")
