"""What weights lose that were not measured, by the graph network: its prices, summed over columns.

The network is asked what every column costs after GPTQ, and taught with the only thing that is
measured of whole weights: the logarithm of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import SearchError
from quantlib.search.gnn import ColumnGraph, ColumnNetwork
from quantlib.search.predict import Example


@dataclass(frozen=True)
class Teaching:
    """How the network is taught: `steps` of `batch` weights each. One weight in `held_out` is kept
    from it, to know how far it can be trusted."""

    steps: int = 160
    batch: int = 6
    learning_rate: float = 3e-3
    held_out: int = 4
    seed: int = 0


DEFAULTS = Teaching()


@dataclass(frozen=True, eq=False)
class Taught:
    """A network, and the standard deviation of the log of a loss that it was not taught."""

    network: ColumnNetwork
    sigma: float

    @torch.no_grad()
    def predict(self, graph: ColumnGraph) -> Tensor:
        """Losses of a weight in every format of its graph: float64 [S]."""
        return _log_loss(self.network, graph).exp()


def teach(
    examples: Mapping[str, Example],
    teaching: Teaching = DEFAULTS,
    tick: Callable[[int, float], object] = lambda step, loss: None,
) -> Taught:
    """Train a network on measured weights. Raises SearchError with too few of them to hold one out,
    and when the loss is not finite."""
    names = list(examples)
    if len(names) < teaching.held_out:
        raise SearchError(
            f"the graph network learns sensitivities from at least {teaching.held_out} measured "
            f"weights, and there are {len(names)}: measure more, or predict with ridge"
        )
    generator = torch.Generator().manual_seed(teaching.seed)
    network = ColumnNetwork(generator)
    mixed = torch.randperm(len(names), generator=generator).tolist()
    kept = [examples[names[index]] for index in mixed[:: teaching.held_out]]
    taught = [
        examples[names[index]] for place, index in enumerate(mixed) if place % teaching.held_out
    ]
    optimizer = torch.optim.Adam(network.parameters(), teaching.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, teaching.steps)
    network.train()
    for step in range(teaching.steps):
        picked = torch.randperm(len(taught), generator=generator)[: teaching.batch].tolist()
        loss = torch.stack([_error(network, taught[index]) for index in picked]).mean()
        if not bool(torch.isfinite(loss)):
            raise SearchError(
                f"the graph network's loss is {float(loss.detach())} in step {step}: a measured "
                "loss is no number above 0, or the learning rate is too high"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tick(step, float(loss.detach()))
    network.eval()
    with torch.no_grad():
        missed = torch.stack([_error(network, one) for one in kept]).mean()
    return Taught(network, float(missed.sqrt()))


def _log_loss(network: ColumnNetwork, graph: ColumnGraph) -> Tensor:
    return network.log_prices(graph).logsumexp(0)


def _error(network: ColumnNetwork, example: Example) -> Tensor:
    """Mean squared error of the logs of one weight's losses."""
    return (_log_loss(network, example.graph) - example.losses.double().log()).square().mean()
