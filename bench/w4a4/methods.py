"""The methods, each as its paper or code has it; where it cannot be, the docstring says so.

Common to all: weights symmetric with one scale per output row and slice, GPTQ (RTN: to the
nearest), the same search of clips, the same calibration data; activations with a dynamic scale per
token; keys and values per head and token; embeddings and head kept.

| method | basis | slices | activations |
|---|---|---|---|
| rtn | none | none | asymmetric |
| smoothquant | scales in norms, alpha searched | none | asymmetric |
| quik | none; outlier channels last | 1/8 everywhere at 8 bits | asymmetric |
| quarot | random Hadamard | none | symmetric, clip 0.9 |
| quarot_mixed | the same | as resq | asymmetric |
| resq | PCA times random | 1/8 at 8 bits but in down projections | asymmetric |
| coquant | ResQ with Sx / tr Sx + Sw / tr Sw for the residual stream | as resq | as resq |

`resq_no_a` .. `resq_no_d` leave out one projection of ResQ (its Table 6); slices stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlib.bench.w4a4 import rotations
from quantlib.bench.w4a4.bits import Bits, count
from quantlib.bench.w4a4.fake import Prepared, SitePlan, columns, finish
from quantlib.bench.w4a4.grids import Grid, Grids
from quantlib.bench.w4a4.heads import HeadPlan
from quantlib.bench.w4a4.sites import Site, cached, head_order, weight
from quantlib.bench.w4a4.statistics import scaled, turned
from quantlib.bench.w4a4.subjects import Subject
from quantlib.transforms import hadamard
from quantlib.transforms.changes import Basis, Blocks, Heads
from quantlib.transforms.rotation import Rotation
from quantlib.transforms.wiring import RMS_PLUS_ONE, Attention

SHARE = 8
"""One in so many columns is kept at 8 bits."""
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LOW, HIGH = 4, 8


@dataclass(frozen=True)
class Quantized:
    """A fake-quantized model in memory, its true bits, and what else is worth a note."""

    model: Any
    bits: Bits
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """prepare: (subject, seed) -> what `fake.finish` rounds. random: seeds differ."""

    prepare: Callable[[Subject, int], Prepared]
    random: bool = False


def quantize(method: Method, subject: Subject, seed: int, prefix: bool) -> Quantized:
    """A method applied. prefix: Hessians are of inputs behind what was rounded already, instead of
    the full-precision model's."""
    prepared = method.prepare(subject, seed)
    if prefix:
        prepared.hessian = None
    bits = count(prepared.model, prepared.sites, prepared.plans, prepared.heads)
    return Quantized(finish(prepared, subject.run), bits, prepared.notes)


# -- slices --------------------------------------------------------------------------------------


def _grids(low: int, high: int, group: int = 1) -> Grids:
    """Asymmetric slices of `group` heads with `low` and `high` columns each."""
    parts = []
    if low:
        parts.append(Grid(low * group, LOW, group=low if group > 1 else 0))
    if high:
        parts.append(Grid(high * group, HIGH, group=high if group > 1 else 0))
    return tuple(parts)


def _uniform(subject: Subject, activation: Callable[[int], Grid]) -> dict[str, SitePlan]:
    """No slices anywhere."""
    return {
        site.name: SitePlan(columns(site.width, 0, LOW), (activation(site.width),))
        for site in subject.sites
    }


def resq_slices(subject: Subject) -> tuple[dict[str, SitePlan], dict[str, HeadPlan]]:
    """What ResQ rounds how, by site and by attention module, in whatever basis."""
    return _sliced(subject), _sliced_heads(subject, {})


def _sliced(subject: Subject) -> dict[str, SitePlan]:
    """ResQ's: 1/8 of the residual stream, 1/8 of every head in front of an output projection, with
    scales per head, and no slice in down projections."""
    plans = {}
    for site in subject.sites:
        high = site.width // SHARE
        if site.kind == "hidden":
            plans[site.name] = SitePlan(columns(site.width, 0, LOW), _grids(site.width, 0))
        elif site.attention is None:
            low = site.width - high
            plans[site.name] = SitePlan(columns(low, high, LOW, HIGH), _grids(low, high))
        else:
            heads, d = site.attention.heads, site.attention.head_dim
            high = d // SHARE
            plans[site.name] = SitePlan(
                columns(heads * (d - high), heads * high, LOW, HIGH),
                _grids(d - high, high, heads),
                head_order(heads, d, high),
            )
    return plans


def _cached(subject: Subject) -> list[Attention]:
    return [a for a in subject.wiring.attentions if cached(subject.wiring, a)]


def _plain_heads(
    subject: Subject, clip: float = 1.0, bases: Mapping[str, Tensor] | None = None
) -> dict[str, HeadPlan]:
    """No slices; keys in the bases of their attentions, if there are any."""
    plans = {}
    for attention in _cached(subject):
        grids = (Grid(attention.head_dim, LOW, clip=clip),)
        basis = None if bases is None else bases[attention.name].float()
        plans[attention.module] = HeadPlan(grids, grids, basis)
    return plans


def _sliced_heads(subject: Subject, bases: Mapping[str, Tensor]) -> dict[str, HeadPlan]:
    plans = {}
    for attention in _cached(subject):
        high = attention.head_dim // SHARE
        grids = _grids(attention.head_dim - high, high)
        basis = bases.get(attention.name)
        plans[attention.module] = HeadPlan(grids, grids, None if basis is None else basis.float())
    return plans


# -- without rotation ----------------------------------------------------------------------------


def rtn(subject: Subject, seed: int = 0) -> Prepared:
    """Round everything to nearest."""
    plans = _uniform(subject, lambda width: Grid(width, LOW))
    heads = _plain_heads(subject)
    return Prepared(subject.copy(), subject.sites, plans, heads, nearest=True)


def smoothquant(subject: Subject, seed: int = 0) -> Prepared:
    """SmoothQuant (arXiv:2211.10438): s = max|x|^alpha / max|w|^(1 - alpha) per channel behind
    every norm, x / s and W s; one alpha for the model, the best of `ALPHAS` by KL on calibration
    data with weights rounded to the nearest. Weights then by GPTQ, as everywhere here."""
    best = (float("inf"), ALPHAS[0])
    for alpha in ALPHAS:
        trial, _ = _smoothed(subject, alpha)
        trial.nearest = True
        best = min(best, (subject.quick(finish(trial, subject.run)), alpha))
    prepared, _ = _smoothed(subject, best[1])
    prepared.notes["alpha"] = best[1]
    return prepared


def _smoothed(subject: Subject, alpha: float) -> tuple[Prepared, dict[str, Tensor]]:
    model = subject.copy()
    factors: dict[str, Tensor] = {}
    for site in subject.sites:
        if site.norm is not None:
            factors[site.name] = _smooth(model, site, subject, alpha)

    def hessian(site: Site) -> Tensor:
        inputs = subject.statistics.inputs[site.name]
        factor = factors.get(site.name)
        return (inputs if factor is None else scaled(inputs, 1 / factor)).second

    plans = _uniform(subject, lambda width: Grid(width, LOW))
    return Prepared(model, subject.sites, plans, _plain_heads(subject), hessian), factors


@torch.no_grad()
def _smooth(model: Any, site: Site, subject: Subject, alpha: float) -> Tensor:
    """Divide a norm's output by SmoothQuant's factors [K], and give them to its readers."""
    assert site.norm is not None
    weights = [weight(model, reader) for reader in site.readers]
    largest = torch.stack([matrix.abs().amax(0) for matrix in weights]).amax(0).clamp_(min=1e-5)
    reach = subject.statistics.inputs[site.name].amax.clamp(min=1e-5)
    factor = (reach.pow(alpha) / largest.pow(1 - alpha)).clamp_(min=1e-5)
    gain = model.get_parameter(site.norm.weight).data
    if site.norm.kind == RMS_PLUS_ONE:
        gain.copy_((1 + gain) / factor - 1)
    else:
        gain.div_(factor)
    if site.norm.bias is not None:
        model.get_parameter(site.norm.bias).data.div_(factor)
    for matrix in weights:
        matrix.mul_(factor)
    return factor


def quik(subject: Subject, seed: int = 0) -> Prepared:
    """QUIK (arXiv:2310.09259) as ResQ compares with it: the 1/8 of a linear's input channels with
    the largest magnitude on calibration data at 8 bits; of each head's keys and values likewise."""
    plans = {}
    for site in subject.sites:
        order = subject.statistics.inputs[site.name].amax.argsort()
        high = site.width // SHARE
        low = site.width - high
        plans[site.name] = SitePlan(columns(low, high, LOW, HIGH), _grids(low, high), order)
    heads = {}
    for attention in _cached(subject):
        found = subject.statistics.heads[attention.name]
        high = attention.head_dim // SHARE
        grids = _grids(attention.head_dim - high, high)
        heads[attention.module] = HeadPlan(
            grids,
            grids,
            key_order=found.key_amax.argsort(-1),
            value_order=found.value_amax.argsort(-1),
        )
    return Prepared(
        subject.copy(),
        subject.sites,
        plans,
        heads,
        lambda site: subject.statistics.inputs[site.name].second,
    )


# -- with rotation -------------------------------------------------------------------------------


def _rotated(
    subject: Subject,
    rotation: Rotation,
    plans: dict[str, SitePlan],
    heads: dict[str, HeadPlan],
) -> Prepared:
    """The model in the bases of `rotation` (keys' are in `heads`)."""

    def basis(site: Site) -> Basis | None:
        if site.stream is not None:
            return rotation.basis(site.stream.name)
        if site.attention is not None:
            values = rotation.value.get(site.attention.name)
            groups = site.attention.heads // site.attention.kv_heads
            return None if values is None else Heads(values.repeat_interleave(groups, 0))
        assert site.hidden is not None
        size = rotation.hidden.get(site.hidden.name, 1)
        return Blocks(size) if size > 1 else None

    def hessian(site: Site) -> Tensor:
        return turned(subject.folded_statistics.inputs[site.name].second, basis(site))

    return Prepared(subject.copy(rotation), subject.sites, plans, heads, hessian)


def _hidden(subject: Subject) -> dict[str, int]:
    """U_D: the largest Hadamard matrices that the hidden widths have."""
    return {site.name: hadamard.block_size(site.width) for site in subject.wiring.hiddens}


def _random_residuals(subject: Subject, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        stream.name: rotations.random_hadamard(stream.width, generator)
        for stream in subject.wiring.streams
    }


def quarot(subject: Subject, seed: int) -> Prepared:
    """QuaRot (arXiv:2404.00456): random Hadamard in the residual stream, Hadamard in every head's
    values, keys and hidden layer; activations symmetric with clip 0.9, cache asymmetric with clip
    0.95. Its online Hadamard across heads needs one of as many heads; without it, as in SpinQuant.
    """
    rotation, keys = _hadamards(subject, seed)
    plans = _uniform(subject, lambda width: Grid(width, LOW, symmetric=True, clip=0.9))
    heads = _plain_heads(subject, clip=0.95, bases=keys)
    return _rotated(subject, rotation, plans, heads)


def quarot_mixed(subject: Subject, seed: int) -> Prepared:
    """ResQ's slices in QuaRot's bases: as many bits as ResQ, the 8-bit slice put anywhere."""
    rotation, keys = _hadamards(subject, seed)
    return _rotated(subject, rotation, _sliced(subject), _sliced_heads(subject, keys))


def _hadamards(subject: Subject, seed: int) -> tuple[Rotation, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    residuals = _random_residuals(subject, generator)
    values, keys = {}, {}
    for attention in subject.wiring.attentions:
        one = rotations.fixed_hadamard(attention.head_dim)
        values[attention.name] = one.expand(attention.kv_heads, -1, -1)
        keys[attention.name] = one
    rotation = Rotation(
        residual=residuals.get("decoder"),
        encoder=residuals.get("encoder"),
        value=values,
        hidden=_hidden(subject),
    )
    return rotation, keys


def resq(
    subject: Subject,
    seed: int,
    leave_out: str = "",
    moment: Callable[[Subject, str], Tensor] | None = None,
) -> Prepared:
    """ResQ (arXiv:2412.14363) with its default options: one U_A per stream, one U_B per KV head,
    one U_C per attention, U_D Hadamard; one random R per width for all of them.

    leave_out: "a" .. "d", a projection that stays the identity. moment: (subject, stream) ->
    what U_A is the PCA of, in place of the inputs' second moment.
    Left out, in ResQ's favour: its rounding of queries, keys and U_C to 8 bits before U_C. Its mean
    subtraction from embeddings is left out too: it changes the function of an RMSNorm model.
    """
    generator = torch.Generator().manual_seed(seed)
    statistics = subject.folded_statistics
    moment = moment or (lambda own, stream: rotations.stream_moment(own.sites, statistics, stream))
    residuals = {}
    for stream in subject.wiring.streams:
        mix = rotations.mixing(stream.width, stream.width // SHARE, generator)
        residuals[stream.name] = rotations.ascending(moment(subject, stream.name)) @ mix
    values, keys = {}, {}
    mixes: dict[int, Tensor] = {}
    for attention in subject.wiring.attentions:
        d = attention.head_dim
        if d not in mixes:
            mixes[d] = rotations.mixing(d, d // SHARE, generator)
        values[attention.name] = rotations.value_bases(attention, statistics, mixes[d])
        keys[attention.name] = rotations.key_basis(attention, statistics, mixes[d])
    rotation = Rotation(
        residual=None if leave_out == "a" else residuals.get("decoder"),
        encoder=None if leave_out == "a" else residuals.get("encoder"),
        value={} if leave_out == "b" else values,
        hidden={} if leave_out == "d" else _hidden(subject),
        fold_norms=True,
    )
    heads = _sliced_heads(subject, {} if leave_out == "c" else keys)
    return _rotated(subject, rotation, _sliced(subject), heads)


def coquant(subject: Subject, seed: int) -> Prepared:
    """ResQ with CoQuant's objective (arXiv:2604.26378) for the residual stream. Its bases per
    layer, which need a matrix product online that its bit count leaves out, are not used."""

    def moment(own: Subject, stream: str) -> Tensor:
        return rotations.stream_moment_with_weights(
            own.sites, own.folded_statistics, stream, own.folded
        )

    return resq(subject, seed, moment=moment)


def _without(letter: str) -> Method:
    return Method(lambda subject, seed: resq(subject, seed, leave_out=letter))


METHODS: dict[str, Method] = {
    "rtn": Method(rtn),
    "smoothquant": Method(smoothquant),
    "quik": Method(quik),
    "quarot": Method(quarot, random=True),
    "quarot_mixed": Method(quarot_mixed, random=True),
    "resq": Method(resq, random=True),
    "coquant": Method(coquant, random=True),
}
ABLATIONS: dict[str, Method] = {f"resq_no_{letter}": _without(letter) for letter in "abcd"}
"""With one seed each: they differ by factors, where seeds differ by percents."""
