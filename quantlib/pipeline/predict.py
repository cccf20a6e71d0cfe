"""Sensitivities without measuring everything: `quantlib measure --predict METHOD`.

    rows   every weight is rounded in every scheme, but only some of its rows (`predict_rows.py`);
           what rounding its inputs costs is computed of all of them, as exact rows multiply them
    ridge  a tenth of the linear groups is measured in full; a regression on plain facts predicts
           the rest (`predict.py`)
    graph  likewise, by the graph network (`predict_graph.py`)

Embeddings and heads have many rows that are rounded alike, so they are sampled by rows whatever the
method; what is not a linear (stacks of experts, convolutions) is measured. What the bank already
has is used and not predicted again. A plan made from such a table is rounded when it is applied
(`measure.measure_plan`), in the very codes that measuring everything would have given it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from quantlib.calibration.statistics import EmbeddingStatistics, MatrixStatistics
from quantlib.checkpoint.provenance import digest
from quantlib.errors import UsageError
from quantlib.formats.activation import ActivationSegment, fake_quantize
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize
from quantlib.models.rows import LinearGroup, Weight
from quantlib.pipeline.calibrate import embedding_statistics
from quantlib.pipeline.measure import (
    embedding_hessian,
    entry_key,
    is_measured,
    measure_groups,
    ordered_statistics,
    ordered_weight,
    sensitivity,
)
from quantlib.pipeline.run import Run
from quantlib.pipeline.scoring import together
from quantlib.rounding import RoundingOptions, round_group
from quantlib.rounding.hessian import damped, inverse_factor
from quantlib.search import scores
from quantlib.search.gnn import ColumnGraph, column_graph
from quantlib.search.predict import Example, Ridge, spread_of
from quantlib.search.predict_graph import Taught, teach
from quantlib.search.predict_rows import RowSample, draw_rows, embedding_rows, linear_rows
from quantlib.search.sensitivity import Sensitivity

METHODS = ("rows", "ridge", "graph")
ROWS = 64
"""Rows that are drawn of every linear: as many as are rounded together anyway."""
EMBEDDING_ROWS = 1024
SHARE = Fraction(1, 10)
"""Of the linear groups of each place in a block, the part that ridge and graph have measured."""
KIND = "predicted"
"""Of units in the work directory, and the entry of the table's provenance that names the method."""
PREDICTION_VERSION = 1
"""Raise when predictions come out differently: old ones are then made again."""

Scores = dict[str, tuple[float, float]]
"""Scheme -> (loss, its standard error)."""


def predicted_table(run: Run, method: str) -> Sensitivity:
    """The sensitivity table, measured in part. Statistics must be there.

    Raises UsageError where predictions cannot be had: see `check`.
    """
    check(run, method)
    linear = [group for group in run.model_map.groups if group.kind == "linear"]
    vocabulary = [g for g in run.model_map.groups if g.kind in ("embedding", "head")]
    others = [g for g in run.model_map.groups if g not in linear and g not in vocabulary]
    learns = method != "rows"
    measure_groups(run, [*others, *(spread_over(linear, SHARE) if learns else ())])
    found = _sampled(run, vocabulary if learns else [*vocabulary, *linear])
    if learns:
        found |= learned(run, linear, method)
    table = sensitivity(run, found)
    return replace(table, provenance={**table.provenance, KIND: method})


def check(run: Run, method: str) -> None:
    """Raise UsageError for an unknown method, and where a loss is more than a Hessian says, or a
    candidate more than one matrix."""
    if method not in METHODS:
        raise UsageError(f"--predict {method}: choose one of {', '.join(METHODS)}")
    candidates = [scheme for found in run.candidates.values() for scheme in found]
    if run.workload is not None:
        reason = "this model is calibrated as a whole, on several tasks"
    elif not run.recipe.gradients:
        reason = "scores without gradients are relative, and do not add up over parts of a weight"
    elif method != "rows" and any(scheme.activation.rounds for scheme in candidates):
        reason = f"{method} predicts what weights lose, and some candidates round inputs too"
    elif any(scheme.is_composite for scheme in candidates):
        reason = "some candidates are several matrices, and their rows are not independent"
    elif run.recipe.rows:
        reason = "mixtures of rows are put together from what was measured of every row"
    elif method != "rows" and any(scheme.wide for scheme in candidates):
        reason = f"{method} predicts uniform formats, and some candidates have wider columns"
    else:
        return
    raise UsageError(f"--predict {method} cannot be used here: {reason}; measure without it")


def spread_over(groups: Sequence[LinearGroup], share: Fraction) -> list[LinearGroup]:
    """Evenly spaced groups of each place in a block, at least two where there are two."""
    places: dict[str, list[LinearGroup]] = {}
    for group in groups:
        places.setdefault(group.name.removeprefix(group.block or ""), []).append(group)
    chosen = []
    for alike in places.values():
        count = min(len(alike), max(2, round(len(alike) * share)))
        at = torch.linspace(0, len(alike) - 1, count).round().int().tolist()
        chosen += [alike[index] for index in at]
    return chosen


def _sampled(run: Run, groups: Sequence[LinearGroup]) -> dict[str, Scores]:
    """Weight -> its losses by a sample of rows, kept in the work directory group by group."""
    keys = {g.name: run.work.key(KIND, group=g.name, inputs=_inputs(run, g)) for g in groups}
    wanted = [group for group in groups if not is_measured(run, group)]
    missing = [group for group in wanted if not run.work.has(keys[group.name])]
    with run.stage("predict", len(missing)) as progress:
        for group in missing:
            found = by_rows(run, group)
            values = {
                name: {s: list(pair) for s, pair in own.items()} for name, own in found.items()
            }
            run.work.commit(keys[group.name], KIND, {}, values)
            progress.tick(group.name)
    return {
        name: {scheme: (float(loss), float(error)) for scheme, (loss, error) in own.items()}
        for group in wanted
        for name, own in run.work.unit(keys[group.name]).values.items()
    }


def _inputs(run: Run, group: LinearGroup) -> str:
    schemes = [[name, *map(str, run.candidates[name])] for name in group.members]
    settings = [ROWS, EMBEDDING_ROWS, PREDICTION_VERSION, run.recipe.seed]
    return digest([run.rounding_hash, settings, schemes])


def by_rows(run: Run, group: LinearGroup) -> dict[str, Scores]:
    """Weight of a group -> its losses in all candidates, from a sample of its rows."""
    if group.kind == "linear":
        return _linears_by_rows(run, group)
    weights = [run.model_map.weight(name) for name in group.members]
    return {weight.name: _embedding_by_rows(run, weight) for weight in weights}


def _linears_by_rows(run: Run, group: LinearGroup) -> dict[str, Scores]:
    statistics = ordered_statistics(run, group).matrices[0]
    schemes = run.candidates[group.members[0]]
    samples = {name: _draw(run, name, statistics, schemes) for name in group.members}
    parts = {name: part for name, (_, part) in samples.items() if len(part)}
    found: dict[str, Scores] = {
        name: {str(scheme): (0.0, 0.0) for scheme in schemes} for name in group.members
    }
    for (name, index), error in _errors(run, parts, statistics.hessian, schemes).items():
        sample = samples[name][0]
        own = _of_rows(statistics, name, sample)
        losses = linear_rows(error, own.hessian, statistics.fisher[name][sample.rows])
        spread = scores.relative_error(error, own, name, _generator(run))
        found[name][str(schemes[index])] = _score(sample, losses, spread)
    return _with_inputs(run, found, statistics)


def _with_inputs(
    run: Run, found: Mapping[str, Scores], statistics: MatrixStatistics
) -> dict[str, Scores]:
    """The losses of weights, and what rounding their inputs adds to them.

    Inputs are multiplied by exact weights here, by rounded ones where everything is measured: what
    rounding weights changes in the price of an input's error is of second order.
    """
    errors: dict[tuple[ActivationSegment, ...], Tensor] = {}
    total: dict[str, Scores] = {}
    x = statistics.sample_x.float()
    for name, own in found.items():
        weight = ordered_weight(run, name)
        added: dict[tuple[ActivationSegment, ...], float] = {(): 0.0}
        total[name] = {}
        for scheme, (loss, spread) in own.items():
            segments = Scheme.parse(scheme).activations(x.shape[1])
            if segments not in errors:
                errors[segments] = fake_quantize(x, segments) - x
            if segments not in added:
                added[segments] = scores.activation_score(
                    weight, errors[segments], statistics, name
                )
            total[name][scheme] = together(loss, spread, added[segments])
    return total


def _draw(
    run: Run, name: str, statistics: MatrixStatistics, schemes: Sequence[Scheme]
) -> tuple[RowSample, Tensor]:
    """Rows of a linear, and what they hold [R, K]; rows are as large as rounding them to nearest is
    bad."""
    weight = ordered_weight(run, name)
    diagonal = statistics.hessian.diagonal()
    sizes = linear_rows(_plain_error(weight, schemes), diagonal, statistics.fisher[name])
    sample = draw_rows(sizes, ROWS, _generator(run))
    return sample, weight[sample.rows]


def _embedding_by_rows(run: Run, weight: Weight) -> Scores:
    statistics = embedding_statistics(run)
    head = weight.kind == "head" or weight.head is not None
    lookup = weight.kind == "embedding"
    schemes = run.candidates[weight.name]
    value = run.source.read(weight.name).float()
    plain = _plain_error(value, schemes)
    sizes = embedding_rows(plain, statistics, head, lookup, diagonal=True)
    sample = draw_rows(sizes, EMBEDDING_ROWS, _generator(run))
    if not len(sample.rows):
        return {str(scheme): (0.0, 0.0) for scheme in schemes}
    own = _of_vocabulary(statistics, sample)
    hessian = embedding_hessian(statistics, head, lookup)
    errors = _errors(run, {weight.name: value[sample.rows]}, hessian, schemes)
    found: Scores = {}
    for (_, index), error in errors.items():
        losses = embedding_rows(error, own, head, lookup)
        spread = 0.0
        if len(own.sample_h):
            weighed = replace(own, variance=own.variance * sample.share.float())
            spread = scores.embedding_relative_error(error, weighed, _generator(run))
        found[str(schemes[index])] = _score(sample, losses, spread)
    return found


def _errors(
    run: Run, parts: Mapping[str, Tensor], hessian: Tensor, schemes: Sequence[Scheme]
) -> dict[tuple[str, int], Tensor]:
    """(weight, index of the scheme) -> rounding error [R, K] of the rows `parts`."""
    if not parts:
        return {}
    columns = next(iter(parts.values())).shape[1]
    options = RoundingOptions(run.damping, run.recipe.passes)
    layouts = [scheme.segments(columns) for scheme in schemes]
    different = list(dict.fromkeys(layouts))  # others differ in how they round inputs
    rounded = round_group(parts, hessian, different, options)
    errors = {key: dequantize(value) - parts[key[0]] for key, value in rounded.items()}
    return {
        (name, index): errors[name, different.index(layout)]
        for name in parts
        for index, layout in enumerate(layouts)
    }


def _plain_error(weight: Tensor, schemes: Sequence[Scheme]) -> Tensor:
    """Of rounding to nearest in the candidate of middling width: Q - W [N, K]."""
    by_bits = sorted(schemes, key=lambda scheme: scheme.segments(weight.shape[1])[0].format.bits)
    middle = by_bits[len(by_bits) // 2]
    return dequantize(quantize_rtn(weight, middle.segments(weight.shape[1]))) - weight


def _score(sample: RowSample, losses: Tensor, spread: float) -> tuple[float, float]:
    """Loss of the whole, and its error: of the rows that were drawn, and of the windows that were
    seen (`spread`, relative)."""
    loss, error = sample.total(losses)
    return loss, math.hypot(error, spread * loss)


def _of_rows(statistics: MatrixStatistics, name: str, sample: RowSample) -> MatrixStatistics:
    """The statistics of some outputs of a linear, weighted to count for all of them."""
    gradients = statistics.sample_g[name][:, sample.rows] * sample.share.sqrt().float()
    return replace(statistics, sample_g={name: gradients})


def _of_vocabulary(statistics: EmbeddingStatistics, sample: RowSample) -> EmbeddingStatistics:
    rows = sample.rows
    return replace(
        statistics, frequency=statistics.frequency[rows], variance=statistics.variance[rows]
    )


def _generator(run: Run) -> torch.Generator:
    return torch.Generator().manual_seed(run.recipe.seed)


def learned(run: Run, groups: Sequence[LinearGroup], method: str) -> dict[str, Scores]:
    """Weight -> its losses, predicted by what is learned from the groups that are in the bank."""
    rest = [group for group in groups if not is_measured(run, group)]
    if not rest:
        return {}
    known = [group for group in groups if is_measured(run, group)]
    with run.stage("predict", len(groups)) as progress:
        examples: dict[str, Example] = {}
        for group in known:
            for name, graph in graphs(run, group).items():
                losses = torch.tensor(_measured(run, name), dtype=torch.float64)
                if bool((losses > 0).all()):
                    examples[name] = Example(graph, losses)
            progress.tick(group.name)
        model: Ridge | Taught = Ridge.fit(examples) if method == "ridge" else teach(examples)
        relative = spread_of(model.sigma)
        found: dict[str, Scores] = {}
        for group in rest:
            for name, graph in graphs(run, group).items():
                losses = model.predict(graph)
                pairs = zip(run.candidates[name], losses.tolist(), strict=True)
                found[name] = {str(scheme): (loss, relative * loss) for scheme, loss in pairs}
            progress.tick(group.name)
    run.progress.say(f"predicted by {method}: losses of {len(found)} weights to {relative:.0%}")
    return found


def graphs(run: Run, group: LinearGroup) -> dict[str, ColumnGraph]:
    """Weight of a group of linears -> the graph of its columns in all candidates, on a sample of
    its rows."""
    statistics = ordered_statistics(run, group).matrices[0]
    hessian = damped(statistics.hessian, run.damping)
    factor = inverse_factor(hessian)
    scale = 0.5 * statistics.hessian.diagonal().double().mean()
    found = {}
    for name in group.members:
        schemes = run.candidates[name]
        sample, weight = _draw(run, name, statistics, schemes)
        prices = scale * statistics.fisher[name][sample.rows].double() * sample.share
        formats = [scheme.segments(weight.shape[1])[0].format for scheme in schemes]
        found[name] = column_graph(weight, hessian, factor, prices, formats)
    return found


def _measured(run: Run, name: str) -> list[float]:
    entries = [run.bank.entry(entry_key(run, name, str(s))) for s in run.candidates[name]]
    return [entry.extra["loss"] for entry in entries]
