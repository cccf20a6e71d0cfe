"""A model at the widths that a search chose, as a source of its own.

Hidden channels of MLPs are what FLIQS searches beside formats: how many, the same share in every
block, because a transformers config has one width for all. Channels are left out from the end;
before training, `order_channels` puts them in the order of what they carry.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quantlib.checkpoint.writer import source_files
from quantlib.errors import SearchError, UsageError
from quantlib.models.headers import TORCH_DTYPES
from quantlib.pipeline.trained import Found, Trainable, write_trained
from quantlib.search.plan import Plan
from quantlib.search.trained.costs import Costs
from quantlib.search.trained.layers import (
    Choice,
    Layers,
    RoundedLinear,
    Space,
    WidthDecision,
    kept_channels,
)
from quantlib.search.trained.outcome import rounded, schemes_of
from quantlib.transforms.binding import wire

SETTING = "intermediate_size"
"""The config field that has the number of an MLP's hidden channels."""


@dataclass(frozen=True)
class Chosen:
    """What a search over choices ended with.

    method: its name. choice: by which `costs` are counted. target: what they were allowed to be.
    """

    method: str
    costs: Costs
    choice: Choice
    target: float | None = None


def hidden_width(trainable: Trainable, shares: Sequence[float]) -> WidthDecision:
    """The decision over the hidden channels of all MLPs of a language model.

    Raises UsageError for a model whose config has no one field for their number, or whose gate and
    up projections are one linear.
    """
    wiring = wire(trainable.model)
    whole = getattr(trainable.model.config, SETTING, None)
    sites = [site for site in wiring.hiddens if site.writers and not site.inner]
    if not sites or len(sites) != len(wiring.blocks) or any(s.width != whole for s in sites):
        raise UsageError(
            f"a {wiring.model_type} has no {SETTING} that all of its MLPs share: search its "
            "formats alone, without widths"
        )
    if any(site.stacked > 1 for site in sites):
        raise UsageError("gate and up projections are one linear: leave out the widths")
    writers = tuple(matrix.weight for site in sites for matrix in site.writers)
    readers = tuple(site.down.weight for site in sites)
    return WidthDecision("hidden", writers, readers, tuple(shares), SETTING)


@torch.no_grad()
def order_channels(layers: Layers, width: WidthDecision, run: Callable[[], object]) -> None:
    """Sort the hidden channels of every block by what they carry, the most first: their energy in
    the reader's inputs while `run()` runs the model, times that of its columns. The model computes
    what it did: writers' rows and readers' columns move together."""
    energies: dict[str, Tensor] = {}

    def observe(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            energy = inputs[0].detach().float().square().flatten(0, -2).sum(0)
            energies[name] = energies[name] + energy if name in energies else energy

        return hook

    with contextlib.ExitStack() as hooks:
        for reader in width.readers:
            handle = layers.of[reader].register_forward_pre_hook(observe(reader))
            hooks.callback(handle.remove)
        run()
    writers = len(width.writers) // len(width.readers)
    for index, reader in enumerate(width.readers):
        layer = layers.of[reader]
        worth = energies[reader] * layer.weight.float().square().sum(0)
        order = torch.argsort(worth, descending=True, stable=True)
        layer.weight.copy_(layer.weight.index_select(1, order))
        for name in width.writers[index * writers : (index + 1) * writers]:
            writer = layers.of[name]
            writer.weight.copy_(writer.weight.index_select(0, order))
            if writer.bias is not None:
                writer.bias.copy_(writer.bias.index_select(0, order))


@torch.no_grad()
def narrowed(
    trainable: Trainable, layers: Layers, choice: Choice, folder: Path
) -> tuple[Trainable, Layers]:
    """The trained model without the channels that a choice leaves out, opened from `folder`, where
    it is written as a source; its layers round as the choice says.

    Raises SearchError for a width that no config can say, and where columns have an order.
    """
    space, model_map = layers.space, trainable.model_map
    shares = space.shares(choice)
    changed: dict[str, int] = {}
    for width, index in zip(space.widths, choice[len(space.numbers) :], strict=True):
        if not width.setting:
            raise SearchError(_no_checkpoint(width.name, width.options[index]))
        channels = int(layers.of[width.readers[0]].weight.shape[1])
        changed[width.setting] = kept_channels(channels, width.options[index])
    for name in shares:
        layer = layers.of[name]
        if isinstance(layer, RoundedLinear) and layer.order is not None:
            raise SearchError(f"the columns of {name} have an order, and cannot be left out too")
    state: dict[str, Tensor] = trainable.model.state_dict()
    tensors = {}
    for weight in model_map.weights:
        tensors[weight.name] = _cut(state[weight.name], *shares.get(weight.name, (1.0, 1.0)))
    for row in model_map.kept:
        owner = f"{row.name.removesuffix('.bias')}.weight"
        rows = shares.get(owner, (1.0, 1.0))[0] if row.name.endswith(".bias") else 1.0
        tensors[row.name] = _cut(state[row.name], rows, 1.0).to(TORCH_DTYPES[row.dtype])
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in source_files(trainable.source.path).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
    config = {**trainable.source.config, **changed}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    narrow = Trainable.open(folder)
    columns = {weight.name: weight.in_features for weight in narrow.model_map.weights}
    numbers = tuple(replace(d, columns=tuple(columns[m] for m in d.members)) for d in space.numbers)
    cut = Layers(narrow.model, Space(numbers))
    cut.choose(choice[: len(numbers)])
    return narrow, cut


def write_choice(
    out: str | Path,
    trainable: Trainable,
    layers: Layers,
    found: Chosen,
    rest: str = "bf16",
    identity: str | None = None,
    overwrite: bool = False,
) -> tuple[Path, Plan]:
    """Write the checkpoint of a search that ended with a choice; its folder and its plan. Channels
    that were left out are cut off. Arguments and errors are those of `write_trained`."""
    layers.choose(found.choice)
    numbers = found.choice[: len(layers.space.numbers)]
    is_whole = all(min(pair) == 1 for pair in layers.space.shares(found.choice).values())
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".narrow-", dir=Path(out).parent) as scratch:
        if not is_whole:
            trainable, layers = narrowed(trainable, layers, found.choice, Path(scratch, "model"))
        schemes = schemes_of(layers, found.choice if is_whole else numbers)
        packed = rounded(layers, schemes)
        ended = Found(found.method, schemes, packed, found.costs, found.choice, found.target)
        return write_trained(out, trainable, layers, ended, rest, identity, overwrite)


def _cut(tensor: Tensor, rows: float, columns: float) -> Tensor:
    """The first shares of a tensor's rows and columns, in memory of its own."""
    tensor = tensor[: kept_channels(len(tensor), rows)] if tensor.ndim and rows < 1 else tensor
    if columns < 1:
        tensor = tensor[:, : kept_channels(tensor.shape[1], columns)]
    return tensor.clone(memory_format=torch.contiguous_format)


def _no_checkpoint(name: str, share: float) -> str:
    return (
        f"{name} was trained at {share:.0%} of its width, and its config.json has no field for that"
        ": such a model has no checkpoint"
    )
