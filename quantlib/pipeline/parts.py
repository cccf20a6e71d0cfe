"""Statistics of a model that is calibrated as a whole: of every stream apart, and summed.

Every stream is a task. Its statistics are units of their own, so a run that was killed goes on at
its stream, and what one stream adds costs nothing anew for the others. What is rounded under is the
sum: streams count by what a rounding error adds to their loss, relative to its full-precision
value, so that a picture of a thousand tokens does not outvote an answer of three.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.calibration.combine import combined_embedding, combined_group
from quantlib.calibration.objectives import Objective
from quantlib.calibration.paths.route import objective
from quantlib.calibration.statistics import (
    EmbeddingStatistics,
    GroupStatistics,
    MatrixStatistics,
    embedding_from_tensors,
    embedding_to_tensors,
    group_from_tensors,
    group_to_tensors,
)
from quantlib.calibration.streams import StreamStatistics, require_seen
from quantlib.calibration.watch import Weighting
from quantlib.calibration.whole import collect
from quantlib.checkpoint.tensorfile import read_tensors, tensor_content
from quantlib.models import skeleton
from quantlib.pipeline.run import Run
from quantlib.pipeline.shares import component_shares, save_shares, told
from quantlib.transforms.binding import wire
from quantlib.transforms.moments import Moments, moments_of

KIND, STREAM, BASELINE = "statistics", "stream", "baseline"
LEAST_LOSS = 0.05
"""A full-precision loss is never taken to be less, in nats (or half squared errors) per term: the
increase relative to almost nothing, of a task that the model has mastered, would outvote all other
tasks, though no answer changes."""


@dataclass(frozen=True)
class Summary:
    """What is known of a stream without opening its statistics.

    terms, samples:  of its loss, and of itself.
    groups:          name -> (tokens, sum of token weights) of every matrix.
    embeddings:      name -> whether any loss depends on it.
    modalities:      group -> modality -> share of the token weights.
    modality_tokens: modality -> tokens of the language model.
    energies:        name -> sum of squared output gradients (`MatrixStatistics.energy`); {} in
                     summaries of earlier versions.
    """

    name: str
    terms: int
    samples: int
    groups: Mapping[str, list[list[float]]]
    embeddings: Mapping[str, bool]
    ran: list[str]
    modalities: Mapping[str, Mapping[str, float]]
    modality_tokens: Mapping[str, int] = field(default_factory=dict)
    energies: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(found: StreamStatistics) -> Summary:
        """The summary of what a stream left."""
        return Summary(
            found.name,
            found.terms,
            found.samples,
            {n: [[m.tokens, m.weight_sum] for m in g.matrices] for n, g in found.groups.items()},
            {
                n: bool(s.frequency.sum() + s.variance.sum() > 0)
                for n, s in found.embeddings.items()
            },
            sorted(found.ran),
            found.modality_shares(),
            found.modality_tokens(),
            {n: math.fsum(m.energy for m in g.matrices) for n, g in found.groups.items()},
        )

    def without_numbers(self) -> StreamStatistics:
        """Statistics that hold counts alone."""
        empty, felt = torch.empty(0, 0), {True: torch.ones(1), False: torch.zeros(1)}
        return StreamStatistics(
            self.name,
            self.terms,
            self.samples,
            {
                name: GroupStatistics(
                    name, [MatrixStatistics(empty, int(t), float(w)) for t, w in matrices]
                )
                for name, matrices in self.groups.items()
            },
            {
                name: EmbeddingStatistics(felt[seen], empty, empty, empty, empty, empty, self.terms)
                for name, seen in self.embeddings.items()
            },
            frozenset(self.ran),
        )


def calibrate_whole(run: Run) -> None:
    """Make sure that the statistics of every stream, and its full-precision loss, are in the work
    directory. Raises DataError naming what no stream tells anything of."""
    missing = [task for task in run.tasks if not _done(run, task)]
    if missing:
        model = whole_model(run)
        total = sum(len(run.streams.calibration[task]) for task in missing)
        with run.stage("calibrate", total) as progress:
            for task in missing:
                _measure_baseline(run, task, model)
                _calibrate_stream(run, task, model, progress.tick)
    seen = [summary(run, task) for task in run.tasks]
    require_seen(_counts(seen), (), run.recipe.expert_tokens)
    owners = {group.name: group.component for group in run.model_map.groups}
    linear = {name: owner for name, owner in owners.items() if name in seen[0].groups}
    shares = component_shares(linear, seen, stream_weights(run))
    save_shares(run.work.path, shares)
    for line in filter(None, (told(component, found) for component, found in shares.items())):
        run.progress.say(line)


def whole_model(run: Run) -> nn.Module:
    """The full-precision model in memory, float32."""
    model = skeleton.build(run.source)
    skeleton.materialize(model, "", run.source)
    return model


def whole_moments(run: Run) -> Moments:
    """Moments of what linears and attentions read, over the calibration samples of all streams.

    Of models whose samples are arguments of their own forward, without padding.
    """
    model: Any = whole_model(run)
    total = sum(len(run.streams.calibration[task]) for task in run.tasks)
    with run.stage("rotate", total) as progress:
        return moments_of(model, wire(model), _batches(run, model, progress.tick))


def _batches(run: Run, model: nn.Module, tick: Any) -> Iterator[dict[str, Any]]:
    for task in run.tasks:
        for sample in run.streams.stream(task, model).samples:
            yield {name: given for name, given in sample.inputs.items() if name != "use_cache"}
            tick(task)


def summary(run: Run, task: str) -> Summary:
    """What a stream left, in numbers. Raises CheckpointError when it was not calibrated."""
    return Summary(**run.work.unit(_key(run, task, STREAM)).values)


def baseline(run: Run, task: str) -> float:
    """The full-precision model's loss per term on the held-back records of a stream, at least
    LEAST_LOSS."""
    return max(LEAST_LOSS, float(run.work.unit(_baseline_key(run, task)).values["loss"]))


def stream_weights(run: Run) -> dict[str, float]:
    """What one term of a stream counts in the sum: every stream's mean loss, over its
    full-precision value, counts the same."""
    return {task: 1.0 / (summary(run, task).terms * baseline(run, task)) for task in run.tasks}


def group_parts(run: Run, group: str) -> dict[str, GroupStatistics]:
    """Task -> statistics of a linear group."""
    return {
        task: group_from_tensors(group, read_tensors(run.work.file(_key(run, task, group))))
        for task in run.tasks
    }


def embedding_parts(run: Run, group: str) -> dict[str, EmbeddingStatistics]:
    """Task -> statistics of an embedding, or of a head."""
    return {
        task: embedding_from_tensors(read_tensors(run.work.file(_key(run, task, group))))
        for task in run.tasks
    }


def summed_group(run: Run, parts: Mapping[str, GroupStatistics]) -> GroupStatistics:
    """The statistics that a group is rounded under."""
    return combined_group(list(parts.values()), *_scales(run))


def summed_embedding(run: Run, parts: Mapping[str, EmbeddingStatistics]) -> EmbeddingStatistics:
    """The same for an embedding or a head."""
    return combined_embedding(list(parts.values()), *_scales(run))


def parts_there(run: Run) -> tuple[int, int]:
    """How many streams are calibrated, and how many there are."""
    return sum(_done(run, task) for task in run.tasks), len(run.tasks)


def part_keys(run: Run) -> list[str]:
    """Keys of all units of statistics."""
    names = [STREAM, *(group.name for group in run.model_map.groups)]
    return [_key(run, task, name) for task in run.tasks for name in names]


def _scales(run: Run) -> tuple[list[float], list[int]]:
    """Of every stream: the weight of a term, and the number of samples before its first."""
    weights = stream_weights(run)
    samples = [summary(run, task).samples for task in run.tasks]
    return [weights[task] for task in run.tasks], [sum(samples[:i]) for i in range(len(samples))]


def _done(run: Run, task: str) -> bool:
    return run.work.has(_key(run, task, STREAM)) and run.work.has(_baseline_key(run, task))


def _key(run: Run, task: str, name: str) -> str:
    return run.work.key(KIND, name=name, stream=task, inputs=run.stream_hash(task))


def _baseline_key(run: Run, task: str) -> str:
    return run.work.key(BASELINE, stream=task, inputs=run.stream_hash(task, held_back=True))


def _calibrate_stream(run: Run, task: str, model: nn.Module, tick: Any) -> None:
    recipe = run.recipe
    found = collect(
        model,
        run.model_map,
        run.streams.stream(task, model),
        seed=recipe.seed + 15485863 * run.tasks.index(task),
        weighting=Weighting(recipe.stream_weighting),
        expert_tokens=recipe.expert_tokens,
        tick=tick,
    )
    tensors: dict[str, dict[str, Tensor]] = {
        **{name: group_to_tensors(group) for name, group in found.groups.items()},
        **{name: embedding_to_tensors(stats) for name, stats in found.embeddings.items()},
    }
    folder = f"{KIND}/{run.stream_hash(task)[:12]}"
    with run.work.batch() as batch:
        for name, values in tensors.items():
            file = f"{folder}/{task}/{name}.safetensors"
            batch.add(_key(run, task, name), KIND, {file: tensor_content(values)})
        # last: it means that all of them are there
        batch.add(_key(run, task, STREAM), STREAM, {}, vars(Summary.of(found)))


@torch.no_grad()
def _measure_baseline(run: Run, task: str, model: nn.Module) -> None:
    key = _baseline_key(run, task)
    if run.work.has(key):
        return
    route = run.streams.route(task)
    value, terms = 0.0, 0
    for sample in run.streams.judging(task, model):
        asked: Objective = objective(sample)
        loss = asked.truth(route.run(model, **sample.inputs))
        value, terms = value + float(loss.value), terms + loss.terms
    run.work.commit(key, BASELINE, {}, {"loss": value / terms})


def _counts(seen: list[Summary]) -> StreamStatistics:
    """All streams' counts together, for `require_seen`."""
    parts = [one.without_numbers() for one in seen]
    first = parts[0]
    groups = {
        name: GroupStatistics(
            name,
            [
                MatrixStatistics(
                    torch.empty(0, 0), sum(m.tokens for m in same), sum(m.weight_sum for m in same)
                )
                for same in zip(*(part.groups[name].matrices for part in parts), strict=True)
            ],
        )
        for name in first.groups
    }
    embeddings = {
        name: max(
            (part.embeddings[name] for part in parts), key=lambda stats: float(stats.frequency)
        )
        for name in first.embeddings
    }
    ran = frozenset().union(*(part.ran for part in parts))
    return StreamStatistics("all", 0, 0, groups, embeddings, ran)
