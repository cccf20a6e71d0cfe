"""One unit of a model that is run as a whole, under re-rounding: run again on what its rounded
predecessors produce, with any weights.

`planned_block` for units that are replayed (`replay`): calls are of different lengths, a record may
have several, and every stream of records counts by its own loss. The unit of the full-precision
model runs on its own inputs, the rounded one on those it will really have, its inputs, keys and
values rounded as the plan says. Errors are compared
at the unit's output: of a block that is the residual stream, so that what predecessors did wrong
counts, and can be made good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.models.rows import LinearGroup
from quantlib.pipeline.planned_block import additive
from quantlib.pipeline.replay import Call, Unit, rows_of
from quantlib.rounding.asymmetric import Moments


@dataclass(frozen=True)
class Pair:
    """The same call of a unit in both models."""

    exact: Call
    rounded: Call

    @property
    def record(self) -> int:
        return self.exact.record


@dataclass(frozen=True)
class CallMetric:
    """What an error at a unit's output costs, call by call: token_weight float32 [T] of each, and
    output_weight float32 [D]."""

    token_weight: Sequence[Tensor]
    output_weight: Sequence[Tensor]

    def cost(self, error: Tensor, call: int) -> float:
        """Of the error [T, D] of one call, summed over its tokens."""
        squares = error.square() @ self.output_weight[call]
        return float((squares * self.token_weight[call]).sum(dtype=torch.float64))


class ReplayedUnit:
    """A unit in both models, and all calls of it.

    exact, rounded: the models. pairs: every call, in the order of the records.
    fit, held:      indices of the calls that are fitted, and of those that judge; one may be both.
    After `observe`, `outputs` are what the full-precision unit makes of its own inputs, by call
    [T, D], `groups` are in the order in which they run, those that do not are left out, and
    `tokens` are the rows that each has in every call.
    """

    def __init__(
        self,
        unit: Unit,
        exact: nn.Module,
        rounded: nn.Module,
        pairs: Sequence[Pair],
        fit: Sequence[int],
        held: Sequence[int],
    ) -> None:
        self.unit, self.pairs, self.fit, self.held = unit, list(pairs), list(fit), list(held)
        self._exact, self._rounded = exact, rounded
        self.groups = list(unit.groups)
        self.originals = {name: exact.get_parameter(name).detach() for name in unit.members}
        self.parameters = {name: rounded.get_parameter(name) for name in unit.members}
        self.outputs: list[Tensor] = []
        self._goals: dict[str, list[Tensor]] = {}
        self.tokens: dict[str, list[int]] = {group.name: [] for group in unit.groups}
        self.writers: tuple[str, ...] = ()

    # -- the exact unit ---------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self) -> None:
        """Run the exact unit on its own inputs: its outputs, its groups in order, which of them
        write to the stream, and what each is to reproduce: the stream behind it, or its input."""
        order: dict[str, None] = {}
        for call in (pair.exact for pair in self.pairs):
            taps = self._run(self._exact, call)
            self.outputs.append(taps.left)
            order |= dict.fromkeys(taps.inputs)
            for name, counts in self.tokens.items():
                counts.append(len(taps.inputs.get(name, ())))
            if len(self.outputs) == 1:
                self.writers = self._additive(taps, call.entering)
            stream = call.entering
            for name in self.tokens:
                self._goals.setdefault(name, []).append(torch.empty(0))
            for name, seen in taps.inputs.items():
                if name in self.writers:
                    stream = stream + taps.outputs[name]
                    seen = stream
                if seen.shape[1] <= stream.shape[1]:  # anything wider is not worth its memory
                    self._goals[name][-1] = seen
        places = {name: place for place, name in enumerate(order)}
        self.groups = sorted(
            (group for group in self.groups if group.name in places), key=lambda g: places[g.name]
        )

    def _additive(self, taps: _Taps, entering: Tensor) -> tuple[str, ...]:
        """Groups of one member whose outputs, added to what enters the unit, are what leaves it;
        none if there is no such choice (norms behind linears, experts, a linear alone)."""
        if entering.shape != taps.left.shape:
            return ()
        alone = {group.name for group in self.groups if len(group.members) == 1}
        made = {
            name: taps.outputs[name]
            for name in taps.inputs
            if name in alone and name in taps.outputs and taps.outputs[name].shape == entering.shape
        }
        return additive(entering, made, taps.left)

    @property
    def feels(self) -> LinearGroup | None:
        """The group whose output gradients are those of the unit's output: the last that writes to
        the stream, or the only one, whose output it is."""
        if len(self.unit.groups) == 1 and self.unit.name == _module(self.unit.groups[0]):
            return self.unit.groups[0]
        return next((group for group in self.groups if group.name in self.writers[-1:]), None)

    # -- the rounded unit -------------------------------------------------------------------------

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Give the rounded unit these weights (in the order of its inputs); others keep theirs."""
        for name, value in weights.items():
            self.parameters[name].copy_(value)

    @torch.no_grad()
    def moments(
        self,
        group: LinearGroup,
        members: Sequence[str],
        weights: Mapping[str, Tensor],
        token_weight: Sequence[Tensor],
    ) -> tuple[Moments, Moments]:
        """Moments of one group's rounded inputs over the calls that are fitted, and over those that
        judge, and of what `members` of it lack; the unit's other weights are at `weights`.

        token_weight: of every call, [T].
        """
        own = {name: self.originals[name] for name in members}
        self.put({**weights, **own})
        matrix = torch.cat(list(own.values())).float()
        fit, held = (Moments.zeros(*matrix.shape) for _ in range(2))
        for index, pair in enumerate(self.pairs):
            if not self.tokens[group.name][index]:
                continue
            until = (group.name, self.tokens[group.name][index])
            taps = self._run(self._rounded, pair.rounded, until)
            missing = self._missing(group.name, taps, index, matrix)
            for sums, chosen in ((fit, self.fit), (held, self.held)):
                if index in chosen:
                    sums.add(taps.inputs[group.name], missing, token_weight[index])
        return fit, held

    def _missing(self, group: str, taps: _Taps, call: int, matrix: Tensor) -> Tensor:
        """What the group's outputs lack, [T, N]: behind one that writes to the stream, what the
        stream lacks; otherwise what its own outputs do, of exact inputs."""
        goal, seen = self._goals[group][call], taps.inputs[group]
        if not len(goal):
            return torch.zeros(len(seen), len(matrix))
        if group not in self.writers:
            return (goal - seen) @ matrix.T
        behind = self.writers[: self.writers.index(group) + 1]
        written = sum((taps.outputs[name] for name in behind), torch.zeros(()))
        return goal - self.pairs[call].rounded.entering - written

    @torch.no_grad()
    def carry(self, weights: Mapping[str, Tensor]) -> list[Pair]:
        """The calls of the unit that is called like this one with what leaves it (with these
        weights, in the rounded model)."""
        self.put(weights)
        return [
            Pair(
                pair.exact.with_first(left),
                pair.rounded.with_first(self._run(self._rounded, pair.rounded).left),
            )
            for pair, left in zip(self.pairs, self.outputs, strict=True)
        ]

    @torch.no_grad()
    def judge(self, weights: Mapping[str, Tensor], metric: CallMetric) -> float:
        """What the unit's output loses with these weights over the calls that judge, relative to
        what losing all of it would cost."""
        self.put(weights)
        lost, all_of_it = 0.0, 0.0
        for index in self.held:
            found = self._run(self._rounded, self.pairs[index].rounded).left
            lost += metric.cost(found - self.outputs[index], index)
            all_of_it += metric.cost(self.outputs[index], index)
        return lost / max(all_of_it, 1e-300)

    # -- running ----------------------------------------------------------------------------------

    def _run(self, model: nn.Module, call: Call, until: tuple[str, int] = ("", 0)) -> _Taps:
        """One call; what went in and came out of every group, as far as the rows `until` (group,
        how many)."""
        taps = _Taps(until)
        with self._tapped(model, taps):
            taps.left = call.run(model.get_submodule(self.unit.name))
        return taps

    @contextmanager
    def _tapped(self, model: nn.Module, taps: _Taps) -> Iterator[None]:
        with ExitStack() as hooks, suppress(_Reached):
            for group in self.groups:
                module = model.get_submodule(_module(group))
                hook = taps.hook(group.name)
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield


def _module(group: LinearGroup) -> str:
    """Of the first member of a group."""
    return group.members[0].rpartition(".")[0]


class _Reached(Exception):
    """A run has come as far as it had to."""


class _Taps:
    """By group, of one run: `inputs` [T, K], as they are rounded, and `outputs` [T, N] of the first
    member; `left` [T, D], what left the unit."""

    def __init__(self, until: tuple[str, int]) -> None:
        self.until = until
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.left = torch.empty(0)

    def hook(self, group: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(
            _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
        ) -> None:
            seen = rows_of(arguments[0] if arguments else next(iter(named.values())))
            made = rows_of(output)
            if group in self.inputs:  # a unit may call a linear more than once
                seen = torch.cat([self.inputs[group], seen])
                made = torch.cat([self.outputs[group], made])
            self.inputs[group], self.outputs[group] = seen, made
            if self.until[0] == group and len(seen) >= self.until[1]:
                raise _Reached

        return hook
