"""Watching the linears of one block: second moments of inputs, weighted by gradients of outputs.

`observed` hooks every linear group of a loaded block. During a forward pass each hook remembers its
input; during the backward pass the outputs' gradients arrive, and when the last member of a group
has its gradient the pair is accumulated and forgotten. Without gradients (`weighted=False`) inputs
are accumulated at once.

Experts are stacks of matrices inside one module: their forward is replaced by an equivalent loop
that shows each expert's rows to the same accumulators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantlib.calibration.statistics import GroupStatistics, MatrixStatistics
from quantlib.errors import ModelError
from quantlib.models.memory import empty
from quantlib.models.modelmap import LinearGroup, ModelMap

SAMPLES_PER_WINDOW = 8
"""Tokens of each window whose input and output gradients are kept for standard errors."""

_EXPERT_LAYOUT = {
    "is_transposed": False,
    "has_bias": False,
    "has_post_expert_norm": False,
    "has_gate": True,
    "is_concatenated": True,
}
"""What transformers' expert modules say of themselves where `_experts_forward` is their forward."""


class Rows(Protocol):
    """How a module's input and output are rows of a matrix product: x [T, K] and y [T, N]."""

    def inputs(self, x: Tensor) -> Tensor: ...

    def outputs(self, y: Tensor) -> Tensor: ...


class LinearRows:
    """The last axis is multiplied; every other one is a token's place."""

    def inputs(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    outputs = inputs


LINEAR_ROWS = LinearRows()


def gradient_weights(energy: Tensor) -> Tensor:
    """Weights w_t [T] of tokens from their gradient energy sum_n (dL/dy_tn)^2: that itself."""
    return energy


@dataclass
class Accumulator:
    """Sums over tokens for one input (a dense group, or one expert); see `MatrixStatistics`.

    members:  weights that read it.
    weighted: whether gradients are coming.
    weigh:    token weights [T] of the Hessian from the gradient energies [T] of one call.
    turned:   members whose outputs will be turned: products of their gradients are kept, too.
    calls:    how often each member was called: a model may run a module several times.
    pending:  gradients [T, N] of one call of the members, until all are there.
    """

    members: tuple[str, ...]
    weighted: bool
    generator: torch.Generator
    weigh: Callable[[Tensor], Tensor] = gradient_weights
    turned: Container[str] = ()
    hessian: Tensor | None = None
    tokens: int = 0
    weight_sum: float = 0.0
    fisher: dict[str, Tensor] = field(default_factory=dict)
    sample_x: list[Tensor] = field(default_factory=list)
    sample_g: dict[str, list[Tensor]] = field(default_factory=dict)
    sample_window: list[Tensor] = field(default_factory=list)
    token_weight: list[Tensor] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    pending: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def seen(
        self, member: str, x: Tensor, y: Tensor, window: int, rows: Rows = LINEAR_ROWS
    ) -> None:
        """Note input x and output y of one member; of a linear, [..., K] and [..., N]."""
        self.calls[member] += 1
        if self.weighted:
            call = self.calls[member]
            y.register_hook(partial(self._gradient, member, call, x.detach(), window, rows))
        elif member == self.members[0]:
            self._add(rows.inputs(x.detach()).float(), {}, window)

    def _gradient(
        self, member: str, call: int, x: Tensor, window: int, rows: Rows, gradient: Tensor
    ) -> None:
        gradients = self.pending.setdefault(call, {})
        gradients[member] = rows.outputs(gradient.detach()).float()
        if len(gradients) == len(self.members):
            del self.pending[call]
            self._add(rows.inputs(x).float(), gradients, window)

    def _add(self, x: Tensor, gradients: Mapping[str, Tensor], window: int) -> None:
        """Add the tokens x [T, K] with the gradients [T, N] of all members (none: weight 1)."""
        scaled, weight_sum = x, float(len(x))
        if gradients:
            squares = {name: g.square() for name, g in gradients.items()}
            energy = torch.stack([square.sum(1) for square in squares.values()]).sum(0)
            token_weight = self.weigh(energy)
            scaled, weight_sum = x * token_weight.sqrt()[:, None], float(token_weight.sum())
            self.token_weight.append(token_weight)
            for name, square in squares.items():
                self.fisher.setdefault(name, torch.zeros(square.shape[1])).add_(square.sum(0))
        if self.hessian is None:
            self.hessian = empty((x.shape[1], x.shape[1]), torch.float32).zero_()
        self.hessian.addmm_(scaled.T, scaled)
        self.weight_sum += weight_sum
        self.tokens += len(x)
        chosen = torch.randperm(len(x), generator=self.generator)[:SAMPLES_PER_WINDOW]
        self.sample_x.append(x[chosen])
        self.sample_window.append(torch.full((len(chosen),), window))
        for name, g in gradients.items():
            self.sample_g.setdefault(name, []).append(g[chosen])
            if name in self.turned:
                self.outputs.setdefault(name, g.new_zeros(g.shape[1], g.shape[1])).addmm_(g.T, g)

    def finish(self) -> MatrixStatistics:
        """Sums to means, once: the Hessian is handed over. Without any token weight it is zero."""
        if self.hessian is None:
            return MatrixStatistics(torch.empty(0, 0), 0, 0.0)
        hessian, self.hessian = self.hessian, None
        return MatrixStatistics(
            hessian.div_(self.weight_sum) if self.weight_sum > 0 else hessian,
            self.tokens,
            self.weight_sum,
            {name: value / self.tokens for name, value in self.fisher.items()},
            torch.cat(self.sample_x),
            {name: torch.cat(values) for name, values in self.sample_g.items()},
            torch.cat(self.sample_window),
            torch.cat(self.token_weight) if self.token_weight else torch.empty(0),
            {name: value / self.tokens for name, value in self.outputs.items()},
        )


class LinearObserver(Protocol):
    """What `observed` shows every matrix of a block to."""

    def seen(self, group: str, member: str, x: Tensor, y: Tensor, expert: int = 0) -> None: ...


class BlockObserver:
    """Accumulators of every linear group of one block; `window` is the index of the one being run.

    weighted: wait for the gradients of outputs. seed: of the draws of sample tokens.
    turned:   weights whose outputs will be turned.
    """

    def __init__(
        self,
        model_map: ModelMap,
        block: str,
        weighted: bool,
        seed: int,
        turned: Container[str] = (),
    ) -> None:
        self.window = 0
        self.accumulators: dict[str, list[Accumulator]] = {}
        for position, group in enumerate(model_map.groups_in(block)):
            self.accumulators[group.name] = [
                Accumulator(
                    group.members,
                    weighted,
                    torch.Generator().manual_seed(seed + 7919 * position + expert),
                    turned=turned,
                )
                for expert in range(model_map.weight(group.members[0]).experts)
            ]

    def seen(self, group: str, member: str, x: Tensor, y: Tensor, expert: int = 0) -> None:
        """Note input and output of one matrix."""
        self.accumulators[group][expert].seen(member, x, y, self.window)

    def statistics(self) -> list[GroupStatistics]:
        """One entry per linear group of the block."""
        return [
            GroupStatistics(name, [accumulator.finish() for accumulator in accumulators])
            for name, accumulators in self.accumulators.items()
        ]


@contextmanager
def observed(
    model: nn.Module, model_map: ModelMap, block: str, observer: LinearObserver
) -> Iterator[None]:
    """Hook the block's linears (and replace the forward of its experts) while the context lasts."""
    groups = model_map.groups_in(block)
    with (
        _hooked(model, model_map, groups, observer),
        observed_experts(model, model_map, groups, observer),
    ):
        yield


@contextmanager
def _hooked(
    model: nn.Module,
    model_map: ModelMap,
    groups: Iterable[LinearGroup],
    observer: LinearObserver,
) -> Iterator[None]:
    handles = []
    for group in groups:
        for weight in model_map.members(group):
            if weight.kind != "experts":
                hook = _linear_hook(observer, group.name, weight.name)
                handles.append(model.get_submodule(weight.module).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observed_experts(
    model: nn.Module,
    model_map: ModelMap,
    groups: Iterable[LinearGroup],
    observer: LinearObserver,
) -> Iterator[None]:
    """Replace the forward of the experts in these groups while the context lasts."""
    experts: dict[str, dict[str, tuple[str, str]]] = {}
    for group in groups:
        for weight in model_map.members(group):
            if weight.kind == "experts":
                leaf = weight.name.rpartition(".")[2]
                experts.setdefault(weight.module, {})[leaf] = (group.name, weight.name)
    replaced: list[nn.Module] = []
    try:
        for path, members in experts.items():
            module = model.get_submodule(path)
            _check_experts(path, module, members)
            module.forward = partial(_experts_forward, module, members, observer)
            replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


def _linear_hook(observer: LinearObserver, group: str, name: str) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        observer.seen(group, name, inputs[0], output)

    return hook


def _check_experts(path: str, module: nn.Module, members: Mapping[str, object]) -> None:
    """Raise ModelError unless `_experts_forward` computes what the module would."""
    if set(members) != {"gate_up_proj", "down_proj"}:
        raise ModelError(
            f"{path} has expert weights {sorted(members)}: only gate_up_proj and down_proj are "
            "known, so this model cannot be calibrated"
        )
    for setting, expected in _EXPERT_LAYOUT.items():
        if getattr(module, setting, expected) != expected:
            raise ModelError(
                f"{path} has experts with {setting} = {not expected}, which calibration does not "
                "know how to run one by one"
            )


def _experts_forward(
    module: Any,
    members: dict[str, tuple[str, str]],
    observer: LinearObserver,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The experts' forward, one by one, showing each matrix's input and output to the observer.

    hidden_states [T, D]; top_k_index, top_k_weights [T, top_k]. The contract of transformers 5's
    expert modules: `gate_up_proj` [E, 2I, D], `down_proj` [E, D, I], `_apply_gate`.
    """

    def matrix(leaf: str, expert: int, x: Tensor) -> Tensor:
        group, name = members[leaf]
        y = nn.functional.linear(x, getattr(module, leaf)[expert])
        observer.seen(group, name, x, y, expert)
        return y

    out = torch.zeros_like(hidden_states)
    for expert in torch.unique(top_k_index).tolist():
        token, position = torch.where(top_k_index == expert)
        # the module's own method: a rotation of the hidden layer is attached to it
        hidden = module._apply_gate(matrix("gate_up_proj", expert, hidden_states[token]))
        y = matrix("down_proj", expert, hidden)
        y = y * top_k_weights[token, position, None]
        out = out.index_add(0, token, y.to(out.dtype))
    return out
