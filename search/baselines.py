"""What one would do without a solver: uniform bits, random bits, llama.cpp's rule of thumb.

All take the same problem and the same budget in bytes as the solver, never exceed it, and spend
what they leave over in the same way (layer by layer, first to last, skipping what does not fit), so
that a comparison is about the allocation and nothing else.

Each allocator climbs a *ladder*: the schemes that every item offers, those that are beaten by
another in both total bytes and total loss left out. A pinned or floored item that does not offer a
rung takes the choice nearest to it in bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from quantlib.errors import SearchError
from quantlib.search.constraints import scheme_bits
from quantlib.search.problem import Choice, Item, Picks, Problem
from quantlib.search.relaxation import undominated

FAVOURED = re.compile(r"\b(?:down_proj|v_proj)\b")
"""What llama.cpp's K_M mixtures give more bits: feed-forward down and attention values."""


def uniform(problem: Problem, budget: int) -> Picks:
    """The best scheme that fits when every item has the same, then the next rung, item by item."""
    return _climb(problem, budget, [_level(problem, scheme) for scheme in ladder(problem)])


def heuristic_first_last(problem: Problem, budget: int) -> Picks:
    """llama.cpp's rule: one level up for the first and last eighths, down_proj and v_proj.

    One level up is the next rung of the ladder with more bits. Where even the lowest rung with its
    favoured items raised does not fit, the favoured items are raised in order as far as the budget
    goes.
    """
    rungs = ladder(problem)
    favoured = _favoured(problem)
    options = [_level(problem, rungs[0])]
    for scheme in rungs:
        base, above = _level(problem, scheme), _level(problem, _next_bits(rungs, scheme))
        pairs = zip(favoured, base, above, strict=True)
        options.append(tuple(high if up else low for up, low, high in pairs))
    return _climb(problem, budget, options)


def random_allocation(problem: Problem, budget: int, seed: int) -> Picks:
    """A random allocation that uses the budget up: random items climb one choice at a time.

    They climb their undominated choices. Each item is drawn in proportion to an appetite of its own
    (exponential), so that allocations differ widely and not only by the noise of many equal draws.
    """
    generator = np.random.default_rng(seed)
    stairs = [_stairs(item) for item in problem.items]
    level = [0] * len(stairs)
    picks = [stair[0] for stair in stairs]
    _check_fits(problem, budget, tuple(picks))
    slack = budget - problem.bytes(tuple(picks))
    appetite = generator.exponential(size=len(stairs))
    while appetite.any():
        index = int(generator.choice(len(stairs), p=appetite / appetite.sum()))
        choices, stair = problem.items[index].choices, stairs[index]
        above = stair[level[index] + 1] if level[index] + 1 < len(stair) else None
        price = (
            choices[above].bytes - choices[picks[index]].bytes if above is not None else slack + 1
        )
        if above is None or price > slack:
            appetite[index] = 0.0
            continue
        level[index], picks[index], slack = level[index] + 1, above, slack - price
    return tuple(picks)


def ladder(problem: Problem) -> list[str]:
    """Schemes for everybody, smallest first, each losing less in total than the one before."""
    levels = {}
    for scheme in dict.fromkeys(choice.scheme for item in problem.items for choice in item.choices):
        picks = _level(problem, scheme)
        levels[scheme] = (problem.bytes(picks), problem.loss(picks))
    rungs: list[str] = []
    for scheme in sorted(levels, key=lambda name: levels[name]):
        if not rungs or levels[scheme][1] < levels[rungs[-1]][1]:
            rungs.append(scheme)
    return rungs


def _level(problem: Problem, scheme: str) -> Picks:
    """Everybody in `scheme`, or in the choice nearest to it in bits where it is not offered."""
    bits = scheme_bits(scheme)

    def distance(choice: Choice) -> tuple[bool, int, float]:
        return choice.scheme != scheme, abs(scheme_bits(choice.scheme) - bits), choice.loss

    return tuple(
        min(range(len(item.choices)), key=lambda index: distance(item.choices[index]))
        for item in problem.items
    )


def _next_bits(rungs: Sequence[str], scheme: str) -> str:
    """The first rung above `scheme` with more bits (the top rung when there is none)."""
    above = rungs[rungs.index(scheme) :]
    return next((rung for rung in above if scheme_bits(rung) > scheme_bits(scheme)), rungs[-1])


def _favoured(problem: Problem) -> list[bool]:
    blocks = list(dict.fromkeys(item.block for item in problem.items if item.block))
    eighth = max(1, len(blocks) // 8)
    ends = {*blocks[:eighth], *blocks[-eighth:]} if blocks else set()
    return [
        item.block in ends or any(FAVOURED.search(member) for member in item.members)
        for item in problem.items
    ]


def _stairs(item: Item) -> list[int]:
    """The undominated choices of an item, smallest first."""
    return sorted(undominated(item.choices), key=lambda index: item.choices[index].bytes)


def _check_fits(problem: Problem, budget: int, picks: Picks) -> None:
    if problem.bytes(picks) > budget:
        raise SearchError(
            f"a budget of {budget:,} bytes is too small for this allocation rule: it needs at "
            f"least {problem.bytes(picks):,} bytes"
        )


def _climb(problem: Problem, budget: int, options: Sequence[Picks]) -> Picks:
    """The best option that fits, then item by item towards the next option that is better."""
    fitting = [index for index, picks in enumerate(options) if problem.bytes(picks) <= budget]
    if not fitting:
        _check_fits(problem, budget, min(options, key=problem.bytes))
    losses = [problem.loss(picks) for picks in options]
    best = min(fitting, key=lambda index: losses[index])
    better = [index for index in range(best, len(options)) if losses[index] < losses[best]]
    if not better:
        return options[best]
    return _raise_in_order(problem, budget, options[best], options[better[0]])


def _raise_in_order(problem: Problem, budget: int, picks: Picks, above: Picks) -> Picks:
    """Item after item from `picks` to `above`, where that lowers its loss and still fits."""
    chosen = list(picks)
    slack = budget - problem.bytes(picks)
    for index, item in enumerate(problem.items):
        now, then = item.choices[chosen[index]], item.choices[above[index]]
        if then.loss < now.loss and then.bytes - now.bytes <= slack:
            slack -= then.bytes - now.bytes
            chosen[index] = above[index]
    return tuple(chosen)
