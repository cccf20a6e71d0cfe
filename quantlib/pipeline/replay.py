"""Parts of a model that is run as a whole, each run again on its own.

A model of several parts cannot be taken apart by its map alone: an image enters in the middle of a
sentence, and every block of a decoder reads what an encoder made. But each repeated block is a
module that is called, and so is each linear between the stacks. What it was called with is recorded
during a pass of the whole model, which stops there; with these arguments the module can be run
again as often as its rounding needs, whatever stands around it. The blocks of a stack are called
alike, each with what the one before made: a pass is needed for the first of them alone. Where a
module run alone does not give what the model itself computed (a block that reads more than its
arguments), `Discovery.faithful` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.calibration.paths.workload import Workload
from quantlib.calibration.streams import Run as RunSample
from quantlib.calibration.streams import Sample
from quantlib.models.modelmap import ModelMap
from quantlib.models.rows import LinearGroup

SAME = 1e-4
"""A module run again gives what the model computed when both agree up to this, relative to the
length of the output: the same operations on the same numbers differ by nothing at all, but for the
ways in which threads divide a sum."""

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Unit:
    """A module whose linears are rounded together: a repeated block, or a linear outside of blocks.

    name:   of the module. groups: its dense linear groups, in the map's order.
    """

    name: str
    groups: tuple[LinearGroup, ...]

    @property
    def members(self) -> tuple[str, ...]:
        """Names of its weights."""
        return tuple(name for group in self.groups for name in group.members)


@dataclass(frozen=True)
class Call:
    """One call of a unit: the record (an index into all of them) that it belongs to, and its
    arguments."""

    record: int
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]

    @property
    def first(self) -> Any:
        """The first argument; None if there is none."""
        return self.arguments[0] if self.arguments else next(iter(self.named.values()), None)

    @property
    def entering(self) -> Tensor:
        """The first argument as rows, float32 [T, D]: the hidden states that enter a block."""
        return rows_of(self.first)

    def with_first(self, rows: Tensor) -> Call:
        """The same call with other hidden states, given as rows [T, D], for the first argument."""
        given = rows.to(self.first.dtype).reshape(self.first.shape)
        return replace(self, arguments=(given, *self.arguments[1:]))

    def run(self, module: nn.Module) -> Tensor:
        """Run a module with these arguments; its output as rows, float32 [T, D]."""
        return rows_of(module(*self.arguments, **self.named))


@dataclass
class Discovery:
    """What one pass over all records tells of the units.

    order:  of those that run, each before all that it leads to.
    calls:  unit -> how often each record calls it.
    first:  unit -> (record, what the model made of the unit's last call in it).
    before: unit -> the unit whose output enters it, if everything else that it is called with is
            the same, in every record: the blocks of a stack.
    """

    order: tuple[str, ...] = ()
    calls: dict[str, list[int]] = field(default_factory=dict)
    first: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)

    def faithful(self, unit: str, module: nn.Module, calls: Sequence[Call]) -> bool:
        """Whether recorded calls of the model itself give what it computed, also the second time: a
        block that keeps or changes what it is given does not. What enters it has to come first."""
        if not all(isinstance(call.first, Tensor) for call in calls):
            return False
        record, expected = self.first[unit]
        last = [call for call in calls if call.record == record][-1]
        last.run(module)
        found = last.run(module)
        if found.shape != expected.shape:
            return False
        error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        return error <= SAME


def units_of(model_map: ModelMap) -> list[Unit]:
    """The units of a map, in its order. Stacks of experts, convolutions, embeddings and heads are
    in none: they are rounded once, for the bank."""
    blocks: dict[str, list[LinearGroup]] = {}
    alone: list[Unit] = []
    for group in model_map.groups:
        if group.kind != "linear":
            continue
        if group.block is not None:
            blocks.setdefault(group.block, []).append(group)
            continue
        for name in group.members:
            own = replace(group, members=(name,))
            alone.append(Unit(model_map.weight(name).module, (own,)))
    return [*(Unit(name, tuple(groups)) for name, groups in blocks.items()), *alone]


def rows_of(value: Any) -> Tensor:
    """A tensor, or the first of several, as rows: float32 [T, D]."""
    while not isinstance(value, Tensor):
        value = value[0]
    return value.detach().reshape(-1, value.shape[-1]).float()


def samples_of(work: Workload, model: nn.Module) -> Iterator[tuple[RunSample, Sample]]:
    """All calibration samples, task by task, as the full-precision model makes them, and how each
    is run."""
    for task in work.tasks:
        stream = work.stream(task, model)
        for sample in stream.samples:
            yield stream.run, sample


def records_of(work: Workload) -> dict[str, range]:
    """Task -> the indices of its records among all of them."""
    found, first = {}, 0
    for task in work.tasks:
        found[task] = range(first, first + len(work.calibration[task]))
        first = found[task].stop
    return found


@torch.no_grad()
def discover(work: Workload, model: nn.Module, units: Sequence[Unit], tick: Tick) -> Discovery:
    """Run every record once through the full-precision model, and see which units it calls."""
    found = Discovery(calls={unit.name: [] for unit in units})
    tasks = {index: task for task, records in records_of(work).items() for index in records}
    orders: dict[str, dict[str, None]] = {task: {} for task in work.tasks}
    for record, (run, sample) in enumerate(samples_of(work, model)):
        for counts in found.calls.values():
            counts.append(0)
        watch = _Watch(found, orders[tasks[record]], record)
        with ExitStack() as hooks:
            for unit in units:
                module, hook = model.get_submodule(unit.name), partial(watch.called, unit.name)
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            run(model, **sample.inputs)
        tick(f"{tasks[record]} {record}")
    found.order = merged([list(order) for order in orders.values()])
    found.before = {
        name: before
        for name, before in found.before.items()
        if before and found.calls[name] == found.calls[before] and max(found.calls[name]) == 1
    }
    return found


@dataclass
class _Watch:
    """What is noted of the units' calls in one record.

    order: of the record's task. last: name, arguments and output of the call before.
    """

    found: Discovery
    order: dict[str, None]
    record: int
    last: tuple[str, tuple[Any, ...], dict[str, Any], Any] | None = None

    def called(
        self,
        unit: str,
        _: nn.Module,
        arguments: tuple[Any, ...],
        named: dict[str, Any],
        output: Any,
    ) -> None:
        """Note a call of a unit."""
        found = self.found
        self.order.setdefault(unit)
        found.calls[unit][self.record] += 1
        if unit not in found.first or found.first[unit][0] == self.record:
            found.first[unit] = (self.record, rows_of(output).clone())
        before = self._before(arguments, named)
        if found.before.setdefault(unit, before) != before:
            found.before[unit] = ""
        self.last = (unit, arguments, named, output)

    def _before(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
        """The unit called before, if its output enters this one, and all else is the same."""
        if self.last is None or not arguments:
            return ""
        unit, others, names, output = self.last
        left = output if isinstance(output, Tensor) else output[0]
        return (
            unit
            if left is arguments[0] and _same(arguments[1:], others[1:]) and _same(named, names)
            else ""
        )


def _same(mine: Any, other: Any) -> bool:
    """Whether two arguments are alike: the same objects, or made of equal ones."""
    if mine is other:
        return True
    if isinstance(mine, Tensor) or isinstance(other, Tensor):
        both = isinstance(mine, Tensor) and isinstance(other, Tensor)
        return both and mine.shape == other.shape and torch.equal(mine, other)
    if type(mine) is not type(other):
        return False
    if isinstance(mine, dict):
        return mine.keys() == other.keys() and all(_same(mine[key], other[key]) for key in mine)
    if isinstance(mine, tuple | list):
        return len(mine) == len(other) and all(map(_same, mine, other))
    return isinstance(mine, bool | int | float | str) and mine == other


def merged(orders: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """One order of all names. The first order stays; a name that only a later one has stands before
    the next that is already there, at the end if none is."""
    merged: list[str] = []
    for order in orders:
        place = len(merged)
        for name in reversed(order):
            if name in merged:
                place = merged.index(name)
            else:
                merged.insert(place, name)
    return tuple(merged)


@torch.no_grad()
def recorded(
    work: Workload, exact: nn.Module, models: Sequence[nn.Module], unit: str, calls: Sequence[int]
) -> list[list[Call]]:
    """What each of `models` calls a unit with, over all records; a pass ends with its last call.

    exact: makes the samples. calls: how often each record calls the unit (`Discovery.calls`).
    """
    found: list[list[Call]] = [[] for _ in models]
    for record, (run, sample) in enumerate(samples_of(work, exact)):
        if calls[record]:
            for model, own in zip(models, found, strict=True):
                with _recording(model.get_submodule(unit), own, record, calls[record]):
                    run(model, **sample.inputs)
    return found


@contextmanager
def _recording(module: nn.Module, calls: list[Call], record: int, last: int) -> Iterator[None]:
    """Note the arguments of a module's calls, and end the context with the `last` of them."""
    seen = 0

    def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        calls.append(Call(record, arguments, dict(named)))
        if seen == last:
            raise _Reached

    handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    try:
        with suppress(_Reached):
            yield
    finally:
        handle.remove()


class _Reached(Exception):
    """A pass has come as far as it had to."""
