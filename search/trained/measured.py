"""The exact solver among the searches that train: measure first, choose, then train in the choice.

What each option loses is measured once, with everything else in full precision, as `quantlib
measure` does it; losses are taken to add up, and a knapsack finds the choice that loses least at a
cost. A search that trains (`search.fliqs`) has to beat this at the same cost and the same number of
steps: it may learn what options lose together, and pays with steps in formats it then drops.
"""

from __future__ import annotations

import math

from quantlib.search.trained.costs import Costs
from quantlib.search.trained.layers import Choice, Layers
from quantlib.search.trained.loop import Judge

BATCHES = 8
"""Of the judge, for every option."""


def losses(layers: Layers, judge: Judge, batches: int = BATCHES) -> list[list[float]]:
    """How much worse the model is when one decision alone is taken: a list for each decision, a
    number for each of its options, in the unit of the judge. All are judged on the same batches.
    Layers are in full precision afterwards."""

    def quality() -> float:
        return math.fsum(judge(step) for step in range(batches)) / batches

    def alone(position: int, option: int) -> float:
        layers.choose_alone(position, option)
        return quality()

    layers.choose(None)
    whole = quality()
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
