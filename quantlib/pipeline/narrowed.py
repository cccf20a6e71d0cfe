"""A model at the widths that a search chose, as a source of its own.

Widths are what FLIQS searches beside formats: of a language model the hidden channels of its MLPs,
the same share in every block, because its config has one width for all (`hidden_width`); of a
ResNet the channels of each stage (`stage_widths`), which its config has a list of. Channels are
left out from the end; before training, `order_channels` puts those of MLPs in the order of what
they carry.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quantlib.checkpoint.writer import source_files
from quantlib.errors import SearchError, UsageError
from quantlib.models import skeleton
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
_IN_STAGE = re.compile(r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(.+)\.convolution\.weight")
_STEM, _HEAD = "resnet.embedder.embedder.convolution.weight", "classifier.1.weight"


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
    return WidthDecision("hidden", writers, readers, _whole(sites[0].width, shares), (SETTING,))


def stage_widths(trainable: Trainable, shares: Sequence[float]) -> tuple[WidthDecision, ...]:
    """A decision over the channels of every stage of a ResNet of basic layers: all that its
    convolutions write, which its shortcuts add up and the next stage (the classifier) reads. The
    stem's are those of the first stage where nothing converts them; where a shortcut without a
    stride does, both keep their channels: at equal ones it would be none.

    Raises UsageError for another model.
    """
    config = trainable.model.config
    if config.model_type != "resnet" or config.layer_type != "basic":
        raise UsageError(
            f"a {config.model_type} has no stages of basic layers: search its formats alone, "
            "without widths"
        )
    writers: dict[int, list[str]] = defaultdict(list)
    readers: dict[int, list[str]] = defaultdict(list)
    last, converts = len(config.depths) - 1, False
    writers[-1].append(_STEM)
    for weight in trainable.model_map.weights:
        if found := _IN_STAGE.fullmatch(weight.name):
            stage, place = int(found[1]), found[3]
            begins = found[2] == "0" and place in ("layer.0", "shortcut")
            converts = converts or (stage == 0 and place == "shortcut")
            writers[stage].append(weight.name)
            readers[stage - 1 if begins else stage].append(weight.name)
    readers[last].append(_HEAD)
    settings: dict[int, tuple[str, ...]] = {s: (f"hidden_sizes.{s}",) for s in range(last + 1)}
    settings[-1] = ("embedding_size",)
    if not converts:
        for by_stage in (writers, readers):
            by_stage[0] = by_stage.pop(-1) + by_stage[0]
        settings[0] = settings.pop(-1) + settings[0]
    fixed = converts and not config.downsample_in_first_stage
    channels = {-1: config.embedding_size, **dict(enumerate(config.hidden_sizes))}
    return tuple(
        WidthDecision(
            "stem" if stage < 0 else f"stage {stage}",
            tuple(writers[stage]),
            tuple(readers[stage]),
            _whole(channels[stage], shares),
            settings[stage],
        )
        for stage in sorted(settings)
        if not (fixed and stage <= 0)
    )


def _whole(channels: int, shares: Sequence[float]) -> tuple[float, ...]:
    """The shares that whole channels make of those asked for, each once, ascending; what is no
    share stays, for `WidthDecision` to refuse."""
    exact = {kept_channels(channels, s) / channels if 0 < s <= 1 else s for s in shares}
    return tuple(sorted(exact))


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

    What the smaller config builds says how much of every tensor is left: its first rows and
    columns. Raises SearchError for a width that no config can say, for one that the config means
    other weights by, and where columns have an order.
    """
    space, model_map = layers.space, trainable.model_map
    shares = space.shares(choice)
    for name in shares:
        layer = layers.of[name]
        if isinstance(layer, RoundedLinear) and layer.order is not None:
            raise SearchError(f"the columns of {name} have an order, and cannot be left out too")
    config = _narrow_config(trainable, layers, choice)
    state: dict[str, Tensor] = trainable.model.state_dict()
    wanted = {
        name: value.shape for name, value in skeleton.from_config(config).state_dict().items()
    }
    if state.keys() != wanted.keys():
        raise SearchError(
            f"{min(state.keys() ^ wanted.keys())} is in only one of the trained model and the one "
            "of its chosen widths: such a model has no checkpoint; search other widths"
        )
    tensors = {}
    for weight in model_map.weights:
        tensors[weight.name] = _cut(state[weight.name], wanted[weight.name])
        outputs, inputs = shares.get(weight.name, (1.0, 1.0))
        whole = state[weight.name].shape
        if tuple(wanted[weight.name][:2]) != (
            kept_channels(whole[0], outputs),
            kept_channels(whole[1], inputs),
        ):
            raise SearchError(
                f"{weight.name} of {list(whole)} was trained with {outputs:.0%} of its outputs and "
                f"{inputs:.0%} of its inputs, and the config of the chosen widths makes it "
                f"{list(wanted[weight.name])}: such a model has no checkpoint"
            )
    for row in model_map.kept:
        tensors[row.name] = _cut(state[row.name], wanted[row.name]).to(TORCH_DTYPES[row.dtype])
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in source_files(trainable.source.path).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
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


def _narrow_config(trainable: Trainable, layers: Layers, choice: Choice) -> dict[str, Any]:
    """The source's config at the widths of a choice. Raises SearchError where it has no field."""
    space = layers.space
    changed: dict[str, int] = {}
    for width, index in zip(space.widths, choice[len(space.numbers) :], strict=True):
        share = width.options[index]
        if not width.settings:
            raise SearchError(
                f"{width.name} was trained at {share:.0%} of its width, and its config.json has no "
                "field for that: such a model has no checkpoint"
            )
        channels = kept_channels(int(layers.of[width.readers[0]].weight.shape[1]), share)
        changed |= dict.fromkeys(width.settings, channels)
    return _with_settings(trainable.source.config, trainable.model.config, changed)


def _with_settings(
    config: Mapping[str, Any], parsed: object, changed: Mapping[str, int]
) -> dict[str, Any]:
    """A config with other values of "field" or, of a list, "field.index"; a list that it does not
    have is that of the `parsed` one."""
    found = copy.deepcopy(dict(config))
    for setting, value in changed.items():
        name, _, index = setting.partition(".")
        if index:
            found[name] = list(found.get(name) or getattr(parsed, name))
            found[name][int(index)] = value
        else:
            found[name] = value
    return found


def _cut(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first rows, columns and so on of a tensor, in memory of its own."""
    part = tensor[tuple(slice(size) for size in shape)]
    return part.clone(memory_format=torch.contiguous_format)
