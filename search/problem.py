"""The allocation problem: items, each with choices that cost bytes and lose something.

An item is the smallest thing that gets a scheme of its own: one weight; or one linear group (q/k/v,
gate/up) when the engine that will run the checkpoint fuses the group into one matrix and therefore
needs one scheme for all of it. Bytes and losses of a group's members add. `build.py` makes a
problem from a sensitivity table; `solve.py` takes it and returns picks: for every item, in order,
the index of its choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from quantlib.errors import SearchError
from quantlib.formats.scheme import KEPT
from quantlib.search.tasks import Objective, task_cost

COST_TOLERANCE = 1e-9
"""Relative tolerance on limits of measured costs: sums of floats depend on their order. Bytes have
none."""

Picks = tuple[int, ...]
"""For every item of a problem, in order, the index of its choice."""


@dataclass(frozen=True)
class Choice:
    """One way to store an item.

    bytes: what it adds to the file.
    loss:  predicted increase of the task's loss; of several tasks, the weighted sum of their
           relative increases. error: its standard error.
    costs: further additive costs by name (such as measured milliseconds, or the losses of single
           tasks), each >= 0.
    parts: (bytes, loss) of each member when the item has several.
    """

    scheme: str
    bytes: int
    loss: float
    costs: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    parts: tuple[tuple[int, float], ...] = ()

    def shares(self) -> tuple[tuple[int, float], ...]:
        """(bytes, loss) of every member, in order."""
        return self.parts or ((self.bytes, self.loss),)


@dataclass(frozen=True)
class Item:
    """Weights that get one scheme together; `block` is where they live, "" outside of blocks."""

    name: str
    members: tuple[str, ...]
    choices: tuple[Choice, ...]
    block: str = ""

    def __post_init__(self) -> None:
        if not self.choices:
            raise SearchError(f"{self.name} has no candidate scheme left to choose from")
        for choice in self.choices:
            if not (math.isfinite(choice.loss) and choice.bytes >= 0):
                raise SearchError(
                    f"{self.name} in {choice.scheme}: bytes must be >= 0 and the loss finite"
                )
            if len(choice.shares()) != len(self.members):
                raise SearchError(
                    f"{self.name} has {len(self.members)} members and {len(choice.shares())} costs "
                    f"in {choice.scheme}: build it with fuse()"
                )
            if not all(math.isfinite(cost) and cost >= 0 for cost in choice.costs.values()):
                raise SearchError(f"{self.name} in {choice.scheme}: costs must be finite and >= 0")
        if len({choice.scheme for choice in self.choices}) != len(self.choices):
            raise SearchError(f"{self.name} lists a scheme twice")


@dataclass(frozen=True)
class Problem:
    """Items in model order, and everything about the checkpoint that no choice changes.

    fixed_bytes: bytes that are there whatever is chosen (kept tensors, file headers).
    fixed_costs: likewise of the further costs, 0 where it is not said (attention, norms).
    weights:     member weights in model order (a fused group may not be contiguous in it).
    model, sensitivity, task: fingerprint of the model, digest of the table, loss column
                 (`tasks.COMBINED` for several).
    rules:       the user's constraints, as text; `rule_bytes`: what each adds to the smallest
                 possible size.
    objective:   what is minimised over several tasks. scales: task -> factor on its losses
                 (`Objective.scales`), empty for one task; every choice then has the losses of all
                 tasks among its costs (`tasks.task_cost`).
    """

    items: tuple[Item, ...]
    fixed_bytes: int = 0
    weights: tuple[str, ...] = ()
    engine: str = "quantlib"
    model: str = ""
    sensitivity: str = ""
    task: str = "kl"
    rules: tuple[str, ...] = ()
    rule_bytes: Mapping[str, int] = field(default_factory=dict)
    fixed_costs: Mapping[str, float] = field(default_factory=dict)
    objective: Objective = field(default_factory=Objective)
    scales: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        members = [member for item in self.items for member in item.members]
        if len(set(members)) != len(members):
            raise SearchError("a weight belongs to two items of the allocation problem")
        if self.fixed_bytes < 0:
            raise SearchError(f"fixed bytes cannot be negative ({self.fixed_bytes})")
        if not all(math.isfinite(cost) and cost >= 0 for cost in self.fixed_costs.values()):
            raise SearchError(f"fixed costs must be finite and >= 0 ({dict(self.fixed_costs)})")
        if not self.weights:
            object.__setattr__(self, "weights", tuple(members))

    def chosen(self, picks: Picks) -> list[Choice]:
        return [item.choices[pick] for item, pick in zip(self.items, picks, strict=True)]

    def bytes(self, picks: Picks) -> int:
        """Size of the whole checkpoint, exact."""
        return self.fixed_bytes + sum(choice.bytes for choice in self.chosen(picks))

    def loss(self, picks: Picks) -> float:
        """Sum of the losses of the choices."""
        return math.fsum(choice.loss for choice in self.chosen(picks))

    @property
    def balanced(self) -> tuple[str, ...]:
        """The tasks of which the largest relative increase is minimised; none where sums are."""
        if self.objective.balance != "minmax":
            return ()
        return tuple(task for task, scale in self.scales.items() if scale > 0)

    def value(self, picks: Picks) -> float:
        """What the search minimises: the sum of losses, or the largest of the tasks'."""
        if not self.balanced:
            return self.loss(picks)
        losses = self.task_losses(picks)
        return max(self.scales[task] * losses[task] for task in self.balanced)

    def task_losses(self, picks: Picks) -> dict[str, float]:
        """task -> sum of its predicted losses, in its own unit."""
        if not self.scales:
            return {self.task: self.loss(picks)}
        return {task: self.cost(task_cost(task), picks) for task in self.scales}

    def cost(self, name: str, picks: Picks) -> float:
        """Sum of one of the further costs, its fixed part included.

        Raises SearchError when a choice does not have it.
        """
        costs = [self.fixed_costs.get(name, 0.0)]
        for item, choice in zip(self.items, self.chosen(picks), strict=True):
            if name not in choice.costs:
                raise SearchError(
                    f"{item.name} in {choice.scheme} has no {name!r} cost: measure it or drop its "
                    "limit"
                )
            costs.append(choice.costs[name])
        return math.fsum(costs)

    def fits(self, picks: Picks, budget: int, limits: Mapping[str, float] | None = None) -> bool:
        """Whether the size is within `budget` and every further cost within its limit."""
        return self.bytes(picks) <= budget and all(
            self.cost(name, picks) <= limit * (1 + COST_TOLERANCE)
            for name, limit in (limits or {}).items()
        )

    def smallest(self) -> Picks:
        """The smallest allocation (of equally small choices the one that loses less)."""
        return tuple(
            _argmin(item, lambda choice: (choice.bytes, choice.loss)) for item in self.items
        )

    def best(self) -> Picks:
        """The allocation that loses least (of equally good choices the smaller one)."""
        return tuple(
            _argmin(item, lambda choice: (choice.loss, choice.bytes)) for item in self.items
        )

    def rounding(self) -> Problem:
        """The same problem without the choices that leave a weight as it is, for items that have
        others: probes are to say what rounding costs."""
        items = []
        for item in self.items:
            rounded = tuple(choice for choice in item.choices if choice.scheme not in KEPT)
            items.append(replace(item, choices=rounded or item.choices))
        return replace(self, items=tuple(items))

    def schemes(self, picks: Picks) -> dict[str, str]:
        """weight -> scheme, in model order."""
        scheme = {
            member: choice.scheme
            for item, choice in zip(self.items, self.chosen(picks), strict=True)
            for member in item.members
        }
        return {weight: scheme[weight] for weight in self.weights}

    def picks(self, schemes: Mapping[str, str]) -> Picks:
        """The picks that give every weight its scheme. Raises SearchError when they cannot."""
        picks = []
        for item in self.items:
            wanted = {schemes.get(member) for member in item.members}
            scheme = wanted.pop()
            known = [choice.scheme for choice in item.choices]
            if wanted:
                raise SearchError(
                    f"the members of {item.name} must share one scheme for engine {self.engine}"
                )
            if scheme not in known:
                raise SearchError(
                    f"{item.name} cannot be {scheme}: its candidates are {', '.join(known)}"
                )
            picks.append(known.index(scheme))
        return tuple(picks)


def _argmin(item: Item, key: Callable[[Choice], tuple[float, float]]) -> int:
    return min(range(len(item.choices)), key=lambda index: key(item.choices[index]))


def fuse(name: str, items: Sequence[Item]) -> Item:
    """One item out of several: the schemes that all offer, with bytes, losses and costs added.

    Errors add too (not in quadrature): the members were measured on the same windows and err
    together.
    """
    offered = [{choice.scheme: choice for choice in item.choices} for item in items]
    choices = []
    for scheme in offered[0]:
        if all(scheme in choices_of for choices_of in offered):
            together = [choices_of[scheme] for choices_of in offered]
            shared = set.intersection(*(set(choice.costs) for choice in together))
            choices.append(
                Choice(
                    scheme,
                    sum(choice.bytes for choice in together),
                    math.fsum(choice.loss for choice in together),
                    {
                        cost: math.fsum(choice.costs[cost] for choice in together)
                        for cost in sorted(shared)
                    },
                    math.fsum(choice.error for choice in together),
                    tuple((choice.bytes, choice.loss) for choice in together),
                )
            )
    if not choices:
        names = ", ".join(item.name for item in items)
        raise SearchError(
            f"{names} must share a scheme and have no candidate in common: measure them alike"
        )
    return Item(
        name,
        tuple(member for item in items for member in item.members),
        tuple(choices),
        items[0].block,
    )
