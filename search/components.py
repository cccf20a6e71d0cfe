"""Byte budgets of components: `vision_tower=2MB`, `image_decoder=30%`, beside that of the whole
file.

A component's bytes are one more additive cost of the knapsack: what its weights take, and its kept
tensors whatever is chosen. So a budget of the whole and any number of component budgets hold at
once, and floors, ceilings and pins (`constraints.py`) go on working inside each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

from quantlib.errors import UsageError
from quantlib.search.budget import format_size, parse_size
from quantlib.search.weights import WeightInfo

_COST = "bytes:"


class ComponentInfo(Protocol):
    """What a budget needs to know about a component (`quantlib.models.rows.ComponentSummary`)."""

    @property
    def name(self) -> str: ...
    @property
    def bytes(self) -> int: ...


def component_cost(pattern: str) -> str:
    """Name of the cost that is the bytes of the components a pattern names."""
    return _COST + pattern


def is_component(cost: str) -> bool:
    """Whether a cost is the bytes of components."""
    return cost.startswith(_COST)


def pattern_of(cost: str) -> str:
    """The pattern of the components whose bytes a cost is."""
    return cost.removeprefix(_COST)


def component_text(cost: str, limit: float) -> str:
    """A limit on components' bytes in words: `2.00 MB for vision`."""
    return f"{format_size(int(limit))} for {pattern_of(cost)}"


def component_limits(texts: Iterable[str], components: Sequence[ComponentInfo]) -> dict[str, float]:
    """Cost -> the most bytes, of the texts after every --component-size.

    texts: `NAME=SIZE`; NAME is a component, or a glob of several that share the budget. A
    percentage is of the source's bytes of the component. Raises UsageError for a text that is
    malformed, for a name of no component (with those there are), and for two budgets of one name.
    """
    limits: dict[str, float] = {}
    for text in texts:
        name, separator, size = (part.strip() for part in text.rpartition("="))
        if not separator or not name or not size:
            raise UsageError(
                f"--component-size {text}: write COMPONENT=SIZE, for example vision_tower=2MB or "
                "image_decoder=30%"
            )
        found = [component for component in components if fnmatchcase(component.name, name)]
        if not found:
            known = ", ".join(component.name for component in components)
            raise UsageError(
                f"--component-size {text}: {name!r} is no component of this model; its components "
                f"are {known}"
            )
        cost = component_cost(name)
        if cost in limits:
            raise UsageError(f"--component-size gives {name} two budgets: keep one")
        limits[cost] = float(parse_size(size, sum(component.bytes for component in found)))
    return limits


def component_costs(
    cost: str, weights: Iterable[WeightInfo], sizes: Mapping[str, Mapping[str, int]]
) -> dict[tuple[str, str], float]:
    """(weight, scheme) -> bytes it takes of a component budget, 0 for weights of other components.

    sizes: weight -> scheme -> bytes in the file.
    """
    pattern = pattern_of(cost)
    return {
        (weight.name, scheme): float(size) if fnmatchcase(weight.component, pattern) else 0.0
        for weight in weights
        for scheme, size in sizes[weight.name].items()
    }


def component_fixed(cost: str, kept: Mapping[str, int]) -> float:
    """Bytes of a component budget that no scheme changes. kept: component -> bytes of its kept
    tensors."""
    pattern = pattern_of(cost)
    return float(sum(size for name, size in kept.items() if fnmatchcase(name, pattern)))
