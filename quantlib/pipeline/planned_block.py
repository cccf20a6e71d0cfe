"""One block of a plan under re-rounding: run on what its rounded predecessors produce, with any
weights.

`PlannedBlock` holds the block's exact outputs (what the full-precision model makes of its own
hidden states) and runs the block on the quantized model's hidden states, inputs of linears rounded
as the plan says, straight through for gradients. Errors are compared at the block's output, which
is the residual stream: what predecessors did wrong counts, and can be made good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor, nn

from quantlib.calibration.stream import BlockStream
from quantlib.formats.activation import ActivationSegment
from quantlib.models.memory import empty
from quantlib.models.rows import LinearGroup
from quantlib.pipeline.inputs import round_inputs
from quantlib.rounding.asymmetric import Moments
from quantlib.rounding.objective import OutputMetric
from quantlib.transforms.attention import ATTRIBUTE, AttentionState

ADDITIVE_TOLERANCE = 1e-4
"""A block adds its writers' outputs to the stream when its output equals their sum up to this,
relative to its length: float32 sums of a few terms are a hundred times closer."""


SAMPLED_WINDOWS = 6
"""Windows that a sample of tokens is taken from, or a few more: each has to be run."""

Inputs = tuple[tuple[ActivationSegment, ...], Tensor | None]
"""How a weight's inputs are rounded, and in which order of columns (`pipeline.inputs`)."""


@dataclass(frozen=True)
class Windows:
    """Indices of the windows that are fitted, and of those that judge."""

    fit: tuple[int, ...]
    held: tuple[int, ...]

    @staticmethod
    def split(count: int) -> Windows:
        """Every fifth window judges, the others are fitted; a single one does both."""
        held = tuple(range(2, count, 5)) or tuple(range(count))[-1:]
        fit = tuple(i for i in range(count) if i not in held) or held
        return Windows(fit, held)


def additive(entering: Tensor, outputs: Mapping[str, Tensor], leaving: Tensor) -> tuple[str, ...]:
    """Those of `outputs` that, added to what enters a block, are what leaves it, as many as can be
    (all [T, D]); none if there is no such choice (norms behind linears, experts)."""
    length = leaving.norm().clamp(min=1e-30)
    for count in range(len(outputs), 0, -1):
        for chosen in combinations(outputs, count):
            total = entering + sum(outputs[name] for name in chosen)
            if float((total - leaving).norm() / length) <= ADDITIVE_TOLERANCE:
                return chosen
    return ()


class PlannedBlock:
    """A loaded block, its groups, and both hidden states that enter it.

    exact, quantized: float32 [W, T, D], entering the block in the full-precision model and in the
                      quantized one.
    inputs:           weight -> how its inputs are rounded (nothing: not at all), and the order in
                      which it reads them (None: their own).
    caches:           attention module -> its state when keys and values are rounded.
    After `observe`, `outputs` are the exact ones [W, T, D], and `groups` are in the order in which
    they run.
    """

    def __init__(
        self,
        stream: BlockStream,
        index: int,
        module: nn.Module,
        groups: Sequence[LinearGroup],
        inputs: Mapping[str, Inputs],
        exact: Tensor,
        quantized: Tensor,
        windows: Windows,
        caches: Mapping[str, AttentionState] | None = None,
    ) -> None:
        self.stream, self.index, self.module = stream, index, module
        self.groups = list(groups)
        self.inputs, self.caches = dict(inputs), dict(caches or {})
        self.exact, self.quantized, self.windows = exact, quantized, windows
        names = [name for group in groups for name in group.members]
        self.parameters = {name: stream.model.get_parameter(name) for name in names}
        self.originals = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.outputs = empty(exact.shape, torch.float32)
        self.metric = OutputMetric(torch.ones(exact.shape[:2]), torch.ones(exact.shape[2]))
        self._goals: dict[str, Tensor] = {}
        self._writers: set[str] = set()

    # -- the exact block --------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self) -> None:
        """Run the exact block on its own inputs, and note what every group is to reproduce: the
        stream behind it where its output is added to the stream, else its input."""
        width = self.exact.shape[2]
        writers = [g.name for g in self.groups if self._rows(g) == width and len(g.members) == 1]
        for window, hidden in enumerate(self.exact):
            with self._taps() as taps:
                self.outputs[window] = self._run(hidden)
            if window == 0:
                self.groups.sort(key=lambda group: list(taps.inputs).index(group.name))
                made = {name: taps.outputs[name] for name in writers}
                self._writers = set(additive(hidden, made, self.outputs[0]))
            stream = hidden
            for group in self.groups:
                seen = taps.inputs[group.name]
                if group.name in self._writers:
                    stream = stream + taps.outputs[group.name]
                    seen = stream
                if seen.shape[1] == width:  # anything wider is not worth its memory
                    goal = self._goals.setdefault(group.name, empty(self.exact.shape, seen.dtype))
                    goal[window] = seen

    @property
    def last_writer(self) -> LinearGroup | None:
        """The group whose output gradient is the block's: the last that adds to the stream."""
        return next((g for g in reversed(self.groups) if g.name in self._writers), None)

    # -- the rounded block ------------------------------------------------------------------------

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Give the block these weights (in the order of its inputs); others keep theirs."""
        for name, value in weights.items():
            self.parameters[name].copy_(value)

    @torch.no_grad()
    def moments(
        self, group: LinearGroup, weights: Mapping[str, Tensor], token_weight: Tensor
    ) -> tuple[Moments, Moments]:
        """Moments of one group's rounded inputs over the windows that are fitted, and over those
        that judge, with the block's other groups at `weights`; token_weight: [W, T]."""
        own = {name: self.originals[name] for name in group.members}
        self.put({**weights, **own})
        matrix = torch.cat(list(own.values()))
        found = {kind: Moments.zeros(*matrix.shape) for kind in ("fit", "held")}
        for window, hidden in enumerate(self.quantized):
            with self._taps(until=group.name) as taps:
                self._run(hidden, rounded=True)
            seen = taps.inputs[group.name]
            kind = "held" if window in self.windows.held else "fit"
            if kind == "held" or window in self.windows.fit:
                missing = self._missing(group, taps, hidden, window, matrix)
                found[kind].add(seen, missing, token_weight[window])
            if window in self.windows.held and window in self.windows.fit:
                found["fit"].add(seen, missing, token_weight[window])
        return found["fit"], found["held"]

    @torch.no_grad()
    def sample(
        self, group: LinearGroup, weights: Mapping[str, Tensor], tokens: int
    ) -> tuple[Tensor, Tensor]:
        """About so many inputs of a group before they are rounded, spread over SAMPLED_WINDOWS of
        those that are fitted: float32 [T, K], and which tokens they are, int64 [T] into all
        windows' tokens."""
        self.put(weights)
        rounding = {name: self.inputs[name] for name in group.members}
        self.inputs |= {name: ((), order) for name, (_, order) in rounding.items()}
        found, places, length = [], [], self.exact.shape[1]
        fit = self.windows.fit
        chosen = fit[:: max(1, len(fit) // SAMPLED_WINDOWS)]
        step = max(1, len(chosen) * length // tokens)
        try:
            for window in chosen:
                with self._taps(until=group.name) as taps:
                    self._run(self.quantized[window], rounded=True)
                positions = torch.arange(window % step, length, step)
                found.append(taps.inputs[group.name][positions])
                places.append(positions + window * length)
        finally:
            self.inputs |= rounding
        return torch.cat(found), torch.cat(places)

    def _missing(
        self, group: LinearGroup, taps: _Taps, hidden: Tensor, window: int, matrix: Tensor
    ) -> Tensor:
        """What the group's outputs lack, [T, N]."""
        if group.name not in self._goals:
            return torch.zeros(len(hidden), len(matrix))
        goal = self._goals[group.name][window]
        if group.name not in self._writers:
            return (goal - taps.inputs[group.name]) @ matrix.T
        before = [g.name for g in self.groups[: self.groups.index(group) + 1]]
        written = [taps.outputs[name] for name in before if name in self._writers]
        return goal - hidden - sum(written, torch.zeros(()))

    @torch.no_grad()
    def judge(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Loss of each window that judges, float32 [V]."""
        self.put(weights)
        losses = [
            self.metric.loss(self._run(self.quantized[w], rounded=True) - self.outputs[w], w)
            for w in self.windows.held
        ]
        return torch.stack(losses)

    def gradients(
        self, weights: Mapping[str, Tensor], windows: Sequence[int], metric: OutputMetric
    ) -> dict[str, Tensor]:
        """Gradients of the mean loss under `metric` over some windows, one window at a time."""
        self.put(weights)
        leaves = [self.parameters[name].requires_grad_(True) for name in weights]
        total = {name: torch.zeros_like(self.parameters[name]) for name in weights}
        try:
            for window in windows:
                with torch.enable_grad():
                    out = self._run(self.quantized[window], rounded=True)
                    loss = metric.loss(out - self.outputs[window], window) / len(windows)
                    for name, part in zip(weights, torch.autograd.grad(loss, leaves), strict=True):
                        total[name] += part
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
        return total

    @torch.no_grad()
    def carry(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Quantized hidden states [W, T, D] that leave the block with these weights."""
        self.put(weights)
        out = empty(self.quantized.shape, torch.float32)
        for window, hidden in enumerate(self.quantized):
            out[window] = self._run(hidden, rounded=True)
        return out

    # -- running ----------------------------------------------------------------------------------

    def _rows(self, group: LinearGroup) -> int:
        return sum(len(self.originals[name]) for name in group.members)

    def _run(self, hidden: Tensor, rounded: bool = False) -> Tensor:
        """One window [T, D] through the block."""
        with self._rounding(rounded):
            return self.stream.run(self.index, self.module, hidden[None])[0]

    @contextmanager
    def _rounding(self, rounded: bool) -> Iterator[None]:
        """Round the inputs of linears, keys and values, straight through for gradients; or not."""
        for name, state in self.caches.items():
            chosen = state if rounded else replace(state, kv=None, query_bits=0)
            setattr(self.stream.model.get_submodule(name), ATTRIBUTE, chosen)
        with ExitStack() as hooks:
            alike: dict[tuple[object, int], _Rounds] = {}
            for name, inputs in self.inputs.items():
                if rounded and inputs[0]:
                    module = self.stream.model.get_submodule(name.rpartition(".")[0])
                    hook = alike.setdefault((inputs[0], id(inputs[1])), _Rounds(inputs))
                    hooks.callback(module.register_forward_pre_hook(hook).remove)
            yield

    @contextmanager
    def _taps(self, until: str = "") -> Iterator[_Taps]:
        """Note what goes in and comes out of every group during one `_run`; stop the run behind the
        group `until`."""
        taps = _Taps(until)
        with ExitStack() as hooks, suppress(_Reached):
            for group in self.groups:
                module = self.stream.model.get_submodule(group.members[0].rpartition(".")[0])
                hooks.callback(module.register_forward_hook(taps.hook(group.name)).remove)
            yield taps


class _Reached(Exception):
    """A run has come as far as it had to."""


class _Taps:
    """By group, of the last run: `inputs` [T, K], as rounded, and `outputs` [T, N] of the first
    member."""

    def __init__(self, until: str) -> None:
        self.until = until
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def hook(self, group: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[group] = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            self.outputs[group] = output.reshape(-1, output.shape[-1]).float()
            if group == self.until:
                raise _Reached

        return hook


class _Rounds:
    """A hook that rounds the input of linears, once for all that read the same."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.given: Tensor | None = None
        self.made: Tensor | None = None

    def __call__(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = arguments[0]
        if self.made is None or x is not self.given:
            error = round_inputs(x.detach(), *self.inputs) - x.detach()
            self.given, self.made = x, x + error
        return self.made, *arguments[1:]
