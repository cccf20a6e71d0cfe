"""Two distributions over the same tokens: likelihood of the labels, KL, and the likeliest token.

Log-probabilities are float32 [positions, V]; sums over the vocabulary and over positions are taken
in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nll_sum(logprobs: Tensor, labels: Tensor) -> float:
    """Negative log-likelihood in nats of labels int64 [positions], summed."""
    return -logprobs.gather(1, labels.unsqueeze(1)).sum(dtype=torch.float64).item()


def kl_sum(reference: Tensor, model: Tensor) -> float:
    """Sum over positions of sum_v p_v (log p_v - log q_v); a term with p_v = 0 is 0."""
    p = reference.exp()
    terms = p * (reference - model)
    return terms.masked_fill_(p == 0, 0.0).sum(dtype=torch.float64).item()


def same_top_sum(reference: Tensor, model: Tensor) -> int:
    """At how many positions both find the same token likeliest."""
    return int((reference.argmax(-1) == model.argmax(-1)).sum())
