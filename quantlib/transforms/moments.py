"""Second moments of what linears and attentions read: all that bases are chosen from.

One forward pass over the calibration windows, block by block (`stream_moments`), or over a module
in memory (`moments_of`), collects

    for the input x of every linear group    E[x x^T], E[x], max |x| per channel, and quantiles of
                                             each token's largest |x|
    for every KV head of an attention        E[k k^T] and E[q q^T] after RoPE, E[v v^T]

Moments are not centred, as in ResQ (a scale has to span the mean too). `Second.weighted` has every
token weighted by the squared gradients that calibration measured at the outputs of the group that
reads it (`MatrixStatistics.token_weight`): with it, and with the Fisher information of the outputs,
errors are in nats per token.

Everything is in the coordinates of the model that is run. Bases are wanted for inputs behind norms
whose gains have been folded into their readers, so give the *folded* model.

A product over the tokens of one window is a float32 matrix product, and windows are added in
float64: each entry is as exact as float32 allows, and the sum of a thousand windows is no worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlib.calibration.observe import observed
from quantlib.calibration.stream import BlockStream
from quantlib.errors import DataError
from quantlib.models.memory import empty
from quantlib.models.modelmap import ModelMap
from quantlib.transforms.attention import attach_attention, watched_attention
from quantlib.transforms.wiring import Attention, Wiring

PEAK_SHARES = (0.5, 0.9, 0.99, 0.999, 1.0)
"""Shares of tokens whose largest |x| is no larger than `InputMoments.peaks` says."""

TokenWeights = Callable[[str], Sequence[Tensor]]
"""Name of a linear group -> float32 [tokens] of each of its matrices (one, if it has no experts),
in the order in which tokens are seen."""


@dataclass(frozen=True)
class Second:
    """A second moment over tokens: plain, and token-weighted where there were weights.

    float64 [..., K, K], or [K] where only the diagonal was wanted.
    """

    plain: Tensor
    weighted: Tensor | None = None

    def of(self, weighted: float) -> Tensor:
        """The plain one, or, for a share of 0 < `weighted` <= 1, so much of the weighted one and
        the rest of the plain one. Raises DataError when no token was weighted."""
        if not weighted:
            return self.plain
        if self.weighted is None:
            raise DataError(
                "these moments have no token weights: calibrate with gradients, or choose bases by "
                "plain moments"
            )
        return self.plain.lerp(self.weighted, float(weighted))


@dataclass(frozen=True)
class InputMoments:
    """The input of one linear group.

    readers: names of the weights that read it.
    second:  float64 [K, K]; [K], its diagonal, for down projections.
    mean:    float64 [K].
    amax:    float32 [K], the largest |x| of each channel.
    peaks:   float32 [len(PEAK_SHARES)], quantiles over tokens of the token's largest |x|.
    tokens:  rows seen (an expert's are counted each time they are routed).
    """

    readers: tuple[str, ...]
    second: Second
    mean: Tensor
    amax: Tensor
    peaks: Tensor
    tokens: int


@dataclass(frozen=True)
class HeadMoments:
    """Queries (of all heads that share a KV head), keys and values of one attention, each
    [H_kv, d, d]. Queries and keys are as they are multiplied: behind the rotary embedding."""

    query: Second
    key: Second
    value: Second


@dataclass(frozen=True)
class Moments:
    """inputs: by the names of all weights that read them. heads: by `wiring.Attention.name`."""

    inputs: Mapping[str, InputMoments]
    heads: Mapping[str, HeadMoments]


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of several blocks as one."""
    inputs: dict[str, InputMoments] = {}
    heads: dict[str, HeadMoments] = {}
    for part in parts:
        inputs.update(part.inputs)
        heads.update(part.heads)
    return Moments(inputs, heads)


@torch.no_grad()
def stream_moments(
    stream: BlockStream,
    model_map: ModelMap,
    wiring: Wiring,
    windows: Tensor,
    token_weights: TokenWeights | None = None,
    skip: int = 0,
    tick: Callable[[str], None] = lambda _: None,
) -> Iterator[Moments]:
    """One block's moments after the other, in one pass with one block in memory.

    windows:       int64 [W, T]; those of calibration, in its order, where there are token weights.
    token_weights: of the groups, see `TokenWeights`.
    skip:          so many first positions of a window do not count in the moments of heads: those
                   whose keys and values are kept as they are.
    Raises DataError when there are not as many token weights as tokens.
    """
    attach_attention(stream.model, {})  # masks are of the kind that watched attention wants
    first = stream.embed(windows[0])
    states = empty((len(windows), *first.shape[1:]), first.dtype)
    for window, ids in enumerate(windows):
        states[window] = stream.embed(ids)[0]
    diagonal = {hidden.down.weight for hidden in wiring.hiddens}
    for index, name in enumerate(stream.block_names):
        observer = _Observer(model_map, wiring, name, diagonal, token_weights, skip)
        with (
            stream.block(index) as block,
            observed(stream.model, model_map, name, observer),
            watched_attention(stream.model, observer.attentions),
        ):
            for window, hidden in enumerate(states):
                states[window] = stream.run(index, block, hidden[None])[0]
        yield observer.moments()
        tick(f"moments of {name}")


@torch.no_grad()
def moments_of(
    model: PreTrainedModel,
    wiring: Wiring,
    batches: Iterable[Mapping[str, Tensor]],
    skip: int = 0,
) -> Moments:
    """Plain moments of a model in memory.

    batches: keyword arguments of the model. Every position counts, so there must be no padding.
    """
    hiddens = [(hidden.down.weight,) for hidden in wiring.hiddens if not hidden.inner]
    groups = [
        *(tuple(m.weight for m in norm.readers) for s in wiring.streams for norm in s.norms),
        *((attention.output.weight,) for attention in wiring.attentions),
        *hiddens,
    ]
    inputs = {readers: _Input(readers, readers in hiddens) for readers in groups if readers}
    heads = {a.name: _Heads(skip) for a in wiring.attentions}
    observers = {a.module: heads[a.name].seen for a in wiring.attentions}
    handles = []
    try:
        for readers, sums in inputs.items():
            module = model.get_submodule(readers[0].rpartition(".")[0])
            handles.append(module.register_forward_hook(partial(_show, sums)))
        with watched_attention(model, observers):
            for batch in batches:
                model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return _finished(inputs.values(), heads)


def _show(sums: _Input, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
    sums.add(inputs[0])


class _Observer:
    """Shown every matrix of a block by `observed`, and every attention: `attentions` by module."""

    def __init__(
        self,
        model_map: ModelMap,
        wiring: Wiring,
        block: str,
        diagonal: set[str],
        token_weights: TokenWeights | None,
        skip: int,
    ) -> None:
        groups = model_map.groups_in(block)
        self.inputs = {
            group.name: _Input(group.members, group.members[0] in diagonal) for group in groups
        }
        self.heads = {a.name: _Heads(skip) for a in wiring.attentions if a.block == block}
        self.attentions = {
            a.module: partial(self._attended, a) for a in wiring.attentions if a.block == block
        }
        self.weights = {}
        if token_weights is not None:
            self.weights = {
                group.name: [_Cursor(group.name, w) for w in token_weights(group.name)]
                for group in groups
            }
        self.group_of = {name: group.name for group in groups for name in group.members}
        self.latest: dict[str, Tensor] = {}

    def seen(self, group: str, member: str, x: Tensor, y: Tensor, expert: int = 0) -> None:
        """Note the input of a group once: when its first member runs."""
        if member != self.inputs[group].readers[0]:
            return
        weight = None
        if self.weights:
            weight = self.latest[group] = self.weights[group][expert].take(x.numel() // x.shape[-1])
        self.inputs[group].add(x, weight)

    def _attended(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Keys and values of a window have the weights of the input they were made from."""
        weight = self.latest.get(self.group_of.get(attention.values.weight, ""))
        self.heads[attention.name].seen(query, key, value, weight)

    def moments(self) -> Moments:
        for cursors in self.weights.values():
            for cursor in cursors:
                cursor.finish()
        return _finished(self.inputs.values(), self.heads)


class _Cursor:
    """The token weights of one matrix, taken window by window."""

    def __init__(self, group: str, weights: Tensor) -> None:
        self.group, self.weights, self.at = group, weights, 0

    def take(self, count: int) -> Tensor:
        taken = self.weights[self.at : self.at + count]
        self.at += count
        self._check(len(taken) == count)
        return taken

    def finish(self) -> None:
        """All must have been taken."""
        self._check(self.at == len(self.weights))

    def _check(self, right: bool) -> None:
        if not right:
            raise DataError(
                f"{self.group} has {len(self.weights)} token weights, and the moments are of other "
                f"tokens ({self.at} so far): they must be taken on the windows of calibration"
            )


class _Sums:
    """Sum over tokens of x x^T [..., K, K] (or its diagonal), plain and weighted."""

    def __init__(self, diagonal: bool = False) -> None:
        self.diagonal = diagonal
        self.plain = self.weighted = torch.zeros(())
        self.rows, self.weight = 0, 0.0

    def add(self, x: Tensor, weight: Tensor | None) -> None:
        """x float32 [..., T, K], weight [T]."""
        self.plain = self._product(x, x).double() + self.plain
        self.rows += x.shape[-2]
        if weight is not None:
            self.weighted = self._product(x, x * weight[:, None]).double() + self.weighted
            self.weight += float(weight.double().sum())

    def _product(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(-2) if self.diagonal else x.mT @ y

    def finish(self) -> Second:
        weighted = self.weighted / self.weight if self.weight > 0 else None
        return Second(self.plain / max(self.rows, 1), weighted)


class _Input:
    """The sums of one group's input."""

    def __init__(self, readers: tuple[str, ...], diagonal: bool) -> None:
        self.readers = readers
        self.sums = _Sums(diagonal)
        self.total = torch.zeros((), dtype=torch.float64)
        self.amax = torch.zeros(())
        self.peaks: list[Tensor] = []

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """x [..., K] of any tokens, weight [tokens]."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        self.sums.add(x, weight)
        self.total = self.total + x.sum(0, dtype=torch.float64)
        size = x.abs()
        self.amax = torch.maximum(self.amax, size.amax(0))
        self.peaks.append(size.amax(1))

    def finish(self) -> InputMoments:
        tokens = self.sums.rows
        quantiles = torch.tensor(PEAK_SHARES)
        peaks = torch.cat(self.peaks) if tokens else torch.zeros(1)
        return InputMoments(
            self.readers,
            self.sums.finish(),
            self.total / max(tokens, 1),
            self.amax,
            torch.quantile(peaks, quantiles),
            tokens,
        )


class _Heads:
    """The sums of one attention."""

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.query, self.key, self.value = _Sums(), _Sums(), _Sums()

    def seen(self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None = None) -> None:
        """query [B, H, T, d], key and value [B, H_kv, L, d]; weight [B * L] of the positions."""
        batch, kv_heads, length, _ = key.shape
        if weight is not None:
            weight = weight.reshape(batch, length)[:, self.skip :].reshape(-1)
        for sums, x in ((self.key, key), (self.value, value)):
            rows = x[:, :, self.skip :].float().transpose(0, 1).flatten(1, 2)
            sums.add(rows, weight)
        grouped = query.unflatten(1, (kv_heads, -1))[:, :, :, self.skip :].float()
        if weight is not None:  # as many queries as keys: an attention of the decoder to itself
            weight = weight.repeat(grouped.shape[2])
        self.query.add(grouped.permute(1, 2, 0, 3, 4).flatten(1, 3), weight)

    def finish(self) -> HeadMoments:
        return HeadMoments(self.query.finish(), self.key.finish(), self.value.finish())


def _finished(inputs: Iterable[_Input], heads: Mapping[str, _Heads]) -> Moments:
    """A group that saw no token (an expert that is never chosen) is left out."""
    finished = [sums.finish() for sums in inputs if sums.sums.rows]
    by_name = {reader: moments for moments in finished for reader in moments.readers}
    return Moments(by_name, {name: sums.finish() for name, sums in heads.items()})
