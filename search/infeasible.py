"""Why there is no allocation: the smallest that is possible, and what makes it that large.

"Infeasible" helps nobody. Whoever asked too much of one budget is told how far it can go and what
stands in the way; whoever asked too much of two together is told what each leaves for the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quantlib.search.budget import format_size
from quantlib.search.components import component_text, is_component
from quantlib.search.latency import cost_text, format_ms, is_latency
from quantlib.search.problem import COST_TOLERANCE, Problem

LARGEST_PARTS = 3
"""Parts of a cost that are named one by one; the others are summed."""


@dataclass(frozen=True)
class Extremes:
    """What the solver can still say of a request without a solution; None: no allocation at all.

    smallest_size: bytes of the smallest checkpoint within the other limits.
    least_cost:    name -> the least of a further cost within the byte budget and the other limits.
    """

    smallest_size: Callable[[], int | None]
    least_cost: Callable[[str], float | None]


def why_impossible(
    problem: Problem, budget: int | None, limits: Mapping[str, float], extremes: Extremes
) -> str:
    """A sentence that says what is impossible, what would be possible, and what that is made of."""
    for name, limit in limits.items():
        least = least_cost(problem, name)
        if least > limit * (1 + COST_TOLERANCE):
            return (
                f"{limit_text(name, limit)} is impossible: the least possible is "
                f"{amount_text(name, least)}, of which {made_of(problem, name)}"
            )
    if budget is not None and problem.bytes(problem.smallest()) > budget:
        return _too_small(problem, budget, limits, problem.bytes(problem.smallest()))
    smallest = extremes.smallest_size()
    if smallest is None:
        asked = " and ".join(limit_text(name, limit) for name, limit in limits.items())
        return f"no allocation is within {asked} at any size, though within each alone: raise one"
    if budget is None or smallest <= budget:
        return "no allocation within the budgets was found in time: allow more time, or more bytes"
    if not limits:
        return _too_small(problem, budget, limits, smallest)
    return _too_small(problem, budget, limits, smallest) + _or_slower(limits, budget, extremes)


def least_cost(problem: Problem, name: str) -> float:
    """The least possible sum of a further cost, fixed part included, whatever the size."""
    parts = (min(choice.costs[name] for choice in item.choices) for item in problem.items)
    return problem.fixed_costs.get(name, 0.0) + math.fsum(parts)


def made_of(problem: Problem, name: str) -> str:
    """What the least possible sum of a cost consists of, in words: `0.81 ms no scheme changes ...`.

    Items in blocks count together, others one by one; the smallest of these are summed, and what
    costs nothing is left out.
    """
    parts: dict[str, float] = {}
    for item in problem.items:
        part = "the weights in blocks" if item.block else item.name.removesuffix(".weight")
        least = min(choice.costs[name] for choice in item.choices)
        parts[part] = parts.get(part, 0.0) + least
    ranked = sorted((part for part in parts if parts[part] > 0), key=lambda part: -parts[part])
    fixed = problem.fixed_costs.get(name, 0.0)
    words = [f"{amount_text(name, fixed)} no scheme changes"] if fixed > 0 else []
    if is_latency(name) and words:
        words[0] += " (attention, norms, waiting between layers)"
    elif is_component(name) and words:
        words[0] += " (what stays in 16 bits)"
    words += [f"{amount_text(name, parts[part])} {part}" for part in ranked[:LARGEST_PARTS]]
    rest = math.fsum(parts[part] for part in ranked[LARGEST_PARTS:])
    if rest > 0:
        words.append(f"{amount_text(name, rest)} the others")
    if problem.rules:
        words.append(f"under {', '.join(problem.rules)}")
    return "; ".join(words)


def _too_small(problem: Problem, budget: int, limits: Mapping[str, float], smallest: int) -> str:
    fixed = problem.fixed_bytes
    reasons = [f"{fixed:,} bytes are fixed (what stays in 16 bits, headers)"]
    reasons += [f"{rule} adds {extra:,}" for rule, extra in problem.rule_bytes.items()]
    if smallest > problem.bytes(problem.smallest()):
        reasons += [f"{limit_text(name, limit)} is asked for" for name, limit in limits.items()]
    return (
        f"a budget of {budget:,} bytes ({format_size(budget)}) is impossible: the smallest "
        f"possible checkpoint has {smallest:,} bytes ({format_size(smallest)}); of these, "
        + "; ".join(reasons)
    )


def _or_slower(limits: Mapping[str, float], budget: int, extremes: Extremes) -> str:
    """What the byte budget leaves of each limit."""
    words = []
    for name in limits:
        least = extremes.least_cost(name)
        if least is not None:
            words.append(f"{format_size(budget)} are possible with {amount_text(name, least)}")
    return ". " + "; ".join(words) if words else ""


def limit_text(name: str, limit: float) -> str:
    """A limit in words: `11.8 ms for a decoded token ...`, `2.00 MB for vision`."""
    return component_text(name, limit) if is_component(name) else cost_text(name, limit)


def amount_text(name: str, value: float) -> str:
    """A sum of a further cost in words: `11.8 ms`, `2,000,000 bytes (2.00 MB)`."""
    if is_component(name):
        return f"{value:,.0f} bytes ({format_size(int(value))})"
    return format_ms(value) if is_latency(name) else f"{value:.4g}"
