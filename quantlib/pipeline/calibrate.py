"""The calibrate stage: statistics of every linear group, one block in memory at a time, resumable at every block."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.calibration import passes
from quantlib.calibration.statistics import (
    EmbeddingStatistics,
    GroupStatistics,
    embedding_from_tensors,
    embedding_to_tensors,
    group_from_tensors,
    group_to_tensors,
)
from quantlib.calibration.stream import BlockStream
from quantlib.checkpoint.tensorfile import read_tensors, tensor_content
from quantlib.errors import DataError
from quantlib.pipeline.run import Run

EMBEDDING = "embedding"


class WorkDirStore:
    """Hidden states of a pass as units of the work directory (see `calibration.passes.HiddenStore`)."""

    def __init__(self, run: Run, inputs: str) -> None:
        self.run, self.inputs = run, inputs

    def key(self, name: str) -> str:
        return self.run.work.key("hidden", name=name, inputs=self.inputs)

    def has(self, name: str) -> bool:
        return self.run.work.has(self.key(name))

    def load(self, name: str) -> Tensor:
        return read_tensors(self.run.work.file(self.key(name)))["value"]

    def save(self, name: str, value: Tensor) -> None:
        content = tensor_content({"value": value.contiguous()})
        self.run.work.commit(self.key(name), "hidden", {f"hidden/{self.inputs[:12]}.{name}.safetensors": content})

    def drop(self, name: str) -> None:
        key = self.key(name)
        if self.run.work.has(key):
            path = self.run.work.file(key)
            self.run.work.forget(key)
            path.unlink(missing_ok=True)


def calibrate(run: Run) -> None:
    """Make sure statistics of every group (and of the embedding) are in the work directory."""
    if _finished(run):
        return
    blocks = len(run.model_map.blocks)
    store = WorkDirStore(run, run.statistics_hash)
    stream = BlockStream(run.source, run.model_map)
    with run.stage("calibrate", 2 * blocks + 1) as progress:
        passes.forward(stream, run.windows, store, progress.tick)
        _head(run, stream, store)
        progress.tick("head")
        if run.recipe.gradients:
            found = passes.backward(stream, run.model_map, run.windows, store, run.recipe.seed, progress.tick)
        else:
            found = passes.local(stream, run.model_map, store, run.recipe.seed, progress.tick)
        for _, groups in found:
            _commit(run, groups)
        _commit_embedding(run, store)
    for index in range(blocks + 1):
        store.drop(f"hidden.{index}")
    for name in (f"gradient.{blocks}", "gradient.0", "head"):
        store.drop(name)


def group_statistics(run: Run, group: str) -> GroupStatistics:
    """The statistics of one linear group."""
    return group_from_tensors(group, read_tensors(run.work.file(_key(run, group))))


def embedding_statistics(run: Run) -> EmbeddingStatistics:
    """The statistics of the embedding and the head."""
    return embedding_from_tensors(read_tensors(run.work.file(_key(run, EMBEDDING))))


def _key(run: Run, name: str) -> str:
    return run.work.key("statistics", name=name, inputs=run.statistics_hash)


def _finished(run: Run) -> bool:
    groups = [group.name for block in run.model_map.blocks for group in run.model_map.groups_in(block)]
    return all(run.work.has(_key(run, name)) for name in (*groups, EMBEDDING))


def _commit(run: Run, groups: list[GroupStatistics]) -> None:
    """Keep the statistics of one block's groups. Experts without a token are an error, not a silence."""
    with run.work.batch() as batch:
        for group in groups:
            if group.tokens == 0:
                idle = sum(m.tokens == 0 for m in group.matrices)
                raise DataError(
                    f"{group.name}: {idle} of {len(group.matrices)} matrices saw no calibration token; "
                    "use more windows or data that exercises them"
                )
            content = tensor_content(group_to_tensors(group))
            name = f"statistics/{run.statistics_hash[:12]}/{group.name}.safetensors"
            batch.add(_key(run, group.name), "statistics", {name: content})


def _head(run: Run, stream: BlockStream, store: WorkDirStore) -> None:
    """Sample labels; keep the gradient that enters the last block, then the head's statistics (last: they mean done)."""
    if store.has("head"):
        return
    gradient, statistics = passes.head(stream, run.windows, store, run.recipe.seed)
    store.save(f"gradient.{len(stream.block_names)}", gradient)
    content = tensor_content({name: value.contiguous() for name, value in statistics.items()})
    run.work.commit(store.key("head"), "hidden", {f"hidden/{run.statistics_hash[:12]}.head.safetensors": content})


def _commit_embedding(run: Run, store: WorkDirStore) -> None:
    """Statistics of the embedding, once the gradient has come all the way down.

    Block-local statistics have no gradient: every channel of the embedding then counts the same.
    """
    head = read_tensors(run.work.file(store.key("head")))
    gradient = store.load("gradient.0") if run.recipe.gradients else torch.ones(1, 1, head["head_input"].shape[0])
    stats = passes.embedding(run.windows, gradient, int(head["variance"].shape[0]), head)
    content = tensor_content(embedding_to_tensors(stats))
    name = f"statistics/{run.statistics_hash[:12]}/{EMBEDDING}.safetensors"
    run.work.commit(_key(run, EMBEDDING), "statistics", {name: content})
