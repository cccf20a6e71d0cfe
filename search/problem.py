"""The allocation problem: items, each with choices that cost bytes and lose something.

An item is the smallest thing that gets a scheme of its own: one weight; or one linear group (q/k/v,
gate/up) when the engine that will run the checkpoint fuses the group into one matrix and therefore
needs one scheme for all of it. Bytes and losses of a group's members add. Nothing here knows how to
solve; `solve.py` takes a `Problem` and returns picks: for every item, in order, the index of its
choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from quantlib.errors import SearchError, UsageError
from quantlib.search.activations import rounds_inputs
from quantlib.search.constraints import Rule, allowed, check_matches
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.weights import ENGINES, GroupInfo, WeightInfo, units

COST_TOLERANCE = 1e-9
"""Relative tolerance on limits of measured costs: sums of floats depend on their order. Bytes have
none."""

Picks = tuple[int, ...]
"""For every item of a problem, in order, the index of its choice."""


@dataclass(frozen=True)
class Choice:
    """One way to store an item.

    bytes: what it adds to the file.
    loss:  predicted increase of the task's loss. error: its standard error.
    costs: further additive costs by name (such as measured milliseconds), each >= 0.
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
    model, sensitivity, task: fingerprint of the model, digest of the table, loss column.
    rules:       the user's constraints, as text; `rule_bytes`: what each adds to the smallest
                 possible size.
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
        return math.fsum(choice.loss for choice in self.chosen(picks))

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


def build_problem(
    table: Sensitivity,
    weights: Iterable[WeightInfo],
    *,
    fixed_bytes: int,
    engine: str = "quantlib",
    groups: Iterable[GroupInfo] | None = None,
    rules: Sequence[Rule] = (),
    task: str | None = None,
    costs: Mapping[str, Mapping[tuple[str, str], float]] | None = None,
    fixed_costs: Mapping[str, float] | None = None,
) -> Problem:
    """The problem of choosing a scheme for each weight from what was measured, under `rules`.

    fixed_bytes: bytes of the checkpoint that no choice changes.
    engine:      who will run it; `groups` says which linear groups an engine that fuses does fuse.
    task:        loss column to minimise, the first one by default.
    costs:       name -> (weight, scheme) -> cost, for limits other than bytes.
    fixed_costs: name -> what is spent whatever is chosen.

    Raises UsageError for an unknown engine or task and for rules that match nothing or contradict
    each other, SearchError when the table and the model do not have the same weights.
    """
    infos = list(weights)
    task = task or table.tasks[0]
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}: use one of {', '.join(ENGINES)}")
    if task not in table.tasks:
        raise UsageError(
            f"the sensitivity table has no {task!r} column: it has {', '.join(table.tasks)}"
        )
    _check_same_weights(table, infos)
    check_matches(rules, infos)
    items: list[Item] = []
    rule_bytes: dict[str, int] = {}
    rounded = {info.name for info in infos if rounds_inputs(table.rows[info.name])}
    for name, members in units(infos, engine, groups, rounded).items():
        parts = [_weight_item(table, info, task, costs or {}) for info in members]
        item = fuse(name, parts) if len(parts) > 1 else parts[0]
        items.append(_constrain(item, members, rules, rule_bytes))
    return Problem(
        tuple(items),
        fixed_bytes,
        tuple(info.name for info in infos),
        engine,
        table.model,
        table.digest(),
        task,
        tuple(str(rule) for rule in rules),
        rule_bytes,
        dict(fixed_costs or {}),
    )


def _check_same_weights(table: Sensitivity, infos: Sequence[WeightInfo]) -> None:
    names = {info.name for info in infos}
    missing = [info.name for info in infos if info.name not in table.rows]
    unknown = [weight for weight in table.weights if weight not in names]
    for what, found in (
        ("was never measured", missing),
        ("is not a weight of this model", unknown),
    ):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise SearchError(
                f"{found[0]}{more} {what}: the table and the model do not belong together"
            )


def _weight_item(
    table: Sensitivity,
    info: WeightInfo,
    task: str,
    costs: Mapping[str, Mapping[tuple[str, str], float]],
) -> Item:
    choices = []
    for scheme, entry in table.rows[info.name].items():
        cost = {
            name: prices[info.name, scheme]
            for name, prices in costs.items()
            if (info.name, scheme) in prices
        }
        choices.append(Choice(scheme, entry.bytes, entry.loss[task], cost, entry.error[task]))
    return Item(info.name, (info.name,), tuple(choices), info.block or "")


def _constrain(
    item: Item, members: Sequence[WeightInfo], rules: Sequence[Rule], rule_bytes: dict[str, int]
) -> Item:
    """The item with only the choices its rules allow; adds to `rule_bytes` what each rule costs at
    the least."""
    applying = [rule for rule in rules if any(rule.matches(info) for info in members)]
    if not applying:
        return item
    kept = set(allowed(item.name, [choice.scheme for choice in item.choices], applying))
    smallest = min(choice.bytes for choice in item.choices)
    for rule in applying:
        least = min(choice.bytes for choice in item.choices if rule.allows(choice.scheme))
        if least > smallest:
            rule_bytes[str(rule)] = rule_bytes.get(str(rule), 0) + least - smallest
    choices = tuple(choice for choice in item.choices if choice.scheme in kept)
    return Item(item.name, item.members, choices, item.block)
