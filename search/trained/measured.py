"""Searches before training: choose formats by what is measured, then train in them.

What each option loses is measured once, with everything else in full precision, as `quantlib
measure` does it; losses are taken to add up, and a knapsack finds the choice that loses least at a
cost. A search that trains (`search.fliqs`) has to beat this at the same cost and the same number of
steps: it may learn what options lose together, and pays with steps in formats it then drops. And
both have to beat the best of a few random choices, and the rule of thumb: wide ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from quantlib.errors import SearchError
from quantlib.search.trained.costs import Costs
from quantlib.search.trained.layers import Choice, Layers, Space
from quantlib.search.trained.loop import Judge

BATCHES = 8
"""Of the judge, for every option."""
START_ENTROPY = 0.3
"""Of a policy that begins with measured losses, of what an undecided one has: it still tries
others, and needs no more steps than it has to find the best of them."""
START_RATE = 0.03
"""Of the policy's logits there, unless said otherwise: it knows most already."""
_HALVINGS = 60


def losses(
    layers: Layers,
    judge: Judge,
    batches: int = BATCHES,
    report: Callable[[str], None] | None = None,
) -> list[list[float]]:
    """How much worse the model is when one decision alone is taken: a list for each decision, a
    number for each of its options, in the unit of the judge. All are judged on the same batches.
    Layers are in full precision afterwards.

    report: is told the name of every decision that is done.
    """

    def alone(position: int, option: int) -> float:
        layers.choose_alone(position, option)
        return _quality(judge, batches)

    layers.choose(None)
    whole = _quality(judge, batches)
    table = []
    for position, (name, size) in enumerate(zip(layers.space.names, layers.space.sizes)):
        table.append([whole - alone(position, option) for option in range(size)])
        if report is not None:
            report(name)
    layers.choose(None)
    return table


def least_lost(table: list[list[float]], costs: Costs, target: float) -> Choice:
    """The choice with the smallest sum of `losses` that costs at most `target`.

    Raises SearchError for a target out of reach.
    """
    costs.check_target(target)
    return costs.likeliest([[-lost for lost in row] for row in table], target, spend=False)


def wide_ends(costs: Costs, target: float, wide: str) -> Choice:
    """The first and the last decision in the candidate `wide`, all others in one that all have: the
    dearest that costs at most `target` in all, of equally dear ones the first in the space. What
    people do without measuring.

    Raises SearchError where no candidate is cheap enough, or one of the two ends has no `wide`.
    """
    numbers = costs.space.numbers
    first, last = Space((numbers[0], numbers[-1])).uniform(wide)
    by_decision = [[option.name for option in decision.options] for decision in numbers]
    shared = [name for name in by_decision[0] if all(name in names for names in by_decision)]

    def beside(name: str) -> Choice:
        choice = [*costs.space.uniform(name)]
        choice[0], choice[len(numbers) - 1] = first, last
        return tuple(choice)

    found = [choice for choice in map(beside, shared) if costs.of(choice) <= target]
    if not found:
        raise SearchError(
            f"with {wide} for the first and the last layer no candidate of the others costs at "
            f"most {costs.text(target)}: allow more, or add narrower ones"
        )
    return max(found, key=costs.of)


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


def first_logits(
    table: list[list[float]], costs: Costs, target: float, entropy: float = START_ENTROPY
) -> list[list[float]]:
    """Logits of a policy that knows `losses`: - (lost + price * cost) / temperature.

    The price of a unit of cost is the one at which every decision's best option is paid for by
    `target` (the Lagrangian of the knapsack); the temperature the one at which the mean entropy of
    the decisions, over that of undecided ones, is `entropy` (or what options of the same worth
    leave).
    Raises SearchError for a target out of reach, and for widths, whose costs are no sum.
    """
    costs.check_target(target)
    if costs.space.widths:
        raise SearchError(
            "widths multiply what formats cost, and a first policy takes costs that add up: begin "
            "undecided, or search formats alone"
        )
    prices = costs.by_decision

    def worths(price: float) -> list[list[float]]:
        return [
            [-lost - price * cost for lost, cost in zip(row, paid, strict=True)]
            for row, paid in zip(table, prices, strict=True)
        ]

    def is_paid(price: float) -> bool:
        best = [max(range(len(row)), key=row.__getitem__) for row in worths(price)]
        return math.fsum(paid[index] for paid, index in zip(prices, best)) <= target

    widest = max(max(row) - min(row) for row in table)
    steps = (abs(a - b) for paid in prices for a in paid for b in paid)
    highest = widest / min((step for step in steps if step > 0), default=math.inf)
    found = worths(_smallest(is_paid, highest * len(table)))

    def is_undecided(temperature: float) -> bool:
        return _entropy(found, temperature) >= entropy

    scale = max(max(row) - min(row) for row in found) or 1.0
    temperature = _smallest(is_undecided, 100 * scale)
    return [[worth / temperature for worth in row] for row in found]


def _smallest(holds: Callable[[float], bool], most: float) -> float:
    """The smallest number up to `most` of which something holds that holds of all larger ones."""
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _entropy(worths: list[list[float]], temperature: float) -> float:
    """Mean over the decisions that have a choice, of what undecided ones would have."""
    shares = []
    for row in worths:
        if len(row) > 1:
            chances = torch.softmax(torch.tensor(row, dtype=torch.float64) / temperature, 0)
            shares.append(float(torch.special.entr(chances).sum()) / math.log(len(row)))
    return math.fsum(shares) / max(1, len(shares))


def _quality(judge: Judge, batches: int) -> float:
    """Of the model as its layers are rounded now."""
    return math.fsum(judge(step) for step in range(batches)) / batches
