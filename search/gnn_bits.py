"""Bits to columns by the graph network: soft assignments, the mean of their bits as a constraint,
and a surrogate for the gradient of rounding.

Rounding has no gradient, and what GPTQ loses at a column depends on what all others were given. So
the loss of an assignment is taken to be linear in it, sum_b p_jb e_jb, with the prices e_jb that
sweeps really booked: first of whole weights in one width, then of the network's own assignment
(`columns.remeasured`), round by round. The soft assignment is what the knapsack would choose at a
price of a byte, softened:

    p_j = softmax over b of -(c_jb + multiplier * bytes_b) / temperature

with the network's prices c; the multiplier is the constraint's own variable, raised while the mean
is over the budget and lowered while it is below (dual ascent). What the network has learned is then
handed to the exact knapsack of `columns.py` as its table, which makes the bits hard and spends the
budget to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import SearchError
from quantlib.search.gnn import ColumnGraph, ColumnNetwork, side_by_side


@dataclass(frozen=True, eq=False)
class Lesson:
    """One weight to learn from.

    prices: float64 [K, B], what GPTQ's sweeps booked; widths ascend along B.
    rates:  float64 [B], bytes that a column takes in every width.
    """

    graph: ColumnGraph
    prices: Tensor
    rates: Tensor


@dataclass(frozen=True)
class Training:
    """How the network is trained.

    steps: of `batch` weights each. temperature: of the soft bits, from the first step to the last,
    in prices of the step to the next width. regression: weight of the squared error of log prices,
    which tells columns apart that are far from any decision. multiplier_rate: of the dual ascent.
    """

    steps: int = 150
    batch: int = 12
    learning_rate: float = 3e-3
    temperature: tuple[float, float] = (2.0, 0.3)
    regression: float = 0.3
    multiplier_rate: float = 2.0
    seed: int = 0


DEFAULTS = Training()


def train(
    network: ColumnNetwork,
    lessons: Mapping[str, Lesson],
    budget: float,
    training: Training = DEFAULTS,
    tick: Callable[[int, float], object] = lambda step, loss: None,
) -> float:
    """Train in place until its soft bits cost few nats at `budget` bytes over all columns; returns
    the multiplier it ended with, in nats per byte.

    Raises SearchError for a budget that no assignment meets, and when the loss is not finite.
    """
    names = list(lessons)
    low, high = (
        math.fsum(len(one.prices) * float(f(one.rates)) for one in lessons.values())
        for f in (torch.min, torch.max)
    )
    if not low <= budget <= high:
        raise SearchError(
            f"{budget:.0f} bytes of columns are not between the least and the most that their "
            f"widths allow, {low:.0f} and {high:.0f}"
        )
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.Adam(network.parameters(), training.learning_rate)
    multiplier = _multiplier([(one.prices, one.rates) for one in lessons.values()], budget)
    first, last = training.temperature
    total = math.fsum(len(one.prices) * float(one.rates[0]) for one in lessons.values())
    network.train()
    for step in range(training.steps):
        share = step / max(1, training.steps - 1)
        picked = torch.randperm(len(names), generator=generator)[: training.batch].tolist()
        batch = [lessons[names[index]] for index in picked]
        temperature = first * (last / first) ** share
        loss, used = _loss(network, batch, multiplier, temperature, training.regression)
        if not bool(torch.isfinite(loss)):
            raise SearchError(
                f"the graph network's loss is {float(loss.detach())} in step {step}: the prices it "
                "learns from hold values that are no numbers, or the learning rate is too high"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        smallest = math.fsum(len(one.prices) * float(one.rates[0]) for one in batch)
        excess = used / smallest - budget / total
        multiplier *= math.exp(training.multiplier_rate * excess / math.sqrt(step + 1))
        tick(step, float(loss.detach()))
    network.eval()
    return multiplier


@torch.no_grad()
def learned_prices(network: ColumnNetwork, graph: ColumnGraph) -> Tensor:
    """What the network says every column of one weight loses in every width: float64 [K, B]."""
    return network.log_prices(graph).exp()


def soft_bits(prices: Tensor, rates: Tensor, multiplier: float, temperature: float) -> Tensor:
    """The soft assignment p [K, B] of the module's formula; differentiable in `prices`.

    rates: [K, B] bytes. temperature: in units of the price of the step to the next width.
    """
    unit = multiplier * rates.diff(dim=1).mean(1, keepdim=True) * temperature
    return torch.softmax(-(prices + multiplier * rates) / unit, dim=1)


def _loss(
    network: ColumnNetwork,
    batch: list[Lesson],
    multiplier: float,
    temperature: float,
    regression: float,
) -> tuple[Tensor, float]:
    """The Lagrangian of a few weights in prices of a step and column, with the regression, and the
    bytes of their soft bits."""
    graph = side_by_side([one.graph for one in batch])
    booked = torch.cat([one.prices for one in batch]).clamp(min=1e-30)
    rates = torch.cat([one.rates.expand(len(one.prices), -1) for one in batch])
    logs = network.log_prices(graph)
    soft = soft_bits(logs.exp(), rates, multiplier, temperature)
    step = multiplier * rates.diff(dim=1).mean(1)
    lagrangian = ((soft * (booked + multiplier * rates)).sum(1) / step).mean()
    apart = (logs - booked.log()).square().mean()
    return lagrangian + regression * apart, float((soft * rates).sum().detach())


def _multiplier(tables: list[tuple[Tensor, Tensor]], budget: float) -> float:
    """The price of a byte at which hard bits on the booked prices meet the budget, by bisection."""
    low, high = -80.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        price = math.exp(middle)
        used = 0.0
        for prices, rates in tables:
            used += float(rates[(prices + price * rates).argmin(1)].sum())
        low, high = (middle, high) if used > budget else (low, middle)
    return math.exp(high)
