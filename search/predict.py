"""What weights lose that were not measured, from those that were: ridge regression on plain facts.

What is predicted is the factor between the loss after GPTQ and descent and that of rounding to
nearest, because the latter is cheap to know and carries nearly all of what tells weights and
formats apart. The facts are those the graph network starts from (`gnn.ColumnGraph`), as means over
the columns that matter: whatever the network finds beyond them is in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import SearchError
from quantlib.search.gnn import ColumnGraph

RIDGE = 1e-2
"""Strength, in units of standardized facts and one weight and format."""
_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Example:
    """One weight: its graph, the loss in each of its formats (float64 [S]), measured after GPTQ."""

    graph: ColumnGraph
    losses: Tensor


def facts(graph: ColumnGraph) -> Tensor:
    """Of a weight in every format: float64 [S, facts], the first one 1."""
    shares = graph.plain / graph.plain.sum(0).clamp(min=_TINY)  # [K, S]: who bears the loss
    nodes = shares.T @ graph.nodes.double()
    spread = shares.square().sum(0).clamp(min=_TINY).reciprocal().log()  # on how many columns it is
    described = (shares[..., None] * graph.formats.double()).sum(0)
    bits = described[:, 1]
    by_bits = torch.stack([bits.square(), bits * nodes[:, 1], bits * nodes[:, 4]], dim=1)
    return torch.cat(
        [torch.ones(len(nodes), 1).double(), nodes, spread[:, None], described, by_bits], dim=1
    )


@dataclass(frozen=True, eq=False)
class Ridge:
    """A fitted regression. `sigma`: standard deviation of the log of a loss that was not fitted,
    from leaving out one weight at a time."""

    mean: Tensor
    scale: Tensor
    coefficients: Tensor
    sigma: float

    @staticmethod
    def fit(examples: Mapping[str, Example], strength: float = RIDGE) -> Ridge:
        """Raises SearchError with fewer than two weights, or losses that are no numbers > 0."""
        if len(examples) < 2:
            raise SearchError(
                "sensitivities are predicted from at least two measured weights: measure more"
            )
        x = torch.cat([facts(one.graph) for one in examples.values()])
        y = torch.cat([_log_factor(one) for one in examples.values()])
        if not bool(torch.isfinite(y).all()):
            raise SearchError("a measured loss is no number above 0: nothing can be learned of it")
        mean, scale = x.mean(0), x.std(0)
        mean[0], scale = 0.0, torch.where(scale > 1e-9, scale, 1.0)
        z = (x - mean) / scale
        gram = z.T @ z + strength * len(z) * torch.diag((torch.arange(z.shape[1]) > 0).double())
        gram.diagonal().add_(1e-9)
        inverse = torch.linalg.inv(gram)
        coefficients = inverse @ (z.T @ y)
        residuals = []
        first = 0
        for one in examples.values():  # leave-one-weight-out, in closed form
            own = slice(first, first + len(one.losses))
            hat = z[own] @ inverse @ z[own].T
            missed = y[own] - z[own] @ coefficients
            residuals.append(torch.linalg.solve(torch.eye(len(hat)).double() - hat, missed))
            first = own.stop
        sigma = float(torch.cat(residuals).square().mean().sqrt())
        return Ridge(mean, scale, coefficients, sigma)

    def predict(self, graph: ColumnGraph) -> Tensor:
        """Losses of a weight in every format of its graph: float64 [S]."""
        factor = ((facts(graph) - self.mean) / self.scale) @ self.coefficients
        return graph.plain.sum(0) * factor.exp()


def spread_of(sigma: float) -> float:
    """Relative standard error of a loss whose logarithm has the standard deviation `sigma`."""
    return math.sqrt(math.expm1(min(sigma, 3.0) ** 2))


def _log_factor(example: Example) -> Tensor:
    plain = example.graph.plain.sum(0).clamp(min=_TINY)
    return example.losses.double().clamp(min=0).log() - plain.log()
