"""Statistics: what calibration leaves behind for rounding and for the sensitivity table.

For every matrix that reads an input `x` and writes an output `y` we keep

    hessian  float32 [K, K]   sum_t w_t x_t x_t^T / sum_t w_t
    fisher   float32 [N]      mean over tokens of (dL/dy)^2, L the summed loss of sampled labels
    samples  x_t and dL/dy_t of a few tokens of every window, for standard errors

The token weight is w_t = sum_n (dL/dy_tn)^2 over the outputs of all members of the group
(GuidedQuant, arXiv:2505.07004, with one output group), so a rounding error is charged where the
loss feels it: the huge activations of a sequence's first token carry almost no gradient and do not
dominate the Hessian. Without gradients (block-local statistics) w_t = 1 and `fisher` is empty;
`MatrixStatistics.has_gradients` says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantlib.errors import DataError

_REPAIR = "delete the work directory's statistics and calibrate again"


@dataclass
class MatrixStatistics:
    """Statistics of one input: a linear group, or one expert of a stack.

    hessian:       float32 [K, K]; [0, 0] when no token was seen.
    tokens:        rows of x seen.
    weight_sum:    sum of token weights (equals `tokens` without gradients).
    fisher:        weight name -> float32 [N] (empty without gradients).
    sample_x:      float32 [S, K].
    sample_g:      weight name -> float32 [S, N] (empty without gradients).
    sample_window: int64 [S], the window each sample is from.
    token_weight:  float32 [tokens], the w_t of every token in the order they were seen (empty
                   without gradients), for re-rounding with other inputs.
    outputs:       weight name -> float32 [N, N], mean over tokens of the products of its outputs'
                   gradients; of weights whose outputs will be turned (`transforms.turned`).
    """

    hessian: Tensor
    tokens: int
    weight_sum: float
    fisher: dict[str, Tensor] = field(default_factory=dict)
    sample_x: Tensor = field(default_factory=lambda: torch.empty(0))
    sample_g: dict[str, Tensor] = field(default_factory=dict)
    sample_window: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    token_weight: Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def has_gradients(self) -> bool:
        return bool(self.fisher)

    @property
    def energy(self) -> float:
        """Sum over tokens of squared output gradients: what this input weighs beside the same one
        in another stream, however tokens are weighted within each. `weight_sum` without gradients.
        """
        if not self.fisher:
            return self.weight_sum
        return self.tokens * math.fsum(float(value.sum()) for value in self.fisher.values())

    def reordered(self, order: Tensor) -> MatrixStatistics:
        """Of the inputs in another order: column j is what was column `order[j]`, int64 [K]."""
        hessian = self.hessian[order][:, order] if len(self.hessian) else self.hessian
        return replace(self, hessian=hessian, sample_x=self.sample_x[:, order])


@dataclass
class GroupStatistics:
    """All matrices of one linear group: one for dense layers, one per expert for a stack."""

    name: str
    matrices: list[MatrixStatistics]

    @property
    def tokens(self) -> int:
        """Tokens seen by the matrix that saw fewest."""
        return min(m.tokens for m in self.matrices)


@dataclass
class EmbeddingStatistics:
    """Statistics of the token embedding and of the head that may share its weight.

    frequency:     float32 [V], how often a token was looked up.
    gradient:      float32 [D], mean over tokens of (dL/d embedding)^2.
    head_input:    float32 [D, D], mean over tokens of h h^T at the head's input.
    variance:      float32 [V], mean over tokens of p(1-p): the head's exact diagonal Fisher.
    sample_h:      float32 [S, D], head inputs.
    sample_window: int64 [S], the window each sample is from.
    tokens:        number of positions seen.
    """

    frequency: Tensor
    gradient: Tensor
    head_input: Tensor
    variance: Tensor
    sample_h: Tensor
    sample_window: Tensor
    tokens: int

    def expected(self) -> EmbeddingStatistics:
        """The same with frequencies to expect of as much other text, instead of those that were
        seen: what treats rare tokens worse than others must not believe that unseen ones never
        come.

        Of the tokens to come, as many are new as were seen once (Good and Turing's estimate); these
        are shared out by what the model itself expects to see, of which the variance of its
        predictions is the measure (p(1-p) is p where p is small). Where nothing is predicted, they
        are shared out evenly.
        """
        total = self.frequency.sum()
        missing = (self.frequency == 1).sum() / total.clamp(min=1)
        expected = self.variance if float(self.variance.sum()) > 0 else self.variance + 1
        shared = missing * total * expected / expected.sum()
        return replace(self, frequency=(1 - missing) * self.frequency + shared)


def group_to_tensors(stats: GroupStatistics) -> dict[str, Tensor]:
    """Flat tensors for a safetensors file; `group_from_tensors` is the inverse."""
    out: dict[str, Tensor] = {}
    for index, m in enumerate(stats.matrices):
        out[f"{index}|hessian"] = m.hessian
        out[f"{index}|counts"] = torch.tensor([m.tokens, m.weight_sum], dtype=torch.float64)
        out[f"{index}|sample_x"] = m.sample_x
        out[f"{index}|sample_window"] = m.sample_window
        out[f"{index}|token_weight"] = m.token_weight
        out |= {f"{index}|fisher|{name}": value for name, value in m.fisher.items()}
        out |= {f"{index}|sample_g|{name}": value for name, value in m.sample_g.items()}
        out |= {f"{index}|outputs|{name}": value for name, value in m.outputs.items()}
    return out


def group_from_tensors(name: str, tensors: Mapping[str, Tensor]) -> GroupStatistics:
    """Inverse of `group_to_tensors`. Raises DataError when a part is missing or not a part."""
    matrices = []
    try:
        count = 1 + max((int(key.partition("|")[0]) for key in tensors), default=0)
        for index in range(count):
            tokens, weight_sum = tensors[f"{index}|counts"].tolist()
            matrices.append(
                MatrixStatistics(
                    hessian=tensors[f"{index}|hessian"],
                    tokens=int(tokens),
                    weight_sum=weight_sum,
                    fisher=_named(tensors, f"{index}|fisher|"),
                    sample_x=tensors[f"{index}|sample_x"],
                    sample_g=_named(tensors, f"{index}|sample_g|"),
                    sample_window=tensors[f"{index}|sample_window"],
                    token_weight=tensors[f"{index}|token_weight"],
                    outputs=_named(tensors, f"{index}|outputs|"),
                )
            )
    except KeyError as missing:
        raise DataError(f"the statistics of {name} lack {missing}: {_REPAIR}") from None
    except ValueError as error:
        raise DataError(f"the statistics of {name} are damaged ({error}): {_REPAIR}") from None
    return GroupStatistics(name, matrices)


def embedding_to_tensors(stats: EmbeddingStatistics) -> dict[str, Tensor]:
    """Flat tensors for a safetensors file; `embedding_from_tensors` is the inverse."""
    out = {key: value for key, value in vars(stats).items() if isinstance(value, Tensor)}
    return out | {"tokens": torch.tensor(stats.tokens)}


def embedding_from_tensors(tensors: Mapping[str, Tensor]) -> EmbeddingStatistics:
    """Inverse of `embedding_to_tensors`. Raises DataError when a part is missing."""
    rest = dict(tensors)
    try:
        return EmbeddingStatistics(tokens=int(rest.pop("tokens")), **rest)
    except (KeyError, TypeError) as error:
        raise DataError(f"the embedding's statistics are damaged ({error}): {_REPAIR}") from None


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
