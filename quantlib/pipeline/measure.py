"""The measure stage: every weight in every candidate scheme, rounded once, scored, and kept in the
layer bank.

One linear group at a time: its weights and statistics are read, all candidates are rounded
together, each rounding error is scored in every task, and the packed tensors go to the bank with
their scores. The sensitivity table is then read off the bank.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.calibration.statistics import EmbeddingStatistics, GroupStatistics
from quantlib.checkpoint.bank import LayerBank
from quantlib.formats.composite import CompositeWeight, StoredWeight, pack_stored
from quantlib.formats.scheme import KEPT, Scheme
from quantlib.formats.weight import QuantizedWeight, unpack
from quantlib.models.rows import LinearGroup, Weight
from quantlib.pipeline import bytecount, parts
from quantlib.pipeline.calibrate import embedding_statistics, group_statistics
from quantlib.pipeline.plan import TASK
from quantlib.pipeline.run import Run
from quantlib.pipeline.scoring import (
    EmbeddingPart,
    Matrix,
    Part,
    embedding_matrix,
    matrix_of,
    scored,
)
from quantlib.rounding import (
    Layout,
    RoundingOptions,
    concatenate,
    round_group,
    round_low_rank,
    round_rows,
)
from quantlib.search.sensitivity import Entry, Sensitivity


def measure(run: Run) -> Sensitivity:
    """Fill the bank and return the table, without a calibration to measured KL (see `probe`)."""
    measure_groups(run, run.model_map.groups)
    return sensitivity(run)


def measure_groups(run: Run, groups: Iterable[LinearGroup]) -> None:
    """Put these groups into the bank, in every candidate scheme."""
    missing = [group for group in groups if not is_measured(run, group)]
    with run.stage("measure", len(missing)) as progress:
        for group in missing:
            _measure_group(run, group)
            progress.tick(group.name)


def measure_plan(run: Run, schemes: Mapping[str, str]) -> None:
    """Put what the bank lacks of one plan (weight -> scheme) into it: a plan that was made from
    predictions is rounded when it is applied."""
    lacking = {
        (name, scheme)
        for name, scheme in schemes.items()
        if not run.bank.has(entry_key(run, name, scheme))
    }
    names = {name for name, _ in lacking}
    groups = [group for group in run.model_map.groups if names.intersection(group.members)]
    with run.stage("measure", len(groups)) as progress:
        for group in groups:
            _measure_group(run, group, lacking)
            progress.tick(group.name)


Predicted = Mapping[str, Mapping[str, tuple[float, float]]]
"""Weight -> scheme -> (loss, its standard error), where that was not measured (`predict.py`)."""


def sensitivity(run: Run, predicted: Predicted | None = None) -> Sensitivity:
    """The table, read off the bank, and off predictions of the only task where the bank has
    nothing."""
    rows = {}
    for weight in run.model_map.weights:
        entries = {}
        for scheme in run.candidates[weight.name]:
            key = entry_key(run, weight.name, str(scheme))
            guess = (predicted or {}).get(weight.name, {}).get(str(scheme))
            if guess is not None and not run.bank.has(key):
                found = {_extra("loss", TASK): guess[0], _extra("error", TASK): guess[1]}
            else:
                found = run.bank.entry(key).extra
            entries[str(scheme)] = Entry(
                bytecount.weight_bytes(weight, scheme),
                {task: found[_extra("loss", task)] for task in run.tasks},
                {task: found[_extra("error", task)] for task in run.tasks},
            )
        rows[weight.name] = entries
    provenance = {
        "source": run.source_hash,
        "statistics": run.statistics_hash,
        "bank": run.rounding_hash,
    }
    whole = run.workload is not None
    return Sensitivity(
        run.model_map.fingerprint,
        run.tasks,
        rows,
        provenance,
        extra_bytes=run.extra_bytes,
        baseline={task: parts.baseline(run, task) for task in run.tasks} if whole else {},
    )


def _extra(what: str, task: str) -> str:
    """Under which name a bank entry keeps its loss, or the error of that, in a task."""
    return what if task == TASK else f"{what} {task}"


def entry_key(run: Run, weight: str, scheme: str) -> str:
    """The bank key of a weight in a scheme under this run's rounding."""
    return LayerBank.key(weight, scheme, run.rounding_hash)


def measured_groups(run: Run) -> int:
    """How many groups are in the bank in every candidate scheme."""
    return sum(is_measured(run, group) for group in run.model_map.groups)


def is_measured(run: Run, group: LinearGroup) -> bool:
    """Whether the bank has a group in every candidate scheme."""
    return all(
        run.bank.has(entry_key(run, name, str(scheme)))
        for name in group.members
        for scheme in run.candidates[name]
    )


def _measure_group(
    run: Run, group: LinearGroup, only: Collection[tuple[str, str]] | None = None
) -> None:
    """Round, score and keep what the bank lacks of one group (of `only`, if that is given); what it
    has is not touched."""
    started = time.monotonic()
    weights = [run.model_map.weight(name) for name in group.members]
    missing = [
        (weight.name, str(scheme))
        for weight in weights
        for scheme in run.candidates[weight.name]
        if only is None or (weight.name, str(scheme)) in only
        if not run.bank.has(entry_key(run, weight.name, str(scheme)))
    ]
    if not missing:
        return
    _keep(run, [(name, scheme) for name, scheme in missing if scheme in KEPT])
    missing = [(name, scheme) for name, scheme in missing if scheme not in KEPT]
    if not missing:
        return
    wanted = {name for _, name in missing}
    schemes = [s for s in run.candidates[weights[0].name] if str(s) in wanted]
    if group.kind in ("embedding", "head"):
        candidates = _round_embedding(run, group, weights, schemes)
    else:
        candidates = _round_matrices(run, group, schemes)
    seconds = (time.monotonic() - started) / len(missing)
    lacking = set(missing)
    with run.bank.batch() as batch:
        for name, alike, quantized, matrices in candidates:
            own = [scheme for scheme in alike if (name, scheme) in lacking]
            tensors = pack_stored(quantized) if own else {}
            for scheme, found in scored(quantized, matrices, own).items():
                extra = {_extra("loss", task): loss for task, (loss, _) in found.items()}
                extra |= {_extra("error", task): error for task, (_, error) in found.items()}
                batch.put(name, scheme, run.rounding_hash, tensors, extra, seconds)


def _keep(run: Run, kept: Sequence[tuple[str, str]]) -> None:
    """Entries of weights that stay as they are: they lose nothing, and their tensors are the
    source's."""
    nothing = {_extra(what, task): 0.0 for what in ("loss", "error") for task in run.tasks}
    with run.bank.batch() as batch:
        for name, scheme in kept:
            batch.put(name, scheme, run.rounding_hash, {}, nothing)


Candidates = list[tuple[str, list[str], StoredWeight, list[Matrix]]]
"""(weight name, schemes, the whole weight as all of these round it, stacks as [E*N, K], and what it
was rounded from): schemes of one entry differ in their activations alone."""


@dataclass(frozen=True)
class _Known:
    """Of a group: the statistics it is rounded under, and those of every task."""

    together: GroupStatistics
    parts: list[Part]


def _known(run: Run, group: LinearGroup) -> _Known:
    if run.workload is None:
        found = ordered_statistics(run, group)
        return _Known(found, [Part(TASK, found, run.windows.numel())])
    streams = {
        task: _ordered(run, group, own) for task, own in parts.group_parts(run, group.name).items()
    }
    return _Known(
        parts.summed_group(run, streams),
        [Part(task, own, parts.summary(run, task).terms) for task, own in streams.items()],
    )


def _round_matrices(run: Run, group: LinearGroup, schemes: list[Scheme]) -> Candidates:
    """Round linears or a convolution; a stack of experts matrix by matrix, each under its own
    Hessian."""
    known = _known(run, group)
    originals = {name: _matrices(run, name) for name in group.members}
    options = RoundingOptions(run.damping, run.recipe.passes)
    columns = run.model_map.weight(group.members[0]).in_features
    plain = [scheme for scheme in schemes if not scheme.is_composite]
    factored = [scheme for scheme in schemes if scheme.low_rank is not None]
    segments = [scheme.segments(columns) for scheme in plain]
    layouts = list(dict.fromkeys([*segments, *_rests(run, group, factored)]))
    pieces: dict[tuple[str, int], list[QuantizedWeight]] = {}
    for index, statistics in enumerate(known.together.matrices):
        members = {name: originals[name][index] for name in group.members}
        for key, value in round_group(members, statistics.hessian, layouts, options).items():
            pieces.setdefault(key, []).append(value)
    seed = run.recipe.seed
    matrices = {
        name: [
            matrix_of(original, known.parts, index, name, seed)
            for index, original in enumerate(originals[name])
        ]
        for name in group.members
    }
    whole = {key: concatenate(values) for key, values in pieces.items()}
    alike = [
        [str(s) for s, own in zip(plain, segments, strict=True) if own == layout]
        for layout in layouts
    ]
    candidates: Candidates = [
        (name, names, whole[name, index], matrices[name])
        for name in group.members
        for index, names in enumerate(alike)
    ]
    for scheme in factored:
        alone = {}
        if not _is_alone(scheme):
            layout = scheme.rest.segments(columns)
            alone = {
                name: whole[name, layouts.index(layout)]
                if layout in layouts
                else _from_bank(run, name, scheme.rest)
                for name in group.members
            }
        found = _with_factors(known, originals, scheme, alone, options)
        candidates += [(name, [str(scheme)], found[name], matrices[name]) for name in found]
    return candidates


def _rests(run: Run, group: LinearGroup, schemes: Sequence[Scheme]) -> list[Layout]:
    """Layouts in which the bank lacks what schemes with factors start from."""
    columns = run.model_map.weight(group.members[0]).in_features
    return [
        scheme.rest.segments(columns)
        for scheme in schemes
        if not _is_alone(scheme)
        if not all(run.bank.has(entry_key(run, m, str(scheme.rest))) for m in group.members)
    ]


def _is_alone(scheme: Scheme) -> bool:
    """Whether a scheme's factors have no rest beside them."""
    return scheme.low_rank is not None and scheme.low_rank.alone


def _from_bank(run: Run, name: str, scheme: Scheme) -> QuantizedWeight:
    weight = run.model_map.weight(name)
    tensors = run.bank.get(entry_key(run, name, str(scheme)))
    shape = (weight.out_features, weight.in_features)
    return unpack(tensors, shape, scheme.segments(weight.in_features))


def _with_factors(
    known: _Known,
    originals: Mapping[str, tuple[Tensor, ...]],
    scheme: Scheme,
    alone: Mapping[str, QuantizedWeight],
    options: RoundingOptions,
) -> dict[str, CompositeWeight]:
    """The members of a group of dense matrices, with factors."""
    (statistics,) = known.together.matrices
    weights = {name: original for name, (original,) in originals.items()}
    hessian = statistics.hessian if statistics.tokens else None
    return round_low_rank(weights, hessian, scheme, alone, statistics.fisher, options)


def ordered_weight(run: Run, name: str) -> Tensor:
    """A weight of the source as it is rounded ([N, K], or [E, N, K]), float32, with its columns in
    the order it is packed in."""
    weight = run.model_map.weight(name).matrix(run.source.read(name)).float()
    order = run.orders.get(name)
    return weight if order is None else weight[..., order]


def ordered_statistics(run: Run, group: LinearGroup) -> GroupStatistics:
    """The statistics of a group, of inputs in the order its members are packed in."""
    return _ordered(run, group, group_statistics(run, group.name))


def _ordered(run: Run, group: LinearGroup, stats: GroupStatistics) -> GroupStatistics:
    order = run.orders.get(group.members[0])
    if order is None or not stats.tokens:
        return stats
    return GroupStatistics(group.name, [matrix.reordered(order) for matrix in stats.matrices])


def _round_embedding(
    run: Run, group: LinearGroup, weights: Sequence[Weight], schemes: list[Scheme]
) -> Candidates:
    """Round an embedding, a head, or both in one tied weight."""
    if run.workload is None:
        stats = embedding_statistics(run)
        known = [EmbeddingPart(TASK, stats)]
    else:
        streams = parts.embedding_parts(run, group.name)
        stats = parts.summed_embedding(run, streams)
        known = [EmbeddingPart(task, own) for task, own in streams.items()]
    recipe = run.recipe
    options = RoundingOptions(run.damping, recipe.passes)
    candidates: Candidates = []
    for weight in weights:
        head = weight.kind == "head" or weight.head is not None
        lookup = weight.kind == "embedding"
        original = run.source.read(weight.name).float()
        plain = [scheme for scheme in schemes if not scheme.is_composite]
        layouts = [scheme.segments(weight.in_features) for scheme in plain]
        hessian = embedding_hessian(stats, head, lookup)
        matrix = embedding_matrix(original, known, head, lookup, recipe.gradients, recipe.seed)
        rounded = round_group({weight.name: original}, hessian, layouts, options)
        for (name, index), value in rounded.items():
            candidates.append((name, [str(plain[index])], value, [matrix]))
        expected = [EmbeddingPart(part.task, part.statistics.expected()) for part in known]
        matrix = embedding_matrix(original, expected, head, lookup, recipe.gradients, recipe.seed)
        for scheme in schemes:
            if scheme.rows:
                price = row_prices(stats.expected(), head, lookup)
                split = round_rows(original, hessian, scheme, price, options)
                candidates.append((weight.name, [str(scheme)], split, [matrix]))
    return candidates


def embedding_hessian(stats: EmbeddingStatistics, head: bool, lookup: bool) -> Tensor:
    """One Hessian [D, D] for all rows of an embedding: the average row's.

    As a head, row v costs variance_v h h^T; as an embedding, frequency_v times the gradient's
    second moment.
    """
    rows = len(stats.variance)
    hessian = torch.zeros_like(stats.head_input)
    if head:
        hessian += stats.head_input * (stats.variance.sum() / rows)
    if lookup:
        lookups = float(stats.frequency.sum()) / max(stats.tokens, 1)  # per term of the loss
        hessian += torch.diag(stats.gradient * lookups) / rows
    return hessian


def row_prices(stats: EmbeddingStatistics, head: bool, lookup: bool) -> Tensor:
    """What an error in each row of an embedding costs, float32 [V], relative to each other: how
    often its token is written, and read."""
    price = torch.zeros(len(stats.variance))
    if head:
        price += stats.variance * stats.head_input.diagonal().mean()
    if lookup:
        price += stats.frequency / max(stats.tokens, 1) * stats.gradient.mean()
    return price


def _matrices(run: Run, name: str) -> tuple[Tensor, ...]:
    """The matrices [N, K] of a weight: several of a stack."""
    weight = ordered_weight(run, name)
    return weight.unbind(0) if weight.dim() == 3 else (weight,)
