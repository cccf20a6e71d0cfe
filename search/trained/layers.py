"""Layers that round as they are told, and the decisions that are taken over them.

`Layers` puts them in the place of a model's linears and convolutions. Parameters keep their objects
and their names, so that optimizers, state dicts and writers see the model that it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.errors import SearchError
from quantlib.models.rows import Weight
from quantlib.models.window import Convolution
from quantlib.search.trained.numbers import Candidate
from quantlib.search.trained.quantizers import (
    check_convolution,
    round_inputs,
    round_samples,
    round_weight,
)

TRAINED_KINDS = ("linear", "conv")
"""Weights that decisions are about; embeddings, heads and experts are stored as they were given."""
SHARED = ("group", "weight", "block", "model")
"""What gets one decision: a linear group (what reads one input), each weight for itself, all of a
repeated block, or the whole model."""

Choice = tuple[int, ...]
"""For every decision of a space, in order, the index of its option."""


@dataclass(frozen=True)
class Decision:
    """Layers that are rounded alike, and the candidates they choose from.

    columns: K of each member.
    """

    name: str
    members: tuple[str, ...]
    columns: tuple[int, ...]
    options: tuple[Candidate, ...]


@dataclass(frozen=True)
class WidthDecision:
    """Channels that can be left out, the last ones: what FLIQS searches beside formats.

    writers: weights whose outputs they are. readers: weights whose inputs they are; a weight may be
    both. Between them every channel is computed by itself (activations, batch norms, sums), and
    nobody else uses them. options: shares of the channels that stay, each in (0, 1].
    settings: the config fields that have their number ("intermediate_size", or "hidden_sizes.1" of
              a list), all of them: what a checkpoint needs. None: the width can be trained but not
              stored.
    """

    name: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    options: tuple[float, ...]
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.options or not all(0 < share <= 1 for share in self.options):
            raise SearchError(
                f"{self.name}: widths are shares of the channels above 0 and at most 1, not "
                f"{', '.join(map(str, self.options)) or 'none'}"
            )


@dataclass(frozen=True)
class Space:
    """All that a search decides: numbers first, then widths."""

    numbers: tuple[Decision, ...]
    widths: tuple[WidthDecision, ...] = ()

    def __post_init__(self) -> None:
        members = [member for decision in self.numbers for member in decision.members]
        if not members:
            raise SearchError("the model has no linear and no convolution to search formats for")
        if len(set(members)) != len(members):
            raise SearchError("a weight belongs to two decisions")
        strangers = {n for w in self.widths for n in (*w.writers, *w.readers)} - set(members)
        if strangers:
            raise SearchError(f"{min(strangers)} has a width and no format to choose: name it too")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Options of every decision, in the order of a choice."""
        return (*(len(d.options) for d in self.numbers), *(len(w.options) for w in self.widths))

    @property
    def names(self) -> tuple[str, ...]:
        return (*(d.name for d in self.numbers), *(w.name for w in self.widths))

    def candidates(self, choice: Choice) -> dict[str, Candidate]:
        """weight -> what it is rounded to."""
        picked = zip(self.numbers, choice[: len(self.numbers)], strict=True)
        return {m: decision.options[i] for decision, i in picked for m in decision.members}

    def shares(self, choice: Choice) -> dict[str, tuple[float, float]]:
        """weight -> the shares of its outputs and of its inputs that stay; of those that have no
        width to choose, nothing."""
        found: dict[str, tuple[float, float]] = {}
        for width, index in zip(self.widths, choice[len(self.numbers) :], strict=True):
            share = width.options[index]
            for name in width.writers:
                found[name] = (share, found.get(name, (1.0, 1.0))[1])
            for name in width.readers:
                found[name] = (found.get(name, (1.0, 1.0))[0], share)
        return found

    def uniform(self, candidate: str, otherwise: str | None = None) -> Choice:
        """Everything in one candidate, at full width (what comes nearest to it).

        otherwise: the candidate of decisions that do not have it, such as convolutions.
        Raises SearchError where a decision has neither.
        """
        wanted = [Candidate.parse(name).name for name in (candidate, otherwise) if name]
        picks = []
        for decision in self.numbers:
            names = [option.name for option in decision.options]
            found = next((name for name in wanted if name in names), None)
            if found is None:
                told = " and no ".join(wanted)
                raise SearchError(f"{decision.name} has no {told}: {', '.join(names)}")
            picks.append(names.index(found))
        widths = [w.options.index(max(w.options)) for w in self.widths]
        return (*picks, *widths)


def decisions(
    weights: Sequence[Weight], options: Sequence[Candidate], shared: str = "group"
) -> tuple[Decision, ...]:
    """The decisions over a model's linears and convolutions, in its order.

    shared: one of SHARED. Convolutions take part with the options that suit them.
    Raises SearchError for another word, and where a decision is left with no option.
    """
    if shared not in SHARED:
        raise SearchError(f"{shared!r} cannot share a decision: use one of {', '.join(SHARED)}")
    members: dict[str, list[Weight]] = {}
    for weight in weights:
        if weight.kind in TRAINED_KINDS:
            members.setdefault(_decided_with(weight, shared), []).append(weight)
    found = []
    for name, rows in members.items():
        convolves = any(row.kind == "conv" for row in rows)
        fitting = tuple(o for o in options if not convolves or _suits_convolutions(o))
        if not fitting:
            raise SearchError(
                f"{name} is a convolution, and none of {', '.join(o.name for o in options)} can "
                "round its input: add a format with one scale, such as w4a4"
            )
        named, columns = zip(*((row.name, row.in_features) for row in rows), strict=True)
        found.append(Decision(name, named, columns, fitting))
    return tuple(found)


def _decided_with(weight: Weight, shared: str) -> str:
    if shared == "model":
        return "model"
    if shared == "weight":
        return weight.name
    if shared == "block" and weight.block:
        return weight.block
    return weight.group or weight.name


def _suits_convolutions(candidate: Candidate) -> bool:
    try:
        check_convolution(candidate)
    except SearchError:
        return False
    return True


class RoundedLinear(nn.Linear):
    """A linear that rounds its weight and inputs as `candidate` says; None: not at all.

    inputs: how many input channels are used, the first ones; None: all.
    order:  int64 [K] or None: column j of the rounded weight is input `order[j]`.
    gates:  a module that makes the weight, which is then not rounded (`csq`); None: there is none.
    """

    def __init__(self, old: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = old.in_features, old.out_features
        self.weight, self.bias = old.weight, old.bias
        self.candidate: Candidate | None = None
        self.inputs: int | None = None
        self.order: Tensor | None = None
        self.gates: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.gates is not None:
            return F.linear(_rounded(x, self.candidate, round_inputs), self.gates(), self.bias)
        weight, used = self.weight, self.inputs
        if used is not None:
            x, weight = x[..., :used], weight[:, :used]
        if self.candidate is None:
            return F.linear(x, weight, self.bias)
        if self.order is not None:
            x, weight = x.index_select(-1, self.order), weight.index_select(1, self.order)
        rounded = round_weight(weight, self.candidate)
        return F.linear(round_inputs(x, self.candidate), rounded, self.bias)


class RoundedConvolution(nn.Module):
    """A convolution that does so, in the place of torch's.

    order is never set: columns of a convolution stay in place.
    """

    def __init__(self, old: Convolution) -> None:
        super().__init__()
        self.weight, self.bias = old.weight, old.bias
        self._convolve = old._conv_forward
        self.in_channels, self.out_channels = old.in_channels, old.out_channels
        self.kernel_size, self.stride = old.kernel_size, old.stride
        self.candidate: Candidate | None = None
        self.inputs: int | None = None
        self.gates: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.gates is not None:
            weight = self.gates().view(self.weight.shape)
            return self._convolve(_rounded(x, self.candidate, round_samples), weight, self.bias)
        weight, used = self.weight, self.inputs
        if used is not None:
            x, weight = x[:, :used], weight[:, :used]
        if self.candidate is None:
            return self._convolve(x, weight, self.bias)
        rounded = round_weight(weight.flatten(1), self.candidate).view(weight.shape)
        return self._convolve(round_samples(x, self.candidate), rounded, self.bias)


def _rounded(
    x: Tensor, candidate: Candidate | None, rounding: Callable[[Tensor, Candidate], Tensor]
) -> Tensor:
    return x if candidate is None else rounding(x, candidate)


Rounded = RoundedLinear | RoundedConvolution


class Layers:
    """The layers of a model that a space is about, by the names of their weights."""

    def __init__(self, model: nn.Module, space: Space) -> None:
        """Puts rounding layers into `model`. Raises SearchError for a module that is neither a
        linear nor a plain convolution."""
        self.space = space
        self.of: dict[str, Rounded] = {}
        for decision in space.numbers:
            for name in decision.members:
                self.of[name] = _swapped(model, name)

    def choose(self, choice: Choice | None) -> None:
        """Round as a choice says; None: full precision, at full width."""
        if choice is None:
            self._round({}, {})
        else:
            self._round(self.space.candidates(choice), self.space.shares(choice))

    def choose_alone(self, position: int, option: int) -> None:
        """Round the layers of one decision as its option says and leave all others as they are;
        position: the decision's place in a choice."""
        space, count = self.space, len(self.space.numbers)
        if position < count:
            one = space.numbers[position]
            self._round(dict.fromkeys(one.members, one.options[option]), {})
        else:
            alone = Space(space.numbers, (space.widths[position - count],))
            self._round({}, alone.shares((*(0 for _ in space.numbers), option)))

    def _round(
        self, candidates: Mapping[str, Candidate], shares: Mapping[str, tuple[float, float]]
    ) -> None:
        for name, layer in self.of.items():
            layer.candidate = candidates.get(name)
            _, share = shares.get(name, (1.0, 1.0))
            layer.inputs = None if share == 1 else kept_channels(_channels(layer), share)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """weight -> [N, K] of its matrix."""
        return {n: (len(layer.weight), layer.weight[0].numel()) for n, layer in self.of.items()}

    @torch.no_grad()
    def order_columns(self, run: Callable[[], object]) -> None:
        """Sort the columns of linears by what they matter, the most important last, where wider
        columns are: a column's energy in its inputs while `run()` runs the model, times that of its
        weights. Orders then stay."""
        energies: dict[str, Tensor] = {}

        def observe(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].detach().float()
                energy = x.square().flatten(0, -2).sum(0)
                energies[name] = energies[name] + energy if name in energies else energy

            return hook

        linears = {n: layer for n, layer in self.of.items() if isinstance(layer, RoundedLinear)}
        hooks: dict[Rounded, Callable[..., None]] = {
            layer: observe(name) for name, layer in linears.items()
        }
        with _hooks(hooks):
            run()
        for name, layer in linears.items():
            if name not in energies:
                raise SearchError(f"{name} was not run: its columns cannot be put in an order")
            worth = energies[name] * layer.weight.float().square().sum(0)
            layer.order = torch.argsort(worth, stable=True)

    @torch.no_grad()
    def count_products(self, run: Callable[[], object]) -> dict[str, float]:
        """weight -> multiplications while `run()` runs the model, which is to be one sample."""
        counts = dict.fromkeys(self.of, 0.0)

        def observe(name: str) -> Callable[..., None]:
            def hook(layer: nn.Module, _: object, output: Tensor) -> None:
                weight = layer.weight
                assert isinstance(weight, Tensor)
                places = output.numel() / len(weight)
                counts[name] += places * weight.numel()

            return hook

        hooks: dict[Rounded, Callable[..., None]] = {
            layer: observe(name) for name, layer in self.of.items()
        }
        with _hooks(hooks, after=True):
            run()
        idle = [name for name, count in counts.items() if not count]
        if idle:
            raise SearchError(
                f"{idle[0]} multiplies nothing in the task that is trained: leave its component "
                "out, or train on a task that needs it"
            )
        return counts


@contextmanager
def _hooks(hooks: Mapping[Rounded, Callable[..., None]], after: bool = False) -> Iterator[None]:
    """Forward hooks (pre-hooks, unless `after`) while the context lasts."""
    handles = [
        layer.register_forward_hook(hook) if after else layer.register_forward_pre_hook(hook)
        for layer, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kept_channels(channels: int, share: float) -> int:
    """How many channels a share is: rounded to the nearest, and at least one."""
    return max(1, min(channels, round(channels * share)))


def _channels(layer: Rounded) -> int:
    return int(layer.weight.shape[1])


def _swapped(model: nn.Module, name: str) -> Rounded:
    """The rounding layer of the weight `name`, put in the place of its module."""
    module_name, _, leaf = name.rpartition(".")
    old = model.get_submodule(module_name)
    if isinstance(old, RoundedLinear | RoundedConvolution):
        return old
    if leaf == "weight" and isinstance(old, nn.Linear):
        new: Rounded = RoundedLinear(old)
    elif leaf == "weight" and isinstance(old, Convolution) and old.groups == 1:
        new = RoundedConvolution(old)
    else:
        raise SearchError(
            f"{name} belongs to a {type(old).__name__}, and linears and plain convolutions are "
            "trained: keep its component as it is"
        )
    model.set_submodule(module_name, new.train(old.training))
    return new
