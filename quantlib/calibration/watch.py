"""Watching every group of a model that runs as a whole: `whole.py` drives, this listens.

Linears, convolutions, embeddings and heads are hooked, experts are run one by one in front of the
same accumulators (`observe.py`). Outputs that depend on no other module get a zero added that asks
for a gradient, so a backward pass from any loss reaches every module on its path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.calibration.convolution import ConvRows
from quantlib.calibration.lookups import LookupSums
from quantlib.calibration.observe import LINEAR_ROWS, Accumulator, Rows, observed_experts
from quantlib.models.modelmap import LinearGroup, ModelMap

Note = Callable[[Tensor, Tensor], None]
"""What is done with a module's input and output."""


class Weighting(Enum):
    """Which tokens decide a group's Hessian; output gradients are the same under each.

    TOKEN:    each by its own gradient energy (token importance; `statistics.py`).
    ROOT:     by the root of it: of few records some hundredth of the tokens has most of the energy,
              and a Hessian of a hundred tokens says little of a matrix with a thousand columns.
    MODALITY: by the mean gradient energy of its modality in its sample (after MBQ,
              arXiv:2412.19509, which takes mean absolute gradients).
    NONE:     each the same.
    """

    TOKEN = "token"
    ROOT = "root"
    MODALITY = "modality"
    NONE = "none"


class Watcher:
    """Accumulators of all groups of a model, and sums of its embeddings and heads.

    anchor: a zero that gradients are asked for. It is added to outputs that depend on no other
            module, so that there is a gradient to send back to them.
    """

    def __init__(self, model_map: ModelMap, seed: int, weighting: Weighting) -> None:
        self.window = -1
        self.modality = torch.empty(0, dtype=torch.int64)
        self.weighting = weighting
        self.ran: set[str] = set()
        self.anchor = torch.zeros((), requires_grad=True)
        self.accumulators: dict[str, list[Accumulator]] = {}
        self.lookups: dict[str, LookupSums] = {}
        positions: dict[str | None, int] = {}
        stacks = (block for stack in model_map.stacks for block in stack.blocks)
        blocks = {name: index for index, name in enumerate((*model_map.blocks, *stacks, None))}
        for group in model_map.groups:
            position = positions[group.block] = positions.get(group.block, -1) + 1
            own = seed + 104729 * blocks[group.block] + 7919 * position
            first = model_map.weight(group.members[0])
            if group.kind in ("embedding", "head"):
                generator = torch.Generator().manual_seed(own)
                self.lookups[group.name] = LookupSums(
                    first.out_features, first.in_features, generator
                )
                continue
            self.accumulators[group.name] = [
                Accumulator(
                    group.members, True, torch.Generator().manual_seed(own + expert), self.weights
                )
                for expert in range(first.experts)
            ]

    def weights(self, energy: Tensor) -> Tensor:
        """Token weights of one call from its gradient energies [T]. A call that reads other rows
        than the language model's is of one modality."""
        if self.weighting is Weighting.TOKEN:
            return energy
        if self.weighting is Weighting.ROOT:
            return energy.sqrt()
        if self.weighting is Weighting.NONE:
            return torch.ones_like(energy)
        modality = self.modality
        if len(modality) != len(energy):
            modality = torch.zeros(len(energy), dtype=torch.int64)
        kinds = int(modality.max()) + 1
        sums = torch.zeros(kinds).index_add(0, modality, energy)
        return (sums / modality.bincount(minlength=kinds).clamp(min=1))[modality]

    def fewest_expert_tokens(self) -> float:
        """Tokens of the expert that saw fewest, among mixtures that were run."""
        stacks = [a for name, a in self.accumulators.items() if len(a) > 1 and name in self.ran]
        return min((expert.tokens for stack in stacks for expert in stack), default=math.inf)

    def anchored(self, y: Tensor) -> Tensor:
        """y with a gradient, where there can be one."""
        if y.requires_grad or not torch.is_grad_enabled():
            return y
        return y + self.anchor.to(y.dtype)

    def seen(
        self,
        group: str,
        member: str,
        x: Tensor,
        y: Tensor,
        expert: int = 0,
        rows: Rows = LINEAR_ROWS,
    ) -> None:
        """Note input and output of one matrix (`observe.LinearObserver`)."""
        self.ran.add(group)
        if y.requires_grad:
            self.accumulators[group][expert].seen(member, x, y, self.window, rows)

    def looked_up(self, group: str, ids: Tensor, y: Tensor) -> None:
        """Note rows that were read from an embedding."""
        self.ran.add(group)
        if y.requires_grad:
            flat, width = ids.reshape(-1), y.shape[-1]
            sums = self.lookups[group]
            y.register_hook(lambda g: sums.looked_up(flat, g.reshape(-1, width)))

    def predicted(self, group: str, h: Tensor, logits: Tensor) -> None:
        """Note inputs and outputs of a head."""
        self.ran.add(group)
        if logits.requires_grad:
            sums, window = self.lookups[group], self.window
            flat_h, flat = h.detach().flatten(0, -2), logits.detach().flatten(0, -2)
            logits.register_hook(
                lambda g: sums.predicted(flat_h, flat, g.reshape(flat.shape), window)
            )


@contextmanager
def watched(model: nn.Module, model_map: ModelMap, watcher: Watcher) -> Iterator[None]:
    """Hook every group of the map while the context lasts."""
    with ExitStack() as stack:
        stack.enter_context(observed_experts(model, model_map, model_map.groups, watcher))
        for group in model_map.groups:
            for module, note in _notes(model, model_map, group, watcher):
                handle = model.get_submodule(module).register_forward_hook(
                    # before hooks that change outputs: gradients are those of the parameter's own
                    partial(_hook, watcher, note),
                    with_kwargs=True,
                    prepend=True,
                )
                stack.callback(handle.remove)
        yield


def _notes(
    model: nn.Module, model_map: ModelMap, group: LinearGroup, watcher: Watcher
) -> Iterator[tuple[str, Note]]:
    """The modules of a group to watch; experts are not run as modules."""
    for weight in model_map.members(group):
        if weight.kind == "embedding":
            yield weight.module, partial(watcher.looked_up, group.name)
            if weight.head is not None:
                yield weight.head, partial(watcher.predicted, group.name)
        elif weight.kind == "head":
            yield weight.module, partial(watcher.predicted, group.name)
        elif weight.kind != "experts":
            rows: Rows = LINEAR_ROWS
            if weight.kind == "conv":
                rows = ConvRows.of(weight.name, model.get_submodule(weight.module))
            yield weight.module, partial(watcher.seen, group.name, weight.name, rows=rows)


def _hook(
    watcher: Watcher,
    note: Note,
    module: nn.Module,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
    output: Tensor,
) -> Tensor:
    y = watcher.anchored(output)
    note(arguments[0] if arguments else next(iter(named.values())), y)
    return y
