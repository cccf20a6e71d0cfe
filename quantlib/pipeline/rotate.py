"""The rotate stage: the bases a model is changed to before anything else is measured.

The norms' gains are folded, moments (and, for prices of errors, gradients) are taken on the folded
model, and what comes of them is kept as one unit of the work directory. From then on the run's
source is the rotated one, and no later stage knows: it calibrates, measures and writes what it
reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from quantlib.calibration.stream import BlockStream
from quantlib.checkpoint.provenance import digest
from quantlib.checkpoint.tensorfile import read_tensors, tensor_content
from quantlib.errors import TransformError
from quantlib.formats.scheme import Scheme
from quantlib.kernels.kv_format import KvFormat, SideFormat
from quantlib.models import skeleton
from quantlib.models.source import Source as ModelSource
from quantlib.pipeline.bytecount import surrounding_bytes
from quantlib.pipeline.calibrate import calibrate, group_statistics, statistics_key
from quantlib.pipeline.run import Run
from quantlib.recipe import Recipe
from quantlib.transforms.apply import RotatedSource
from quantlib.transforms.bases import (
    HIGH_SHARE,
    Source,
    hidden_orders,
    high_columns,
    resq_bases,
    weighted_bases,
)
from quantlib.transforms.binding import wire
from quantlib.transforms.energies import fisher_of
from quantlib.transforms.mixing import head_cuts, output_order, rotation_of
from quantlib.transforms.moments import Moments, merge, stream_moments
from quantlib.transforms.rotation import Rotation

KIND = "rotation"
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


def rotated(run: Run) -> Run:
    """The run on the source in the basis that the recipe asks for; itself, when it asks for none.

    Raises ModelError for a model whose wiring is not known, TransformError where the residual
    stream cannot be rotated.
    """
    if run.recipe.rotation == "none":
        return run
    key = _key(run)
    if not run.work.has(key):
        check_rotatable(run.source, run.recipe)
        tensors, settings = _find(run).to_tensors()
        content = tensor_content(tensors)
        run.work.commit(key, KIND, {f"{KIND}/{key[:12]}.safetensors": content}, settings)
    unit = run.work.unit(key)
    rotation = Rotation.from_tensors(read_tensors(run.work.file(key)), unit.values)
    run.progress.say(f"rotated: {run.recipe.rotation} bases, seed {run.recipe.seed}")
    return on_source(run, RotatedSource.of(run.source, rotation))


def on_source(run: Run, source: RotatedSource) -> Run:
    """The same run on another form of its source."""
    other = replace(run, source=source)
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


def _key(run: Run) -> str:
    recipe = run.recipe
    kv = recipe.kv if recipe.kv_bits is None else "allocated"
    wanted = [recipe.rotation, kv, [str(share) for share in wide_shares(recipe)]]
    inputs = digest([run.statistics_hash, wanted, ROTATION_VERSION])
    return run.work.key(KIND, inputs=inputs)


def _find(run: Run) -> Rotation:
    folded = _folded(run)
    assert isinstance(folded.source, RotatedSource)
    wiring, shares = folded.source.wiring, wide_shares(run.recipe)
    if run.recipe.rotation == "gradients":
        calibrate(folded)
    moments = _moments(folded)
    key, value = _sides(run.recipe)
    if run.recipe.rotation == "pca":
        bases, orders = resq_bases(moments, wiring), {}
    else:
        source = _weighed(folded, moments)
        share = max(shares, default=HIGH_SHARE)
        bases = weighted_bases(source, share, value.wide or None, key.wide or None)
        # what is wide with every scheme that has wide columns
        orders = hidden_orders(source, shares[0]) if shares else {}
    head_dim = wiring.attentions[0].head_dim
    rotation = rotation_of(
        bases,
        wiring,
        run.recipe.seed,
        shares,
        value_cuts=[*head_cuts(head_dim, shares), *_starts(value, head_dim)],
        key_cuts=_starts(key, head_dim),
        mixer="random" if run.recipe.rotation == "pca" else "hadamard",
        hidden_order=orders,
        hidden_high={
            name: min(high_columns(len(order), shares[0]), len(order) - 1)
            for name, order in orders.items()
        },
    )
    if run.recipe.rotation == "gradients":
        _forget_statistics(folded)
    return rotation


def _folded(run: Run) -> Run:
    """The run on the source with its norms folded, and on as many windows as bases need."""
    source = RotatedSource.of(run.source, Rotation(fold_norms=True))
    folded = on_source(run, source)
    width = max((stream.width for stream in source.wiring.streams), default=0)
    count = min(len(run.windows), -(-_TOKENS * width // run.windows.shape[1]))
    if count < len(run.windows):
        chosen = run.windows[torch.linspace(0, len(run.windows) - 1, count).round().long()]
        fewer = {"windows": count, "probe_windows": 1}
        folded.recipe = run.recipe.model_copy(update=fewer)
        folded.all_windows = torch.cat([chosen[:1], chosen])  # the first is the probes'
    return folded


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
    priced = folded.recipe.rotation == "gradients"
    groups = [g.name for g in folded.model_map.groups if g.block is not None and priced]
    return Source(
        moments,
        folded.source.wiring,
        folded.source.read,
        fisher=fisher_of(group_statistics(folded, name) for name in groups) if priced else None,
        weighted=_WEIGHTED if priced else 0.0,
        rounded={weight.name for weight in folded.model_map.weights},
    )


def _moments(folded: Run) -> Moments:
    """Of the folded model, token-weighted where calibration left gradients."""
    assert isinstance(folded.source, RotatedSource)
    weighted = folded.recipe.rotation == "gradients"

    def weights(group: str) -> list[Tensor]:
        return [matrix.token_weight for matrix in group_statistics(folded, group).matrices]

    stream = BlockStream(folded.source, folded.model_map)
    with folded.stage("rotate", len(folded.model_map.blocks)) as progress:
        return merge(
            stream_moments(
                stream,
                folded.model_map,
                folded.source.wiring,
                folded.windows,
                weights if weighted else None,
                tick=progress.tick,
            )
        )


def _forget_statistics(folded: Run) -> None:
    """The folded model's statistics have served: the rotated model gets its own."""
    groups = [group.name for group in folded.model_map.groups if group.block is not None]
    for key in [statistics_key(folded, name) for name in (*groups, "embedding")]:
        if folded.work.has(key):
            path = folded.work.file(key)
            folded.work.forget(key)
            path.unlink(missing_ok=True)
