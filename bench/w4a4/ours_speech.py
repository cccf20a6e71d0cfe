"""quantlib's method on Whisper, in memory: `quantlib compress --scheme resq` goes through decoders
block by block, and an encoder-decoder model is no chain of blocks.

The parts are the pipeline's, in its order: gradients on labels sampled from the model; weighted
bases, with prices from those gradients; every linear in every candidate scheme, rounded in the
rotated basis; losses of weights and inputs predicted from Fisher information; the exact solver
under mean true bits of weights and of inputs, and another one for the KV cache. Re-rounding behind
rounded layers, and clip factors with it, are left out. A cache's losses are measured instead of
predicted: the decoder's KL with one side of one attention rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.bench.w4a4.sites import Site, cached, linear, weight
from quantlib.bench.w4a4.subjects import Speech, divergence
from quantlib.calibration.observe import Accumulator
from quantlib.calibration.statistics import GroupStatistics
from quantlib.formats.scheme import Scheme
from quantlib.formats.size import payload_bytes
from quantlib.formats.weight import QuantizedWeight, dequantize
from quantlib.kernels.kv_format import KvFormat, SideFormat
from quantlib.pipeline.caches import EXACT, SIDES, Losses, allocate
from quantlib.pipeline.inputs import round_inputs
from quantlib.pipeline.scoring import Part, matrix_of, scored
from quantlib.rounding import round_group
from quantlib.search.activations import ACTIVATION_BITS, mean_bits
from quantlib.search.problem import Choice, Item, Problem
from quantlib.search.solve import solve
from quantlib.transforms.attention import (
    ATTRIBUTE,
    AttentionState,
    attach_attention,
    changed_attention,
)
from quantlib.transforms.bases import Source, hidden_orders, high_columns, weighted_bases
from quantlib.transforms.energies import fisher_of
from quantlib.transforms.mixing import head_cuts, output_order, rotation_of
from quantlib.transforms.moments import moments_of
from quantlib.transforms.rotation import Rotation

TASK = "kl"
CACHE_CLIPS = 6
"""Of calibration, that losses of KV formats are measured on."""
FINEST = SideFormat.parse("int4g16h16")
"""Key and value bases are made for the finest groups that a cache can get."""


@dataclass(frozen=True)
class Rounded:
    """A model that computes what its packed form would; the scheme of every rounded weight, by
    name; and the format of every cache."""

    model: Any
    schemes: Mapping[str, str]
    caches: Mapping[str, KvFormat]


@dataclass(frozen=True)
class Candidate:
    """A site in one scheme: what the solver is told, and its readers rounded, in the columns'
    packed order."""

    choice: Choice
    weights: Mapping[str, QuantizedWeight]


def rounded(
    subject: Speech,
    seed: int,
    names: Sequence[str],
    weights: float,
    activations: float,
    kv: float,
) -> Rounded:
    """The model within mean true bits of its linears' weights, their inputs, and its KV cache.

    names: candidate schemes. Raises SearchError when none of them has so few bits.
    """
    schemes = [name for name in names if Scheme.parse(name).activation.rounds]
    shares = sorted({high.share for name in schemes if (high := Scheme.parse(name).high)})
    rotation = find_rotation(subject, seed, shares)
    model = subject.copy(rotation)
    orders = {
        a.output.weight: output_order(a, head_cuts(a.head_dim, shares))
        for a in subject.wiring.attentions
    }
    statistics, terms = gradient_statistics(model, subject, seed)
    candidates = {
        site.name: _candidates(
            model, site, statistics[site.name], terms, schemes, orders.get(site.name), seed
        )
        for site in subject.sites
    }
    caches = _caches(model, subject, kv)
    chosen = _solved(subject, candidates, weights, activations)
    for site in subject.sites:
        _put(model, site, chosen[site.name], orders.get(site.name))
    states = {name: replace(_state(model, name), kv=form) for name, form in caches.items()}
    attach_attention(model, states)
    found = {
        reader.weight: chosen[site.name].choice.scheme
        for site in subject.sites
        for reader in site.readers
    }
    return Rounded(model, found, caches)


# -- calibration ---------------------------------------------------------------------------------


def gradient_statistics(
    model: Any, subject: Speech, seed: int
) -> tuple[dict[str, GroupStatistics], int]:
    """Statistics of every site, weighted by gradients of the loss on labels that the model samples
    itself, and how many labels there were."""
    generator = torch.Generator().manual_seed(seed)
    sums = {
        site.name: Accumulator(tuple(r.weight for r in site.readers), True, generator)
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


def find_rotation(subject: Speech, seed: int, shares: Sequence[Fraction]) -> Rotation:
    """Weighted bases of both residual streams, values and keys, and the order of hidden channels,
    as `pipeline.rotate` finds them."""
    folded, wiring = subject.folded, subject.wiring
    statistics, _ = gradient_statistics(folded, subject, seed)
    source = Source(
        moments_of(folded, wiring, subject.batches()),
        wiring,
        lambda name: folded.get_parameter(name).detach(),
        fisher=fisher_of(statistics.values()),
        rounded={reader.weight for site in subject.sites for reader in site.readers},
    )
    bases = weighted_bases(source, max(shares), FINEST.wide, FINEST.wide)
    orders = hidden_orders(source, shares[0])
    head_dim = wiring.attentions[0].head_dim
    starts = [group.start for group in FINEST.groups(head_dim)]
    return rotation_of(
        bases,
        wiring,
        seed,
        shares,
        value_cuts=[*head_cuts(head_dim, shares), *starts],
        key_cuts=starts,
        mixer="hadamard",
        hidden_order=orders,
        hidden_high={n: high_columns(len(order), shares[0]) for n, order in orders.items()},
    )


# -- weights and inputs --------------------------------------------------------------------------


def _candidates(
    model: Any,
    site: Site,
    statistics: GroupStatistics,
    terms: int,
    schemes: Sequence[str],
    order: Tensor | None,
    seed: int,
) -> list[Candidate]:
    """A site's readers in every scheme. They share an input, hence a scheme."""
    originals = {r.weight: _ordered(weight(model, r), order).clone() for r in site.readers}
    (own,) = statistics.matrices
    own = own if order is None else own.reordered(order)
    part = Part(TASK, GroupStatistics(site.name, [own]), terms)
    layouts: dict[Any, list[str]] = {}
    for name in schemes:
        layouts.setdefault(Scheme.parse(name).segments(site.width), []).append(name)
    found = round_group(originals, own.hessian, list(layouts))
    matrices = {
        name: matrix_of(original, [part], 0, name, seed) for name, original in originals.items()
    }
    candidates = []
    for index, (layout, alike) in enumerate(layouts.items()):
        quantized = {name: found[name, index] for name in originals}
        losses = {name: scored(value, [matrices[name]], alike) for name, value in quantized.items()}
        size = sum(payload_bytes(value.shape, layout) for value in originals.values())
        numbers = sum(value.numel() for value in originals.values())
        for scheme in alike:
            loss = math.fsum(losses[name][scheme][TASK][0] for name in originals)
            costs = {ACTIVATION_BITS: numbers * mean_bits(Scheme.parse(scheme), site.width)}
            candidates.append(Candidate(Choice(scheme, size, loss, costs), quantized))
    return candidates


def _solved(
    subject: Speech,
    candidates: Mapping[str, Sequence[Candidate]],
    weights: float,
    activations: float,
) -> dict[str, Candidate]:
    """Site -> the candidate of least predicted loss within mean bits."""
    numbers = sum(
        weight(subject.original, reader).numel()
        for site in subject.sites
        for reader in site.readers
    )
    problem = Problem(
        tuple(Item(name, (name,), tuple(c.choice for c in own)) for name, own in candidates.items())
    )
    found = solve(problem, int(numbers * weights / 8), {ACTIVATION_BITS: numbers * activations})
    return {
        name: own[pick] for (name, own), pick in zip(candidates.items(), found.picks, strict=True)
    }


@torch.no_grad()
def _put(model: Any, site: Site, chosen: Candidate, order: Tensor | None) -> None:
    """Give the model a site's rounded weights, and have it round the site's input."""
    segments = Scheme.parse(chosen.choice.scheme).activations(site.width)

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return round_inputs(inputs[0], segments, order), *inputs[1:]

    for reader in site.readers:
        value = dequantize(chosen.weights[reader.weight])
        own = value if order is None else value[:, torch.argsort(order)]
        weight(model, reader).copy_(own)
        linear(model, reader).register_forward_pre_hook(hook)


def _ordered(value: Tensor, order: Tensor | None) -> Tensor:
    return value if order is None else value[:, order]


# -- cache ---------------------------------------------------------------------------------------


def _caches(model: Any, subject: Speech, bits: float) -> dict[str, KvFormat]:
    """Attention module -> the format of its cache, within mean bits, by measured losses."""
    attentions = {a.module: a for a in subject.wiring.attentions if cached(subject.wiring, a)}
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
    return allocate(losses, attentions, bits)


def _state(model: Any, module: str) -> AttentionState:
    found = model.get_submodule(module).__dict__.get(ATTRIBUTE)
    return AttentionState() if found is None else found
