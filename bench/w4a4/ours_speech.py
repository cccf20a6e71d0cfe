"""quantlib's method on Whisper, in memory, within mean bits of linears and of the KV cache alone:
`quantlib compress --scheme resq` writes a checkpoint, whose embeddings and convolutions count too.

The parts are the pipeline's, in its order: means of inputs put into biases, which LayerNorms and
GELU layers have (`transforms.means`); gradients on labels sampled from the model; weighted bases,
with prices from those gradients; a sample of the rows of every linear in every candidate scheme,
rounded in the rotated basis; losses of weights and inputs predicted from Fisher information; the
exact solver under mean true bits of weights and of inputs, and another one for the KV cache; then
all rows in the schemes that were chosen, and clip factors. As of other models of several parts,
tokens weigh by the root of their gradients and the damping is STREAM_DAMPING. Re-rounding behind
rounded layers is left out. A cache's losses are measured instead of predicted: the decoder's KL
with one side of one attention rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.bench.w4a4.limits import Limits, with_codes
from quantlib.bench.w4a4.sites import Site, cached, linear, weight
from quantlib.bench.w4a4.subjects import Speech, divergence
from quantlib.calibration.observe import Accumulator
from quantlib.calibration.statistics import GroupStatistics, MatrixStatistics
from quantlib.formats.activation import ActivationSegment, fake_quantize, with_clips
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.size import payload_bytes
from quantlib.formats.weight import dequantize
from quantlib.kernels.kv_format import KvFormat, SideFormat
from quantlib.pipeline.caches import EXACT, SIDES, Losses, allocate
from quantlib.pipeline.inputs import round_inputs
from quantlib.pipeline.predict import ROWS
from quantlib.recipe import STREAM_DAMPING
from quantlib.rounding import Layout, RoundingOptions, round_group
from quantlib.rounding.clips import choose_clips
from quantlib.search import scores
from quantlib.search.activations import ACTIVATION_BITS, mean_bits
from quantlib.search.predict_rows import draw_rows, linear_rows
from quantlib.search.problem import Choice, Item, Problem
from quantlib.search.solve import solve
from quantlib.transforms.attention import (
    ATTRIBUTE,
    AttentionState,
    attach_attention,
    changed_attention,
)
from quantlib.transforms.bases import (
    Bases,
    Source,
    hidden_orders,
    high_columns,
    weighted_bases,
)
from quantlib.transforms.changes import changes
from quantlib.transforms.energies import fisher_of
from quantlib.transforms.means import means_of
from quantlib.transforms.mixing import head_cuts, output_order, rotation_of
from quantlib.transforms.moments import moments_of
from quantlib.transforms.rotation import Rotation
from quantlib.transforms.turned import turned_group, turned_outputs

CACHE_CLIPS = 6
"""Of calibration, that losses of KV formats are measured on."""
FINEST = SideFormat.parse("int4g16h16")
"""Key and value bases are made for the finest groups that a cache can get."""
OPTIONS = RoundingOptions(damping=STREAM_DAMPING)


@dataclass(frozen=True)
class Rounded:
    """A model that computes what its packed form would; the scheme of every rounded weight, by
    name; the format of every cache; and the KL that linears and caches are expected to cost."""

    model: Any
    schemes: Mapping[str, str]
    caches: Mapping[str, KvFormat]
    predicted: Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """What every budget is served from.

    rotation:   of the model. orders: weight -> the order in which it reads its input.
    statistics: of every site of the rotated model, in its own order of columns.
    choices:    every site in all schemes. caches: what formats of the KV cache lose.
    """

    rotation: Rotation
    orders: Mapping[str, Tensor]
    statistics: Mapping[str, MatrixStatistics]
    choices: Mapping[str, Sequence[Choice]]
    caches: Losses


def rounded(
    subject: Speech, seed: int, names: Sequence[str], limits: Limits, centred: bool = True
) -> Rounded:
    """The model within mean bits of its linears' weights, their inputs, and its KV cache.

    names: candidate schemes. centred: means of inputs are in biases (`transforms.means`).
    Raises SearchError when no candidate has so few bits.
    """
    known = measured(subject, seed, tuple(names), centred)
    model = subject.copy(known.rotation)
    attentions = {a.module: a for a in subject.wiring.attentions}
    head_dim = subject.wiring.attentions[0].head_dim
    caches = allocate(limits.sides(known.caches, head_dim), attentions, limits.kv)
    chosen = _solved(subject, known.choices, limits)
    for site in subject.sites:
        order = known.orders.get(site.name)
        _put(model, site, Scheme.parse(chosen[site.name]), known.statistics[site.name], order)
    states = {name: replace(_state(model, name), kv=form) for name, form in caches.items()}
    attach_attention(model, states)
    found = {reader.weight: chosen[site.name] for site in subject.sites for reader in site.readers}
    linears = (c.loss for n, own in known.choices.items() for c in own if c.scheme == chosen[n])
    sides = (
        known.caches[name][side][str(getattr(form, side))]
        for name, form in caches.items()
        for side in ("key", "value")
    )
    predicted = {"linears": math.fsum(linears), "caches": math.fsum(sides)}
    return Rounded(model, found, caches, predicted)


@lru_cache(maxsize=1)  # the next budget of the same seed
def measured(subject: Speech, seed: int, names: tuple[str, ...], centred: bool = True) -> Measured:
    """Everything that no budget changes. seed: of the mixing of directions."""
    schemes = [name for name in names if Scheme.parse(name).activation.rounds]
    shares = tuple(sorted({high.share for name in schemes if (high := Scheme.parse(name).high)}))
    rotation = find_rotation(subject, seed, shares, centred)
    model, changed = subject.copy(rotation), changes(subject.wiring, rotation)
    orders = {
        a.output.weight: output_order(a, head_cuts(a.head_dim, shares))
        for a in subject.wiring.attentions
    }
    found, terms = _folded_statistics(subject, centred)
    statistics, choices = {}, {}
    for site in subject.sites:
        (own,) = turned_group(found[site.name], changed).matrices
        order = orders.get(site.name)
        statistics[site.name] = own if order is None else own.reordered(order)
        choices[site.name] = _choices(
            model, site, statistics[site.name], own.tokens / terms, schemes, order
        )
    return Measured(rotation, orders, statistics, choices, _cache_losses(model, subject))


# -- calibration ---------------------------------------------------------------------------------


def gradient_statistics(model: Any, subject: Speech) -> tuple[dict[str, GroupStatistics], int]:
    """Statistics of every site, weighted by gradients of the loss on labels that the model samples
    itself, and how many labels there were."""
    generator = torch.Generator().manual_seed(0)
    turned = turned_outputs(subject.wiring)
    sums = {
        site.name: Accumulator(
            tuple(r.weight for r in site.readers), True, generator, torch.sqrt, turned
        )
        for site in subject.sites
    }
    terms = 0
    model.requires_grad_(False)
    table = model.get_input_embeddings().weight.requires_grad_(True)
    with _watched(model, subject.sites, sums) as window:
        for batch in subject.batches():
            features = batch["input_features"].clone().requires_grad_(True)
            logits = subject.predictions(model(**batch | {"input_features": features}).logits)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            torch.autograd.grad(loss, [features, table])
            terms += len(labels)
            window[0] += 1
    table.requires_grad_(False)
    return {name: GroupStatistics(name, [one.finish()]) for name, one in sums.items()}, terms


@contextmanager
def _watched(
    model: Any, sites: Sequence[Site], sums: Mapping[str, Accumulator]
) -> Iterator[list[int]]:
    """Show every site's linears to its accumulator; yields the number of the clip, to be set."""
    window = [0]

    def show(site: str, member: str, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        sums[site].seen(member, inputs[0], output, window[0])

    handles = [
        linear(model, reader).register_forward_hook(partial(show, site.name, reader.weight))
        for site in sites
        for reader in site.readers
    ]
    try:
        yield window
    finally:
        for handle in handles:
            handle.remove()


def find_rotation(
    subject: Speech, seed: int, shares: tuple[Fraction, ...], centred: bool = True
) -> Rotation:
    """Weighted bases of both residual streams, values and keys, and the order of hidden channels,
    as `pipeline.rotate` finds them; means of inputs, where they are to be in biases."""
    bases, orders = _directions(subject, shares, centred)
    head_dim = subject.wiring.attentions[0].head_dim
    starts = [group.start for group in FINEST.groups(head_dim)]
    rotation = rotation_of(
        bases,
        subject.wiring,
        seed,
        shares,
        value_cuts=[*head_cuts(head_dim, shares), *starts],
        key_cuts=starts,
        mixer="hadamard",
        hidden_order=orders,
        hidden_high={n: high_columns(len(order), shares[0]) for n, order in orders.items()},
    )
    return replace(rotation, means=_folded(subject, centred).means)


@dataclass(frozen=True)
class _Folded:
    """The model that bases and statistics are found on: its norms folded, its means in biases."""

    model: Any
    means: Mapping[str, Tensor]


@lru_cache(maxsize=1)
def _folded(subject: Speech, centred: bool) -> _Folded:
    if not centred:
        return _Folded(subject.folded, {})
    found = moments_of(subject.folded, subject.wiring, subject.batches()).inputs
    means = means_of({name: one.mean for name, one in found.items()}, subject.wiring)
    return _Folded(subject.copy(Rotation(fold_norms=True, means=means)), means)


@lru_cache(maxsize=1)
def _folded_statistics(subject: Speech, centred: bool) -> tuple[dict[str, GroupStatistics], int]:
    """Of the folded model; those of every seed's rotation are turned from them. What gradients have
    along the mean, one of 384 directions, norms that subtract it do not tell (`turned.turns`)."""
    return gradient_statistics(_folded(subject, centred).model, subject)


@lru_cache(maxsize=1)  # they are the same for every seed
def _directions(
    subject: Speech, shares: tuple[Fraction, ...], centred: bool
) -> tuple[Bases, dict[str, Tensor]]:
    folded, wiring = _folded(subject, centred).model, subject.wiring
    statistics, _ = _folded_statistics(subject, centred)
    source = Source(
        moments_of(folded, wiring, subject.batches()),
        wiring,
        lambda name: folded.get_parameter(name).detach(),
        fisher=fisher_of(statistics.values()),
        rounded={reader.weight for site in subject.sites for reader in site.readers},
    )
    bases = weighted_bases(source, max(shares), FINEST.wide, FINEST.wide)
    return bases, hidden_orders(source, shares[0])


# -- weights and inputs --------------------------------------------------------------------------


def shapes(subject: Speech) -> dict[str, tuple[int, int]]:
    """Weight -> (rows, columns), of all that is rounded."""
    readers = (reader for site in subject.sites for reader in site.readers)
    found = ((reader.weight, weight(subject.original, reader).shape) for reader in readers)
    return {name: (rows, columns) for name, (rows, columns) in found}


def _choices(
    model: Any,
    site: Site,
    statistics: MatrixStatistics,
    tokens: float,
    schemes: Sequence[str],
    order: Tensor | None,
) -> list[Choice]:
    """A site's readers in every scheme. They share an input, hence a scheme. tokens: for every term
    of the loss, of those that the site sees. ACTIVATION_BITS of a choice are in bits of this site's
    own inputs."""
    originals = {r.weight: _ordered(weight(model, r), order) for r in site.readers}
    parsed = {name: Scheme.parse(name) for name in schemes}
    layouts = list(dict.fromkeys(scheme.segments(site.width) for scheme in parsed.values()))
    losses = _weight_losses(originals, statistics, layouts)
    inputs = {scheme.activations(site.width) for scheme in parsed.values()}
    added = {segments: _input_loss(originals, statistics, segments) for segments in inputs}
    found = []
    for name, scheme in parsed.items():
        layout = scheme.segments(site.width)
        size = sum(payload_bytes(value.shape, layout) for value in originals.values())
        loss = losses[layouts.index(layout)] + added[scheme.activations(site.width)]
        costs = {ACTIVATION_BITS: mean_bits(scheme, site.width)}
        found.append(Choice(name, size, loss * tokens, costs))
    return found


def _weight_losses(
    originals: Mapping[str, Tensor], statistics: MatrixStatistics, layouts: Sequence[Layout]
) -> list[float]:
    """What the weights lose in each layout, from a sample of their rows (`search.predict_rows`)."""
    generator = torch.Generator().manual_seed(0)
    diagonal = statistics.hessian.diagonal()
    samples = {}
    for name, value in originals.items():
        plain = dequantize(quantize_rtn(value, layouts[len(layouts) // 2])) - value
        sizes = linear_rows(plain, diagonal, statistics.fisher[name])
        samples[name] = draw_rows(sizes, ROWS, generator)
    parts = {name: originals[name][sample.rows] for name, sample in samples.items()}
    quantized = round_group(parts, statistics.hessian, layouts, OPTIONS)
    losses = [0.0] * len(layouts)
    for (name, index), found in quantized.items():
        price = statistics.fisher[name][samples[name].rows]
        rows = linear_rows(dequantize(found) - parts[name], statistics.hessian, price)
        losses[index] += samples[name].total(rows)[0]
    return losses


def _input_loss(
    originals: Mapping[str, Tensor],
    statistics: MatrixStatistics,
    segments: tuple[ActivationSegment, ...],
) -> float:
    """What rounding their input so costs the weights, on the sampled tokens."""
    x = statistics.sample_x
    error = fake_quantize(x, segments) - x
    return math.fsum(
        scores.activation_score(value, error, statistics, name) for name, value in originals.items()
    )


def _solved(
    subject: Speech, choices: Mapping[str, Sequence[Choice]], limits: Limits
) -> dict[str, str]:
    """Site -> the scheme of least predicted loss within mean bits."""
    known = shapes(subject)
    numbers = sum(rows * width for rows, width in known.values())
    together = {
        site.name: (sum(known[r.weight][0] for r in site.readers), site.width)
        for site in subject.sites
    }
    items = []
    for name, own in choices.items():
        share = together[name][0] * together[name][1] / numbers
        mean = [replace(c, costs={n: share * bits for n, bits in c.costs.items()}) for c in own]
        items.append(Item(name, (name,), tuple(mean)))
    problem = with_codes(Problem(tuple(items)), together)
    found = solve(problem, int(numbers * limits.weights / 8), limits.costs)
    return {
        item.name: choice.scheme
        for item, choice in zip(items, problem.chosen(found.picks), strict=True)
    }


@torch.no_grad()
def _put(
    model: Any, site: Site, scheme: Scheme, statistics: MatrixStatistics, order: Tensor | None
) -> None:
    """Round a site's weights, and have the model round the site's input."""
    originals = {r.weight: _ordered(weight(model, r), order).clone() for r in site.readers}
    quantized = round_group(originals, statistics.hessian, [scheme.segments(site.width)], OPTIONS)
    segments = _clipped(originals, statistics, scheme.activations(site.width))

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return round_inputs(inputs[0], segments, order), *inputs[1:]

    for reader in site.readers:
        value = dequantize(quantized[reader.weight, 0])
        own = value if order is None else value[:, torch.argsort(order)]
        weight(model, reader).copy_(own)
        linear(model, reader).register_forward_pre_hook(hook)


def _clipped(
    originals: Mapping[str, Tensor],
    statistics: MatrixStatistics,
    segments: tuple[ActivationSegment, ...],
) -> tuple[ActivationSegment, ...]:
    """With the clip factors that cost least on the sampled tokens."""
    tokens = torch.stack([g.square().sum(1) for g in statistics.sample_g.values()]).sum(0)
    priced = [value * statistics.fisher[name].sqrt()[:, None] for name, value in originals.items()]
    matrix = torch.cat(priced)
    clips = choose_clips(statistics.sample_x, segments, matrix.T @ matrix, tokens.sqrt())
    return with_clips(segments, clips)


def _ordered(value: Tensor, order: Tensor | None) -> Tensor:
    return value if order is None else value[:, order]


# -- cache ---------------------------------------------------------------------------------------


def _cache_losses(model: Any, subject: Speech) -> Losses:
    """Of every attention with a cache, measured."""
    attentions = [a.module for a in subject.wiring.attentions if cached(subject.wiring, a)]
    heard = subject.heard_by(model, CACHE_CLIPS)
    exact = [subject.decoded(model, *one) for one in heard]
    losses: Losses = {name: {"key": {}, "value": {}} for name in attentions}
    for name in attentions:
        for form in map(SideFormat.parse, SIDES):
            sides = {"key": KvFormat(form, EXACT), "value": KvFormat(EXACT, form)}
            for side, kv in sides.items():
                with changed_attention(model, {name: {"kv": kv}}):
                    found = [
                        divergence(reference, subject.decoded(model, *one))
                        for reference, one in zip(exact, heard, strict=True)
                    ]
                losses[name][side][str(form)] = sum(found) / len(found)
    return losses


def _state(model: Any, module: str) -> AttentionState:
    found = model.get_submodule(module).__dict__.get(ATTRIBUTE)
    return AttentionState() if found is None else found
