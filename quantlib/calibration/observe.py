"""Watching the linears of one block: second moments of inputs, weighted by the gradients of outputs.

`observe_block` hooks every linear group of a loaded block. During a forward pass each hook remembers its input; during
the backward pass the outputs' gradients arrive, and when the last member of a group has its gradient the pair is
accumulated and forgotten. Without gradients (`weighted=False`) inputs are accumulated at once.

Experts are stacks of matrices inside one module: their forward is replaced by an equivalent loop that shows each
expert's rows to the same accumulators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.calibration.statistics import GroupStatistics, MatrixStatistics
from quantlib.errors import ModelError
from quantlib.models.modelmap import ModelMap

SAMPLES_PER_WINDOW = 8
"""Tokens of each window whose input and output gradients are kept for standard errors."""


@dataclass
class Accumulator:
    """Sums over tokens for one input (a dense group, or one expert)."""

    members: tuple[str, ...]
    weighted: bool
    generator: torch.Generator
    hessian: Tensor | None = None
    tokens: int = 0
    weight_sum: float = 0.0
    fisher: dict[str, Tensor] = field(default_factory=dict)
    sample_x: list[Tensor] = field(default_factory=list)
    sample_g: dict[str, list[Tensor]] = field(default_factory=dict)
    sample_window: list[Tensor] = field(default_factory=list)
    token_weight: list[Tensor] = field(default_factory=list)
    pending: dict[str, Tensor] = field(default_factory=dict)

    def seen(self, member: str, x: Tensor, y: Tensor, window: int) -> None:
        """Note input x [T, K] and output y [T, N] of one member."""
        x = x.detach().reshape(-1, x.shape[-1])
        if self.weighted:
            y.register_hook(partial(self._gradient, member, x, window))
        elif member == self.members[0]:
            self._add(x, {}, window)

    def _gradient(self, member: str, x: Tensor, window: int, gradient: Tensor) -> None:
        self.pending[member] = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        if len(self.pending) == len(self.members):
            self._add(x, self.pending, window)
            self.pending = {}

    def _add(self, x: Tensor, gradients: dict[str, Tensor], window: int) -> None:
        x = x.float()
        squares = {name: g.square() for name, g in gradients.items()}
        if self.weighted:
            token_weight = torch.stack([s.sum(1) for s in squares.values()]).sum(0)
            scaled = x * token_weight.sqrt()[:, None]
            self.weight_sum += float(token_weight.sum())
            self.token_weight.append(token_weight)
        else:
            scaled = x
            self.weight_sum += len(x)
        if self.hessian is None:
            self.hessian = torch.zeros(x.shape[1], x.shape[1])
        self.hessian.addmm_(scaled.T, scaled)
        self.tokens += len(x)
        for name, square in squares.items():
            self.fisher[name] = self.fisher.get(name, torch.zeros(square.shape[1])) + square.sum(0)
        chosen = torch.randperm(len(x), generator=self.generator)[:SAMPLES_PER_WINDOW]
        self.sample_x.append(x[chosen])
        self.sample_window.append(torch.full((len(chosen),), window))
        for name, g in gradients.items():
            self.sample_g.setdefault(name, []).append(g[chosen])

    def finish(self) -> MatrixStatistics:
        """Sums to means."""
        if self.hessian is None:
            return MatrixStatistics(torch.empty(0, 0), 0, 0.0)
        return MatrixStatistics(
            self.hessian / max(self.weight_sum, 1e-300),
            self.tokens,
            self.weight_sum,
            {name: value / self.tokens for name, value in self.fisher.items()},
            torch.cat(self.sample_x),
            {name: torch.cat(values) for name, values in self.sample_g.items()},
            torch.cat(self.sample_window),
            torch.cat(self.token_weight) if self.token_weight else torch.empty(0),
        )


class BlockObserver:
    """Accumulators of every linear group of one block; `window` is the index of the window being run."""

    def __init__(self, model_map: ModelMap, block: str, weighted: bool, seed: int) -> None:
        self.window = 0
        self.accumulators: dict[str, list[Accumulator]] = {}
        for position, group in enumerate(model_map.groups_in(block)):
            experts = model_map.weight(group.members[0]).experts
            self.accumulators[group.name] = [
                Accumulator(group.members, weighted, torch.Generator().manual_seed(seed + 7919 * position + e))
                for e in range(experts)
            ]

    def seen(self, group: str, member: str, x: Tensor, y: Tensor, expert: int = 0) -> None:
        """Note input and output of one matrix."""
        self.accumulators[group][expert].seen(member, x, y, self.window)

    def statistics(self) -> list[GroupStatistics]:
        """One entry per linear group of the block."""
        return [
            GroupStatistics(name, [a.finish() for a in accumulators])
            for name, accumulators in self.accumulators.items()
        ]


@contextmanager
def observed(model: nn.Module, model_map: ModelMap, block: str, observer: BlockObserver) -> Iterator[None]:
    """Hook the block's linears (and replace the forward of its experts) for the length of the context."""
    handles = []
    experts: dict[str, dict[str, tuple[str, str]]] = {}
    for group in model_map.groups_in(block):
        for name in group.members:
            weight = model_map.weight(name)
            if weight.kind == "experts":
                experts.setdefault(weight.module, {})[name.rpartition(".")[2]] = (group.name, name)
                continue
            hook = _linear_hook(observer, group.name, name)
            handles.append(model.get_submodule(weight.module).register_forward_hook(hook))
    replaced = []
    for path, members in experts.items():
        module = model.get_submodule(path)
        module.forward = partial(_experts_forward, module, members, observer)  # type: ignore[method-assign]
        replaced.append(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.forward


def _linear_hook(observer: BlockObserver, group: str, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        observer.seen(group, name, inputs[0], output)

    return hook


def _experts_forward(
    module: Any,
    members: dict[str, tuple[str, str]],
    observer: BlockObserver,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The experts' forward, expert by expert, showing each matrix's input and output to the observer.

    hidden_states [T, D]; top_k_index, top_k_weights [T, top_k]. The contract of transformers 5's expert modules:
    `gate_up_proj` [E, 2I, D], `down_proj` [E, D, I], `act_fn`.
    """
    if set(members) != {"gate_up_proj", "down_proj"}:
        raise ModelError(f"experts with parameters {sorted(members)} are not known: expected gate_up_proj, down_proj")
    out = torch.zeros_like(hidden_states)
    for expert in torch.unique(top_k_index).tolist():
        token, position = torch.where(top_k_index == expert)
        x = hidden_states[token]
        both = _matrix(module, "gate_up_proj", members, observer, expert, x)
        gate, up = both.chunk(2, dim=-1)
        y = _matrix(module, "down_proj", members, observer, expert, module.act_fn(gate) * up)
        out = out.index_add(0, token, (y * top_k_weights[token, position, None]).to(out.dtype))
    return out


def _matrix(
    module: Any, leaf: str, members: dict[str, tuple[str, str]], observer: BlockObserver, expert: int, x: Tensor
) -> Tensor:
    group, name = members[leaf]
    y = nn.functional.linear(x, getattr(module, leaf)[expert])
    observer.seen(group, name, x, y, expert)
    return y


def group_names(model_map: ModelMap, block: str) -> Sequence[str]:
    """Names of a block's linear groups, in order."""
    return [group.name for group in model_map.groups_in(block)]
