"""How many columns of each linear deserve 8 bits: predicted losses for the exact solver.

For a slice of d columns with one scale, of which the entries are mixed, the step of b bits is about
2 sqrt(2 ln d) times their root mean square over 2^b - 1 levels, and squared rounding errors are
step^2 / 12 on average. With the slice's activation energy a = tr(P^T A P) and its price
e = tr(P^T E P) (`fixed_point.py`),

    loss = 1/2 * 2/3 * ln(d) / d * (1 / (2^b_x - 1)^2 + 1 / (2^b_w - 1)^2) * a * e

summed over the low and the high slice (algorithms 6.1; a scale spans at most `group` columns). In
nats per token where moments are token-weighted and prices are Fisher information; otherwise in
arbitrary units that only compare. The weights' part is that of plain rounding: measured losses
replace a prediction where they are known.

A slice that is mixed in parts, because other readers of its basis have their boundaries inside it,
has entries of several sizes. Then 2 ln(d) a / d becomes the t^2 that one entry is expected to reach
(`_reach`), which is the same for equal parts and more for unequal ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from quantlib.errors import TransformError
from quantlib.transforms.bases import Bases, Source, high_columns, key_term
from quantlib.transforms.energies import value_energy
from quantlib.transforms.mixing import SHARES

_STEP = 2 / 3
"""(2 sqrt(2))^2 / 12: of the squared step."""
_BISECTIONS = 60
_TINY = 1e-300


@dataclass(frozen=True)
class Spectrum:
    """Energies along the directions of a basis, ascending importance: the columns as a linear (or,
    reversed, a KV cache) has them. float64 [heads, K]; heads > 1 have scales of their own.

    activation: of the input. price: of an error. readers: weights; empty for a KV cache.
    """

    name: str
    readers: tuple[str, ...]
    activation: Tensor
    price: Tensor

    @property
    def columns(self) -> int:
        return self.activation.shape[-1]


@dataclass(frozen=True)
class RankChoice:
    """So many wide columns. bits: mean bits of a number, codes alone. loss: predicted, or measured
    where `measured`."""

    share: Fraction
    high: int
    bits: float
    loss: float
    measured: bool = False


@dataclass(frozen=True)
class RankTable:
    """One item of the knapsack: a linear group, or the keys or values of an attention."""

    name: str
    readers: tuple[str, ...]
    choices: tuple[RankChoice, ...]


def spectra(
    source: Source, bases: Bases, orders: Mapping[str, Tensor] | None = None
) -> Iterator[Spectrum]:
    """Of every linear group of the blocks, in the order of the wiring.

    orders: block -> its hidden channels as `bases.hidden_orders` has them, where a Hadamard matrix
            before the down projection leaves the wide ones out; else all are mixed with all.
    """
    for stream in source.wiring.streams:
        vectors = bases.residual.get(stream.name)
        for inputs, names in source.groups(stream):
            second, price = inputs.second.of(source.weighted), source.energy(names)
            basis = torch.eye(len(price), dtype=torch.float64) if vectors is None else vectors
            yield Spectrum(names[0], names, _along(second, basis), _along(price, basis))
    for attention in source.wiring.attentions:
        name = attention.output.weight
        vectors = bases.value.get(attention.name)
        if vectors is not None and name in source.moments.inputs:
            prices = value_energy(attention, source.read, source.fisher)
            activation, price = (
                _by_rank(x, vectors, attention.heads) for x in (source.output(attention), prices)
            )
            yield Spectrum(name, (name,), activation, price)
    for hidden in source.wiring.hiddens:
        name = hidden.down.weight
        if name in source.moments.inputs and (source.rounded is None or name in source.rounded):
            second = source.moments.inputs[name].second.of(source.weighted)
            price = source.energy((name,)).diagonal()
            order = (orders or {}).get(hidden.name)
            channels = [_even(x) if order is None else x[order][None] for x in (second, price)]
            yield Spectrum(name, (name,), *channels)


def head_spectra(source: Source, bases: Bases) -> Iterator[Spectrum]:
    """Of the keys and the values of every attention, named `<attention>.key`, `.value`.

    An error of a key changes scores, so its loss is in another unit than a linear's: measure the
    losses of keys, or compare them among themselves.
    """
    for attention in source.wiring.attentions:
        if attention.name in bases.key:
            vectors = bases.key[attention.name]
            term = key_term(source, attention, per_head=vectors.ndim == 3)
            yield _head_spectrum(f"{attention.name}.key", vectors, term.activation, term.energy)
        if attention.name in bases.value:
            second = source.heads(attention).value.of(source.weighted)
            price = value_energy(attention, source.read, source.fisher)
            vectors = bases.value[attention.name]
            yield _head_spectrum(f"{attention.name}.value", vectors, second, price)


def predicted_loss(
    spectrum: Spectrum,
    high: int,
    low_bits: int = 4,
    high_bits: int = 8,
    group: int = 0,
    cuts: Sequence[int] | None = None,
) -> float:
    """With the last `high` columns at `high_bits`; see the module.

    group: columns that share a scale inside a slice; 0: all of it. A spectrum without readers (a KV
    cache) has no weights to round.
    cuts:  numbers of wide columns at which the basis is mixed apart, for all its readers; None: at
           `high`, for this one alone. Where `high` is no cut, mixed columns become wide, one as
           good as the other.
    """
    low = spectrum.columns - high
    if not 0 <= low <= spectrum.columns:
        raise TransformError(f"{high} of {spectrum.columns} columns cannot be wide")
    edges = [spectrum.columns - cut for cut in ([high] if cuts is None else cuts)]
    spectrum = _mixed(spectrum, edges)
    total = 0.0
    for start, end, bits in ((0, low, low_bits), (low, spectrum.columns, high_bits)):
        if start == end:
            continue
        parts = _parts([start, end, *(edge for edge in edges if start < edge < end)])
        a, e = (_reach(x, parts, group) * y.sum(1) for x, y in _factors(spectrum, start, end))
        noise = a.sum() + (e.sum() if spectrum.readers else 0.0)
        total += 0.5 * _STEP * float(noise) / (2**bits - 1) ** 2
    return total


def _parts(edges: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise(sorted(set(edges)))]


def _mixed(spectrum: Spectrum, edges: Sequence[int]) -> Spectrum:
    """The energies of entries that are mixed between these edges."""

    def even(energies: Tensor) -> Tensor:
        parts = [energies[:, part] for part in _parts([0, spectrum.columns, *edges])]
        return torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in parts], dim=1)

    return replace(spectrum, activation=even(spectrum.activation), price=even(spectrum.price))


def _factors(spectrum: Spectrum, start: int, end: int) -> list[tuple[Tensor, Tensor]]:
    """What is rounded, and what its errors are multiplied with (of this slice): activations by
    weights, and weights by activations."""
    a, e = spectrum.activation, spectrum.price
    return [(a, e[:, start:end]), (e, a[:, start:end])]


def _reach(energies: Tensor, parts: Sequence[slice], group: int) -> Tensor:
    """Half the squared size t^2 that a slice's largest entry is expected to have, [heads].

    Entries are Gaussian, of one variance v_i in each part of n_i columns (its mean energy): t^2
    solves sum n_i exp(-t^2 / (2 v_i)) = 1, so it is 2 ln(n) v for a single part. At most `group`
    columns share a scale; they have the parts in proportion.
    """
    sizes = torch.tensor([float(p.stop - p.start) for p in parts], dtype=torch.float64)
    variances = torch.stack([energies[:, p].mean(1) for p in parts], dim=1)  # [heads, parts]
    total = float(sizes.sum())
    spanned = max(min(group or total, total), 2.0)
    sizes = sizes * (spanned / total)
    if len(parts) == 1:
        return math.log(spanned) * variances[:, 0]
    low = torch.zeros(len(variances), dtype=torch.float64)
    high = math.log(spanned) * variances.amax(1)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        beyond = (sizes * torch.exp(-middle[:, None] / variances.clamp(min=_TINY))).sum(1)
        low, high = torch.where(beyond > 1, middle, low), torch.where(beyond > 1, high, middle)
    return high


def rank_table(
    spectrum: Spectrum,
    shares: Sequence[Fraction] = SHARES,
    low_bits: int = 4,
    high_bits: int = 8,
    group: int = 0,
    cuts: Sequence[int] | None = None,
    measured: Mapping[Fraction, float] | None = None,
) -> RankTable:
    """The choices of one group; arguments as in `predicted_loss`.

    measured: losses that replace the predicted ones.
    """
    choices = []
    for share in shares:
        high = high_columns(spectrum.columns, share)
        bits = low_bits + (high_bits - low_bits) * high / spectrum.columns
        known = (measured or {}).get(share)
        loss = known
        if loss is None:
            loss = predicted_loss(spectrum, high, low_bits, high_bits, group, cuts)
        choices.append(RankChoice(share, high, bits, loss, known is not None))
    return RankTable(spectrum.name, spectrum.readers, tuple(choices))


def _along(matrix: Tensor, basis: Tensor) -> Tensor:
    """v^T M v of every column v: [1, K]."""
    return ((matrix @ basis) * basis).sum(-2).reshape(1, -1)


def _by_rank(matrix: Tensor, vectors: Tensor, heads: int) -> Tensor:
    """As `_along` for an output projection, [1, heads * d]: columns of equal rank in their head
    stand together, the most important last. Query heads that share a KV head's [d, d] of matrix
    [H_kv, d, d] have equal parts of it."""
    energies = ((matrix @ vectors) * vectors).sum(-2).flip(-1)
    shared = heads // len(matrix)
    return (energies.repeat_interleave(shared, 0) / shared).T.reshape(1, -1)


def _head_spectrum(name: str, vectors: Tensor, activation: Tensor, price: Tensor) -> Spectrum:
    low_first = vectors.flip(-1)
    energies = (((x @ low_first) * low_first).sum(-2) for x in (activation, price))
    return Spectrum(name, (), *energies)


def _even(energies: Tensor) -> Tensor:
    """Behind a Hadamard matrix all columns have about the same energy: [1, K]."""
    return energies.mean().expand(1, len(energies))
