"""The rotate stage: the bases a model is changed to before anything else is measured.

The norms' gains are folded, moments (and, for prices of errors, gradients) are taken on the folded
model, and what comes of them is kept as units of the work directory: the directions by importance,
and the rotation that mixes them. Where biases can take the means of inputs, those are found first,
on the model with nothing but its norms folded. From then on the run's source is the rotated one,
and no later stage knows: it calibrates, measures and writes what it reads.

Where gradients were taken, calibration has nothing left to do: the folded model's statistics are
turned into the rotated one's (`transforms.turned`), instead of another pass over all windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from quantlib.calibration.stream import BlockStream
from quantlib.checkpoint.provenance import digest
from quantlib.checkpoint.tensorfile import read_tensors, tensor_content
from quantlib.errors import TransformError, UsageError
from quantlib.formats.scheme import Scheme
from quantlib.kernels.kv_format import KvFormat, SideFormat
from quantlib.models import skeleton
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source as ModelSource
from quantlib.pipeline.bytecount import surrounding_bytes
from quantlib.pipeline.calibrate import (
    EMBEDDING,
    calibrate,
    calibrated_groups,
    embedding_statistics,
    group_statistics,
    keep_embedding,
    keep_statistics,
    statistics_key,
    statistics_keys,
)
from quantlib.pipeline.parts import group_parts, summed_group, whole_moments
from quantlib.pipeline.run import Run
from quantlib.recipe import Recipe
from quantlib.transforms.apply import RotatedSource
from quantlib.transforms.bases import (
    HIGH_SHARE,
    Bases,
    Source,
    hidden_orders,
    high_columns,
    resq_bases,
    weighted_bases,
)
from quantlib.transforms.binding import wire
from quantlib.transforms.energies import fisher_of
from quantlib.transforms.means import means_of, takes_means
from quantlib.transforms.mixing import head_cuts, output_order, rotation_of
from quantlib.transforms.moments import Moments, merge, stream_moments
from quantlib.transforms.rotation import Rotation
from quantlib.transforms.turned import turned_embedding, turned_group, turned_outputs, turns

KIND, DIRECTIONS, MEANS = "rotation", "directions", "means"
ROTATION_VERSION = 5
"""Raise when bases come out differently: models are then rotated, and measured, again."""
_WEIGHTED = 0.5
"""Of token-weighted moments, where there are gradients: those alone follow the calibration text's
few heaviest tokens and cost accuracy on other text."""
_TOKENS = 16
"""For every direction of the residual stream, that bases are found on, if there are so many: enough
for second moments, where calibration asks for more because its Hessians are inverted."""

_FINEST = SideFormat.parse("int4g16h16")


def check_rotatable(source: ModelSource, recipe: Recipe) -> None:
    """Raise ModelError for a model whose wiring is not known, and TransformError where the residual
    stream cannot be rotated, if the recipe asks for it."""
    if recipe.rotation == "none":
        return
    streams = wire(skeleton.build(source)).streams
    obstacle = next((stream.obstacle for stream in streams if stream.obstacle), None)
    if obstacle:
        raise TransformError(obstacle)


def check_rounded(source: ModelSource, model_map: ModelMap) -> None:
    """Raise UsageError when a linear that reads or writes a rotated stream is kept as it is: bases
    are found from what rounding costs each of them."""
    rounded = {weight.name for weight in model_map.weights}
    wiring = wire(skeleton.build(source))
    inside = tuple(f"{block}." for block in wiring.blocks)
    readers = (r for stream in wiring.streams for norm in stream.norms for r in norm.readers)
    writers = (w for stream in wiring.streams for w in stream.writers)
    for name in (matrix.weight for matrix in (*readers, *writers)):
        if name.startswith(inside) and name not in rounded:
            raise UsageError(
                f"{name} is kept as it is, and bases are found from what rounding costs every "
                "linear of this model: leave out --keep, or the rotation"
            )


def rotated(run: Run, seed: int | None = None) -> Run:
    """The run on the source in the basis that the recipe asks for; itself, when it asks for none.

    seed: of the mixing of directions, where several are compared; the recipe's by default. What
    does not depend on it is then kept for the others.

    Raises ModelError for a model whose wiring is not known, TransformError where the residual
    stream cannot be rotated.
    """
    if run.recipe.rotation == "none":
        return run
    mixed = run.recipe.seed if seed is None else seed
    key = _key(run, mixed)
    if not run.work.has(key):
        check_rotatable(run.source, run.recipe)
        tensors, settings = _find(run, mixed).to_tensors()
        content = tensor_content(tensors)
        run.work.commit(key, KIND, {f"{KIND}/{key[:12]}.safetensors": content}, settings)
    unit = run.work.unit(key)
    rotation = Rotation.from_tensors(read_tensors(run.work.file(key)), unit.values)
    run.progress.say(f"rotated: {run.recipe.rotation} bases, seed {mixed}")
    other = on_source(run, RotatedSource.of(run.source, rotation))
    found, wanted = calibrated_groups(other)
    if found < wanted and run.recipe.rotation == "gradients":
        folded = _folded(run)
        if _turns(folded):
            _turn_statistics(folded, other)
        if seed is None:
            _forget_statistics(folded)
    return other


def on_source(run: Run, source: RotatedSource) -> Run:
    """The same run on another form of its source."""
    other = replace(run, source=source, _stream_hashes={})
    if run.workload is None:
        other.all_windows = run.all_windows
    other.orders = _orders(source, wide_shares(run.recipe))
    other.extra_bytes = surrounding_bytes(source.rotation.online(source.wiring), other.orders)
    return other


def online_rotation(run: Run) -> Rotation | None:
    """What a checkpoint must apply while it runs, None when the model is not rotated."""
    if not isinstance(run.source, RotatedSource):
        return None
    return run.source.rotation.online(run.source.wiring)


def _orders(source: RotatedSource, shares: Sequence[Fraction]) -> dict[str, Tensor]:
    """Weight -> the order int64 [K] in which it reads its input: output projections of attentions
    with rotated values read the heads' low columns first (`transforms.mixing.output_order`)."""
    return {
        a.output.weight: output_order(a, head_cuts(a.head_dim, shares))
        for a in source.wiring.attentions
        if shares and a.name in source.rotation.value
    }


def wide_shares(recipe: Recipe) -> list[Fraction]:
    """Shares of wide columns among the candidates, ascending."""
    parsed = map(Scheme.parse, recipe.schemes)
    return sorted({scheme.high.share for scheme in parsed if scheme.high})


def mixing_block(recipe: Recipe) -> int | None:
    """Columns that are mixed with each other, where inputs are rounded in groups of scales that are
    powers of two: what stands out in one group is its own affair, and mixed into others it would
    cost them up to a bit. None: as many as are of one width."""
    activations = [Scheme.parse(name).activation for name in recipe.schemes]
    groups = [one.group for one in activations if one.is_mx]
    return min(groups, default=None)


def _key(run: Run, seed: int | None = None) -> str:
    """Of the rotation, or, without a seed, of the directions it mixes."""
    recipe = run.recipe
    kv = recipe.kv if recipe.kv_bits is None else "allocated"
    wanted: list[Any] = [recipe.rotation, kv, [str(share) for share in wide_shares(recipe)]]
    block = mixing_block(recipe)
    wanted += [] if seed is None or block is None else [block]
    wanted += (
        [MEANS]
        if recipe.rotation != "pca" and takes_means(wire(skeleton.build(run.source)))
        else []
    )
    inputs = digest([run.statistics_hash, wanted, ROTATION_VERSION])
    if seed is None:
        return run.work.key(DIRECTIONS, inputs=inputs)
    return run.work.key(KIND, inputs=inputs, seed=seed)


def _find(run: Run, seed: int) -> Rotation:
    folded = _folded(run)
    assert isinstance(folded.source, RotatedSource)
    wiring, shares = folded.source.wiring, wide_shares(run.recipe)
    key, value = _sides(run.recipe)
    bases, orders = _directions(run, folded)
    head_dim = wiring.attentions[0].head_dim
    rotation = rotation_of(
        bases,
        wiring,
        seed,
        shares,
        value_cuts=[*head_cuts(head_dim, shares), *_starts(value, head_dim)],
        key_cuts=_starts(key, head_dim),
        mixer="random" if run.recipe.rotation == "pca" else "hadamard",
        hidden_order=orders,
        hidden_high={
            name: min(high_columns(len(order), shares[0]), len(order) - 1)
            for name, order in orders.items()
        },
        block=mixing_block(run.recipe),
    )
    return replace(rotation, means=folded.source.rotation.means)


def _directions(run: Run, folded: Run) -> tuple[Bases, dict[str, Tensor]]:
    """Directions by importance, and orders of hidden channels: whatever the seed."""
    unit = _key(run)
    if not run.work.has(unit):
        bases, orders = _found(folded)
        named = {"residual": bases.residual, "value": bases.value, "key": bases.key}
        tensors = {
            f"{kind}|{name}": value
            for kind, own in (named | {"order": orders}).items()
            for name, value in own.items()
        }
        file = f"{KIND}/{unit[:12]}.safetensors"
        run.work.commit(unit, DIRECTIONS, {file: tensor_content(tensors)})
    found: dict[str, dict[str, Tensor]] = {"residual": {}, "value": {}, "key": {}, "order": {}}
    for name, value in read_tensors(run.work.file(unit)).items():
        kind, _, place = name.partition("|")
        found[kind][place] = value
    return Bases(found["residual"], found["value"], found["key"]), found["order"]


def _found(folded: Run) -> tuple[Bases, dict[str, Tensor]]:
    assert isinstance(folded.source, RotatedSource)
    recipe, wiring = folded.recipe, folded.source.wiring
    if recipe.rotation == "gradients":
        calibrate(folded, turned_outputs(wiring) if _turns(folded) else ())
    moments = _moments(folded)
    if recipe.rotation == "pca":
        return resq_bases(moments, wiring), {}
    shares, (key, value) = wide_shares(recipe), _sides(recipe)
    source = _weighed(folded, moments)
    share = max(shares, default=HIGH_SHARE)
    bases = weighted_bases(source, share, value.wide or None, key.wide or None)
    # what is wide with every scheme that has wide columns
    return bases, hidden_orders(source, shares[0]) if shares else {}


def _folded(run: Run) -> Run:
    """The run on the source with its norms folded and its means in biases; on as many windows as
    bases need, where nothing else is made of its statistics."""
    folded = on_source(run, RotatedSource.of(run.source, Rotation(fold_norms=True)))
    means = _means(run, folded)
    if means:
        changed = Rotation(fold_norms=True, means=means)
        folded = on_source(run, RotatedSource.of(run.source, changed))
    if run.workload is not None:
        return folded
    chosen = run.windows[_spread(folded)]
    if len(chosen) < len(run.windows) and not _turns(folded):
        fewer = {"windows": len(chosen), "probe_windows": 1}
        folded.recipe = run.recipe.model_copy(update=fewer)
        folded.all_windows = torch.cat([chosen[:1], chosen])  # the first is the probes'
    return folded


def _means(run: Run, folded: Run) -> dict[str, Tensor]:
    """What biases take out of the inputs of linears; ResQ itself (pca) leaves it in."""
    assert isinstance(folded.source, RotatedSource)
    wiring = folded.source.wiring
    if run.recipe.rotation == "pca" or not takes_means(wiring):
        return {}
    unit = run.work.key(MEANS, inputs=digest([run.statistics_hash, ROTATION_VERSION]))
    if not run.work.has(unit):
        inputs = _plain_moments(folded).inputs
        found = means_of({name: one.mean for name, one in inputs.items()}, wiring)
        file = f"{KIND}/{unit[:12]}.safetensors"
        run.work.commit(unit, MEANS, {file: tensor_content(found)})
    return read_tensors(run.work.file(unit))


def _plain_moments(folded: Run) -> Moments:
    if folded.workload is not None:
        return whole_moments(folded)
    assert isinstance(folded.source, RotatedSource)
    stream, wiring = BlockStream(folded.source, folded.model_map), folded.source.wiring
    with folded.stage("rotate", len(folded.model_map.blocks)) as progress:
        windows = folded.windows[_spread(folded)]
        moments = stream_moments(stream, folded.model_map, wiring, windows, tick=progress.tick)
        return merge(moments)


def _turns(folded: Run) -> bool:
    """Whether calibration of the folded model spares that of the rotated one."""
    assert isinstance(folded.source, RotatedSource)
    if folded.workload is not None:
        return False
    return folded.recipe.rotation == "gradients" and turns(folded.source.wiring)


def _spread(folded: Run) -> Tensor:
    """Indices of the windows that bases are found on, int64: evenly spread, as many as they need.
    All, where experts see other tokens in each: their token weights are of all windows."""
    assert isinstance(folded.source, RotatedSource)
    count, length = folded.windows.shape
    if not _turns(folded) or all(group.kind != "experts" for group in folded.model_map.groups):
        width = max((stream.width for stream in folded.source.wiring.streams), default=0)
        needed = min(count, -(-_TOKENS * width // length))
        return torch.linspace(0, count - 1, needed).round().long()
    return torch.arange(count)


def _sides(recipe: Recipe) -> tuple[SideFormat, SideFormat]:
    """The formats that bases of keys and values are made for; where each layer gets its own, one
    with the finest groups that there are."""
    if recipe.kv_bits is not None:
        return _FINEST, _FINEST
    kv = KvFormat.parse(recipe.kv)
    return kv.key, kv.value


def _starts(side: SideFormat, head_dim: int) -> list[int]:
    """Where the groups of a cached head begin: each has a scale of its own, and columns that differ
    in size should not be mixed into one another's."""
    return [group.start for group in side.groups(head_dim)]


def _weighed(folded: Run, moments: Moments) -> Source:
    """What errors cost: by the energy of weights, or of gradients where the recipe asks for it."""
    assert isinstance(folded.source, RotatedSource)
    priced, whole = folded.recipe.rotation == "gradients", folded.workload is not None
    groups = [g.name for g in folded.model_map.groups if g.block is not None and priced]
    statistics = (
        summed_group(folded, group_parts(folded, name)) if whole else group_statistics(folded, name)
        for name in groups
    )
    return Source(
        moments,
        folded.source.wiring,
        folded.source.read,
        fisher=fisher_of(statistics) if priced else None,
        # records are few: plain moments alone, as of Whisper in bench.quality_w4a4
        weighted=_WEIGHTED if priced and not whole else 0.0,
        rounded={weight.name for weight in folded.model_map.weights},
    )


def _moments(folded: Run) -> Moments:
    """Of the folded model, token-weighted where calibration left gradients block by block."""
    if folded.workload is not None:
        return whole_moments(folded)
    assert isinstance(folded.source, RotatedSource)
    weighted = folded.recipe.rotation == "gradients"
    windows, chosen = folded.windows, _spread(folded)

    def weights(group: str) -> list[Tensor]:
        found = [matrix.token_weight for matrix in group_statistics(folded, group).matrices]
        if len(chosen) == len(windows):
            return found
        return [weight.reshape(len(windows), -1)[chosen].reshape(-1) for weight in found]

    stream = BlockStream(folded.source, folded.model_map)
    with folded.stage("rotate", len(folded.model_map.blocks)) as progress:
        return merge(
            stream_moments(
                stream,
                folded.model_map,
                folded.source.wiring,
                windows[chosen],
                weights if weighted else None,
                tick=progress.tick,
            )
        )


def _turn_statistics(folded: Run, other: Run) -> None:
    """Give the rotated model the folded one's statistics in its own basis, as far as both are
    there."""
    assert isinstance(other.source, RotatedSource)
    found = other.source.changes
    for block in folded.model_map.blocks:
        missing = [
            group.name
            for group in folded.model_map.groups_in(block)
            if folded.work.has(statistics_key(folded, group.name))
            and not other.work.has(statistics_key(other, group.name))
        ]
        keep_statistics(other, [turned_group(group_statistics(folded, n), found) for n in missing])
    embedding = statistics_key(folded, EMBEDDING)
    if folded.work.has(embedding) and not other.work.has(statistics_key(other, EMBEDDING)):
        weights = folded.model_map.weights_in(None)
        table = next((w.name for w in weights if w.kind == "embedding"), "")
        head = next((w.name for w in weights if w.kind == "head" or w.head is not None), "")
        stats = turned_embedding(embedding_statistics(folded), found.get(table), found.get(head))
        keep_embedding(other, stats)


def _forget_statistics(folded: Run) -> None:
    """The folded model's statistics have served: the rotated model has its own."""
    for key in statistics_keys(folded):
        if folded.work.has(key):
            paths = [folded.work.path / name for name in folded.work.unit(key).files]
            folded.work.forget(key)
            for path in paths:
                path.unlink(missing_ok=True)
