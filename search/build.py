"""From a sensitivity table, a model's weights and the user's rules to the allocation problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from quantlib.errors import SearchError, UsageError
from quantlib.search.activations import rounds_inputs
from quantlib.search.constraints import Rule, allowed, check_matches
from quantlib.search.problem import Choice, Item, Problem, fuse
from quantlib.search.sensitivity import Entry, Sensitivity
from quantlib.search.tasks import COMBINED, Objective, task_cost
from quantlib.search.weights import ENGINES, GroupInfo, WeightInfo, units


def build_problem(
    table: Sensitivity,
    weights: Iterable[WeightInfo],
    *,
    fixed_bytes: int,
    engine: str = "quantlib",
    groups: Iterable[GroupInfo] | None = None,
    rules: Sequence[Rule] = (),
    task: str | None = None,
    objective: Objective | None = None,
    costs: Mapping[str, Mapping[tuple[str, str], float]] | None = None,
    fixed_costs: Mapping[str, float] | None = None,
) -> Problem:
    """The problem of choosing a scheme for each weight from what was measured, under `rules`.

    fixed_bytes: bytes of the checkpoint that no choice changes.
    engine:      who will run it; `groups` says which linear groups an engine that fuses does fuse.
    task:        the one loss column to minimise; by default all, as `objective` says.
    costs:       name -> (weight, scheme) -> cost, for limits other than bytes.
    fixed_costs: name -> what is spent whatever is chosen.

    Raises UsageError for an unknown engine or task and for rules that match nothing or contradict
    each other, SearchError when the table and the model do not have the same weights, and where
    several tasks cannot be compared.
    """
    infos = list(weights)
    objective = objective or Objective()
    scales = {} if task else objective.scales(table.tasks, table.baseline)
    task = task or (COMBINED if scales else table.tasks[0])
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}: use one of {', '.join(ENGINES)}")
    if not scales and task not in table.tasks:
        raise UsageError(
            f"the sensitivity table has no {task!r} column: it has {', '.join(table.tasks)}"
        )
    _check_same_weights(table, infos)
    check_matches(rules, infos)
    items: list[Item] = []
    rule_bytes: dict[str, int] = {}
    rounded = {info.name for info in infos if rounds_inputs(table.rows[info.name])}
    for name, members in units(infos, engine, groups, rounded).items():
        parts = [_weight_item(table, info, task, scales, costs or {}) for info in members]
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
        objective if scales else Objective(),
        scales,
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
    scales: Mapping[str, float],
    costs: Mapping[str, Mapping[tuple[str, str], float]],
) -> Item:
    choices = []
    for scheme, entry in table.rows[info.name].items():
        cost = {
            name: prices[info.name, scheme]
            for name, prices in costs.items()
            if (info.name, scheme) in prices
        }
        cost |= {task_cost(name): _loss_of(info.name, scheme, entry, name) for name in scales}
        loss, error = entry.priced(task, scales)
        choices.append(Choice(scheme, entry.bytes, loss, cost, error))
    return Item(info.name, (info.name,), tuple(choices), info.block or "")


def _loss_of(weight: str, scheme: str, entry: Entry, task: str) -> float:
    """The loss of one of several tasks. Raises SearchError for a negative one: a plan could then
    pay for one weight's loss with another's gain."""
    if entry.loss[task] < 0:
        raise SearchError(
            f"{weight} in {scheme}: the predicted {task} is {entry.loss[task]:g}; where several "
            "tasks are minimised, losses must not be negative"
        )
    return entry.loss[task]


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
