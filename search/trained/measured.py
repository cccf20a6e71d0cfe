"""Searches before training: choose formats by what is measured, then train in them.

What each option loses is measured once, with everything else in full precision, as `quantlib
measure` does it; losses are taken to add up, and a knapsack finds the choice that loses least at a
cost. A search that trains (`search.fliqs`) has to beat this at the same cost and the same number of
steps: it may learn what options lose together, and pays with steps in formats it then drops. And
both have to beat the best of a few random choices.
"""

from __future__ import annotations

import math

import torch

from quantlib.search.trained.costs import Costs
from quantlib.search.trained.layers import Choice, Layers
from quantlib.search.trained.loop import Judge

BATCHES = 8
"""Of the judge, for every option."""


def losses(layers: Layers, judge: Judge, batches: int = BATCHES) -> list[list[float]]:
    """How much worse the model is when one decision alone is taken: a list for each decision, a
    number for each of its options, in the unit of the judge. All are judged on the same batches.
    Layers are in full precision afterwards."""

    def alone(position: int, option: int) -> float:
        layers.choose_alone(position, option)
        return _quality(judge, batches)

    layers.choose(None)
    whole = _quality(judge, batches)
    table = [
        [whole - alone(position, option) for option in range(size)]
        for position, size in enumerate(layers.space.sizes)
    ]
    layers.choose(None)
    return table


def least_lost(table: list[list[float]], costs: Costs, target: float) -> Choice:
    """The choice with the smallest sum of `losses` that costs at most `target`.

    Raises SearchError for a target out of reach.
    """
    costs.check_target(target)
    return costs.likeliest([[-lost for lost in row] for row in table], target, spend=False)


def best_of_random(
    layers: Layers,
    judge: Judge,
    costs: Costs,
    target: float,
    generator: torch.Generator,
    draws: int,
    batches: int = BATCHES,
) -> Choice:
    """The best, judged as a whole, of `draws` random choices that cost `target` or little less.

    A choice is that of the highest sum of uniformly random scores which the target allows. Layers
    are in full precision afterwards. Raises SearchError for a target out of reach.
    """
    costs.check_target(target)

    def drawn() -> Choice:
        sizes = layers.space.sizes
        scores = [torch.rand(size, generator=generator).tolist() for size in sizes]
        return costs.likeliest(scores, target)

    def quality(choice: Choice) -> float:
        layers.choose(choice)
        return _quality(judge, batches)

    best = max((drawn() for _ in range(draws)), key=quality)
    layers.choose(None)
    return best


def _quality(judge: Judge, batches: int) -> float:
    """Of the model as its layers are rounded now."""
    return math.fsum(judge(step) for step in range(batches)) / batches
