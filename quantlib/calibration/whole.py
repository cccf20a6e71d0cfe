"""Statistics of a model that fits in memory as a whole, from streams of samples.

`passes.py` takes a language model apart to calibrate it with one block in memory. A model of
several stacks cannot be taken apart like that: an image enters in the middle of a sentence, an
encoder's output is read by every block of a decoder, and image generation is a path that the
model's own `forward` never takes. Here the model is run as it is. Every linear group is hooked,
a stream says how a sample runs and what the loss is, and one backward pass sends output gradients
to all groups on that path. What comes out are the same `GroupStatistics` and `EmbeddingStatistics`
as those of the passes, by stream, and summed.

Only what a loss depends on leaves statistics. Logits that nobody reads have no gradient and count
for nothing, and a last block of a vision tower whose projector takes an earlier one saw no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlib.calibration.combine import combined
from quantlib.calibration.statistics import GroupStatistics
from quantlib.calibration.streams import Sample, Stream, StreamStatistics, require_seen
from quantlib.calibration.watch import Watcher, Weighting, watched
from quantlib.errors import DataError
from quantlib.models.modelmap import ModelMap

Tick = Callable[[str], None]
"""Called after every sample with a line for the progress bar."""


@dataclass(frozen=True)
class WholeStatistics:
    """streams: by name. total: their sum, every stream's loss times its weight."""

    streams: dict[str, StreamStatistics]
    total: StreamStatistics


def calibrate(
    model: nn.Module,
    model_map: ModelMap,
    streams: Sequence[Stream],
    *,
    seed: int = 0,
    weighting: Weighting = Weighting.TOKEN,
    expert_tokens: int = 1,
    allow_unseen: Sequence[str] = (),
    tick: Tick = lambda _: None,
) -> WholeStatistics:
    """Statistics of every group from all streams.

    expert_tokens: what every expert of a mixture has to see, in all streams together.
    allow_unseen:  fnmatch patterns of groups and experts that no stream need exercise.
    Raises DataError as `collect`, for two streams of one name, and naming the groups and experts
    that no loss depends on, or that saw too little.
    """
    found: dict[str, StreamStatistics] = {}
    for index, stream in enumerate(streams):
        if stream.name in found:
            raise DataError(f"two calibration streams are called {stream.name!r}: rename one")
        own = seed + 15485863 * index
        found[stream.name] = collect(
            model,
            model_map,
            stream,
            seed=own,
            weighting=weighting,
            expert_tokens=expert_tokens,
            tick=tick,
        )
    total = combined(list(found.values()), {stream.name: stream.weight for stream in streams})
    require_seen(total, allow_unseen, expert_tokens)
    return WholeStatistics(found, total)


def collect(
    model: nn.Module,
    model_map: ModelMap,
    stream: Stream,
    *,
    seed: int = 0,
    weighting: Weighting = Weighting.TOKEN,
    expert_tokens: int = 1,
    tick: Tick = lambda _: None,
) -> StreamStatistics:
    """Run all samples of one stream, forward and backward.

    model:         in memory, with the parameters of `model_map`.
    seed:          of sampled labels and tokens.
    expert_tokens: while an expert that this stream runs has seen fewer, samples of the stream's
                   reserve are run too.
    Raises DataError when the stream is empty, when a loss depends on no weight, or when a sample
    names modalities that its stream does not have.
    """
    watcher = Watcher(model_map, seed, weighting)
    labels = torch.Generator().manual_seed(seed)
    terms = 0
    modality = [torch.empty(0, dtype=torch.int64)]
    with _frozen(model), watched(model, model_map, watcher):
        for index, sample in enumerate(_samples(stream, watcher, expert_tokens)):
            watcher.window, watcher.modality = index, _modality(stream, index, sample)
            modality.append(watcher.modality)
            loss = sample.loss(stream.run(model, **sample.inputs), labels)
            if not _sent_back(loss.value, watcher.anchor):
                raise DataError(
                    f"sample {index} of the calibration stream {stream.name!r} has a loss that "
                    "depends on no weight of the model: its run and its loss do not fit"
                )
            terms += loss.terms
            tick(f"{stream.name} {index}")
    if not terms:
        raise DataError(
            f"the calibration stream {stream.name!r} is empty: nothing would be known of what "
            "only this kind of data exercises; give it samples, or leave the stream out"
        )
    return StreamStatistics(
        stream.name,
        terms,
        watcher.window + 1,
        {
            name: GroupStatistics(name, [accumulator.finish() for accumulator in accumulators])
            for name, accumulators in watcher.accumulators.items()
        },
        {name: sums.statistics(terms) for name, sums in watcher.lookups.items()},
        frozenset(watcher.ran),
        stream.modalities,
        torch.cat(modality),
    )


def _samples(stream: Stream, watcher: Watcher, expert_tokens: int) -> Iterator[Sample]:
    """The stream's samples, and those of its reserve while an expert has seen too little."""
    yield from stream.samples
    for sample in stream.reserve:
        if watcher.fewest_expert_tokens() >= expert_tokens:
            return
        yield sample


def _sent_back(loss: Tensor, anchor: Tensor) -> bool:
    """Send the gradient of a loss to all that is watched; whether anything was."""
    if not loss.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(loss, anchor, allow_unused=True)
    return gradient is not None


def _modality(stream: Stream, index: int, sample: Sample) -> Tensor:
    """Of a sample's tokens; empty when it does not say."""
    if sample.modality is None:
        return torch.empty(0, dtype=torch.int64)
    known = len(stream.modalities)
    if not bool(((sample.modality >= 0) & (sample.modality < known)).all()):
        raise DataError(
            f"sample {index} of the calibration stream {stream.name!r} has tokens of modality "
            f"{int(sample.modality.max())}, and the stream names {known} modalities"
        )
    return sample.modality.reshape(-1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient: only outputs are of interest."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
