"""From moments to bases: ResQ's, and those that weigh what an error costs.

`resq_bases` takes principal components of activations: of the mean over all attention and MLP
inputs for the residual stream, of values per KV head, of keys averaged over a layer's KV heads.
`weighted_bases` minimises predicted errors instead (`fixed_point.py`), with the energy of weights,
or, given the Fisher information of outputs, of gradients. Both give directions ordered by
importance; `mixing.py` makes a `Rotation` of them; how many are wide is a scheme's affair.

All moments and weights are of the folded model: its norms have no gain.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from quantlib.errors import TransformError
from quantlib.formats.scheme import HighColumns
from quantlib.transforms.energies import Fisher, Read, input_energy, value_energy
from quantlib.transforms.fixed_point import Term, channel_order, fixed_point, principal
from quantlib.transforms.moments import HeadMoments, InputMoments, Moments
from quantlib.transforms.wiring import Attention, Matrix, Stream, Wiring

HIGH_SHARE = Fraction(1, 8)
"""ResQ's share of wide columns."""


def high_columns(width: int, share: Fraction) -> int:
    """How many of `width` columns are wide: as schemes count them, 0 and all included."""
    if not 0 <= share <= 1:
        raise TransformError(f"{share} of the columns cannot be wide: use a share from 0 to 1")
    return int(width * share) if share in (0, 1) else HighColumns("8", share).count(width)


@dataclass(frozen=True)
class Bases:
    """Directions by importance, float64, orthonormal columns, not mixed yet.

    residual: stream -> [D, D], the most important LAST, as schemes order a linear's columns.
    value:    attention -> [H_kv, d, d], the most important FIRST, as KV caches order a head's.
    key:      attention -> [d, d] or [H_kv, d, d], likewise.
    """

    residual: Mapping[str, Tensor] = field(default_factory=dict)
    value: Mapping[str, Tensor] = field(default_factory=dict)
    key: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """What bases are computed from.

    moments, wiring: of one model, folded; read: its weights.
    fisher:          Fisher information of outputs; None: the energy of weights counts by itself.
    weighted:        share of the token-weighted moments, which must be there if it is not 0; the
                     rest are plain. A few tokens carry most of the weight, so the smaller the
                     calibration data, the less of it is known about other text.
    rounded:         names of the weights that will be rounded; others (routers) do not count. None:
                     all that read a stream.
    """

    moments: Moments
    wiring: Wiring
    read: Read
    fisher: Fisher | None = None
    weighted: float = 0.0
    rounded: Container[str] | None = None

    def groups(self, stream: Stream) -> Iterator[tuple[InputMoments, tuple[str, ...]]]:
        """Inputs of the blocks' linears that read a stream, and the weights of each."""
        for norm in stream.norms:
            names = tuple(m.weight for m in norm.readers if self._counts(m))
            found = [self.moments.inputs[name] for name in names if name in self.moments.inputs]
            if found:
                yield found[0], names

    def _counts(self, matrix: Matrix) -> bool:
        within = any(matrix.weight.startswith(f"{block}.") for block in self.wiring.blocks)
        return within and (self.rounded is None or matrix.weight in self.rounded)

    def energy(self, names: tuple[str, ...]) -> Tensor:
        """Of weights that read one input, [K, K]."""
        return input_energy(names, self.read, self.fisher)

    def heads(self, attention: Attention) -> HeadMoments:
        """Raises TransformError when the attention was never run."""
        if attention.name not in self.moments.heads:
            raise TransformError(
                f"there are no moments of {attention.module}: they are of another model."
            )
        return self.moments.heads[attention.name]

    def output(self, attention: Attention) -> Tensor:
        """The second moment of each KV head's columns of the output projection's input, summed
        over the query heads that share it: [H_kv, d, d]."""
        second = self.moments.inputs[attention.output.weight].second.of(self.weighted)
        return head_blocks(second, attention)


def resq_bases(moments: Moments, wiring: Wiring) -> Bases:
    """ResQ's (arXiv:2412.14363): plain principal components, one residual basis per stream.

    Raises TransformError when moments are missing or not finite.
    """
    residual = {}
    source = Source(moments, wiring, _no_weights)
    for stream in _rotatable(wiring):
        seconds = [inputs.second.plain for inputs, _ in source.groups(stream)]
        if not seconds:
            raise TransformError(f"there are no moments of the {stream.name}'s residual stream.")
        residual[stream.name] = principal(torch.stack(seconds).mean(0))
    value, key = {}, {}
    for attention in wiring.attentions:
        heads = source.heads(attention)
        value[attention.name] = principal(heads.value.plain).flip(-1)
        key[attention.name] = principal(heads.key.plain.mean(0)).flip(-1)
    return Bases(residual, value, key)


def weighted_bases(
    source: Source,
    share: Fraction = HIGH_SHARE,
    value_high: int | None = None,
    key_high: int | None = None,
    key_per_head: bool = True,
) -> Bases:
    """Bases whose low slices lose least, by prediction.

    share:        of columns that are wide in the residual stream.
    value_high, key_high: wide columns of a head; `share` of them by default.
    key_per_head: a basis for each KV head, instead of one for all heads of a layer.
    """
    residual = {}
    for stream in _rotatable(source.wiring):
        terms = [
            Term(inputs.second.of(source.weighted)[None], source.energy(names)[None])
            for inputs, names in source.groups(stream)
        ]
        if not terms:
            raise TransformError(f"there are no moments of the {stream.name}'s residual stream.")
        found, _ = fixed_point(terms, high_columns(stream.width, share))
        residual[stream.name] = found[0]
    value, key = {}, {}
    for attention in source.wiring.attentions:
        count = high_columns(attention.head_dim, share)
        found, _ = fixed_point(value_terms(source, attention), _or(value_high, count))
        value[attention.name] = found.flip(-1)
        terms = [key_term(source, attention, key_per_head)]
        found, _ = fixed_point(terms, _or(key_high, count))
        key[attention.name] = (found if key_per_head else found[0]).flip(-1)
    return Bases(residual, value, key)


def value_terms(source: Source, attention: Attention) -> list[Term]:
    """What is rounded in a value basis: the values themselves, in a cache with scales per head, and
    the output projection's input, which one scale spans."""
    energy = value_energy(attention, source.read, source.fisher)
    terms = [Term(source.heads(attention).value.of(source.weighted), energy)]
    if attention.output.weight in source.moments.inputs:
        terms.append(Term(source.output(attention), energy, shared=True))
    return terms


def key_term(source: Source, attention: Attention, per_head: bool) -> Term:
    """Keys, priced by the queries they are multiplied with (CoQuant)."""
    heads = source.heads(attention)
    key, query = heads.key.of(source.weighted), _query(heads, source.weighted)
    if per_head:
        return Term(key, query)
    return Term(key.mean(0, keepdim=True), query.mean(0, keepdim=True))


def head_blocks(second: Tensor, attention: Attention) -> Tensor:
    """Diagonal blocks of an output projection's [H * d, H * d], added over the query heads of each
    KV head: [H_kv, d, d]."""
    d, heads = attention.head_dim, attention.heads
    blocks = second.reshape(heads, d, heads, d).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return blocks.unflatten(0, (attention.kv_heads, -1)).sum(1)


def hidden_orders(source: Source, share: Fraction = HIGH_SHARE) -> dict[str, Tensor]:
    """For every block, its hidden channels in ascending importance, int64 [I]: down projections
    lose least when the last `share` of them is wide.

    No basis can be fused there, but an order can. The channels that stand out belong outside of the
    Hadamard matrix, which would add their energy to every other column.
    """
    found = {}
    for hidden in source.wiring.hiddens:
        name = hidden.down.weight
        if name in source.moments.inputs:
            second = source.moments.inputs[name].second.of(source.weighted)
            price = source.energy((name,)).diagonal()
            found[hidden.name] = channel_order(second, price, high_columns(hidden.width, share))
    return found


def _query(heads: HeadMoments, weighted: float) -> Tensor:
    """Queries of another sequence (cross-attention) have no token weights."""
    return heads.query.of(0.0 if heads.query.weighted is None else weighted)


def _rotatable(wiring: Wiring) -> Iterator[Stream]:
    return (stream for stream in wiring.streams if not stream.obstacle)


def _or(given: int | None, default: int) -> int:
    return default if given is None else given


def _no_weights(name: str) -> Tensor:
    raise TransformError(f"{name} is not needed for principal components")
