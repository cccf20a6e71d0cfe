"""The calibrate stage: statistics of every linear group, one block in memory at a time, or, of a
model that cannot be taken apart, stream by stream (`parts.py`).

What the passes hand from block to block (hidden states, then gradients) lies in the work directory
as units of its own, so a run that was killed goes on at its block; at the end they are removed.
"""

from __future__ import annotations

from collections.abc import Container

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
from quantlib.pipeline.parts import calibrate_whole, part_keys, parts_there
from quantlib.pipeline.run import Run

EMBEDDING = "embedding"
HIDDEN = "hidden"
"""Kind, and folder, of the units that only live as long as a pass."""


class WorkDirStore:
    """Hidden states of a pass as units of the work directory (`calibration.passes.HiddenStore`).

    inputs: hash of everything they depend on.
    """

    def __init__(self, run: Run, inputs: str) -> None:
        self.run, self.inputs = run, inputs
        self._prefix = f"{inputs[:12]}."

    def has(self, name: str) -> bool:
        """Whether `name` was saved."""
        return self.run.work.has(self._key(name))

    def load(self, name: str) -> Tensor:
        """The value of `name`. Raises CheckpointError when it is missing or damaged."""
        return self.load_all(name)["value"]

    def load_all(self, name: str) -> dict[str, Tensor]:
        """What `save_all` was given."""
        return read_tensors(self.run.work.file(self._key(name)))

    def save(self, name: str, value: Tensor) -> None:
        """Keep one tensor."""
        self.save_all(name, {"value": value})

    def save_all(self, name: str, values: dict[str, Tensor]) -> None:
        """Keep several tensors as one unit: all of them or none."""
        content = tensor_content({key: value.contiguous() for key, value in values.items()})
        file = f"{HIDDEN}/{self._prefix}{name}.safetensors"
        self.run.work.commit(self._key(name), HIDDEN, {file: content})

    def drop(self, name: str) -> None:
        """Remove `name` and its file."""
        key = self._key(name)
        if self.run.work.has(key):
            path = self.run.work.file(key)
            self.run.work.forget(key)
            path.unlink(missing_ok=True)

    def clear(self, others: bool = False) -> None:
        """Remove everything, and files that a kill has left without a unit.

        others: also what killed passes with other inputs have left.
        """
        prefix = "" if others else self._prefix
        folder = f"{HIDDEN}/{prefix}"
        units = self.run.work.units(HIDDEN)
        mine = [u.key for u in units if any(name.startswith(folder) for name in u.files)]
        self.run.work.forget(*mine)
        for path in (self.run.work.path / HIDDEN).glob(prefix + "*"):
            path.unlink()

    def _key(self, name: str) -> str:
        return self.run.work.key(HIDDEN, name=name, inputs=self.inputs)


def calibrate(run: Run, turned: Container[str] = ()) -> None:
    """Make sure statistics of every group (and of the embedding) are in the work directory.

    turned: weights whose statistics will be turned into a basis of their outputs, too.
    """
    if run.workload is not None:
        calibrate_whole(run)
        return
    if not run.recipe.gradients:
        run.progress.say("scores are block-local: without gradients every token counts the same")
    store = WorkDirStore(run, run.statistics_hash)
    found, wanted = calibrated_groups(run)
    if found < wanted:
        _calibrate(run, store, turned)
    store.clear(others=found < wanted)


def _calibrate(run: Run, store: WorkDirStore, turned: Container[str]) -> None:
    stream = BlockStream(run.source, run.model_map)
    seed = run.recipe.seed
    with run.stage("calibrate", 2 * len(run.model_map.blocks) + 1) as progress:
        passes.forward(stream, run.windows, store, progress.tick)
        _head(run, stream, store)
        progress.tick("head")
        if run.recipe.gradients:
            observed = passes.backward(
                stream, run.model_map, run.windows, store, seed, progress.tick, turned
            )
        else:
            done = [block for block in run.model_map.blocks if _has_block(run, block)]
            observed = passes.local(stream, run.model_map, store, seed, progress.tick, done)
        for _, groups in observed:
            keep_statistics(run, groups)
        head = store.load_all("head")
        # Block-local statistics have no gradient: every channel of the embedding counts the same.
        width = head["head_input"].shape[0]
        gradient = store.load("gradient.0") if run.recipe.gradients else torch.ones(1, 1, width)
        vocabulary = int(head["variance"].shape[0])
        keep_embedding(run, passes.embedding(run.windows, gradient, vocabulary, head))


def group_statistics(run: Run, group: str) -> GroupStatistics:
    """The statistics of one linear group."""
    return group_from_tensors(group, read_tensors(run.work.file(statistics_key(run, group))))


def embedding_statistics(run: Run) -> EmbeddingStatistics:
    """The statistics of the embedding and the head."""
    return embedding_from_tensors(read_tensors(run.work.file(statistics_key(run, EMBEDDING))))


def calibrated_groups(run: Run) -> tuple[int, int]:
    """How many groups (the embedding counted as one) have statistics, and how many there are; of a
    model that is calibrated as a whole, how many streams."""
    if run.workload is not None:
        return parts_there(run)
    groups = [g.name for block in run.model_map.blocks for g in run.model_map.groups_in(block)]
    names = (*groups, EMBEDDING)
    return sum(run.work.has(statistics_key(run, name)) for name in names), len(names)


def statistics_keys(run: Run) -> list[str]:
    """Keys of all units of statistics that this run leaves."""
    if run.workload is not None:
        return part_keys(run)
    names = [group.name for group in run.model_map.groups if group.block is not None]
    return [statistics_key(run, name) for name in (*names, EMBEDDING)]


def statistics_key(run: Run, name: str) -> str:
    """The key of the unit that holds the statistics of the group `name` (or of EMBEDDING)."""
    return run.work.key("statistics", name=name, inputs=run.statistics_hash)


def _file(run: Run, name: str) -> str:
    return f"statistics/{run.statistics_hash[:12]}/{name}.safetensors"


def _has_block(run: Run, block: str) -> bool:
    groups = run.model_map.groups_in(block)
    return all(run.work.has(statistics_key(run, group.name)) for group in groups)


def keep_statistics(run: Run, groups: list[GroupStatistics]) -> None:
    """Keep the statistics of one block's groups. Experts without a token are an error."""
    with run.work.batch() as batch:
        for group in groups:
            if group.tokens == 0:
                idle = sum(matrix.tokens == 0 for matrix in group.matrices)
                raise DataError(
                    f"{group.name}: {idle} of {len(group.matrices)} matrices saw no calibration "
                    "token, so nothing is known of what they may lose; use more windows, or data "
                    "that exercises them"
                )
            content = tensor_content(group_to_tensors(group))
            key = statistics_key(run, group.name)
            batch.add(key, "statistics", {_file(run, group.name): content})


def _head(run: Run, stream: BlockStream, store: WorkDirStore) -> None:
    """Sample labels; keep the gradient that enters the last block, then the head's statistics
    (last: they mean done)."""
    blocks = len(stream.block_names)
    gradient_is_there = any(store.has(f"gradient.{index}") for index in range(blocks + 1))
    if store.has("head") and (gradient_is_there or not run.recipe.gradients):
        return
    gradient, statistics = passes.head(stream, run.windows, store, run.recipe.seed)
    if run.recipe.gradients:
        store.save(f"gradient.{blocks}", gradient)
    store.save_all("head", statistics)


def keep_embedding(run: Run, stats: EmbeddingStatistics) -> None:
    """Keep the statistics of the embedding: last, for they mean done."""
    content = tensor_content(embedding_to_tensors(stats))
    run.work.commit(statistics_key(run, EMBEDDING), "statistics", {_file(run, EMBEDDING): content})
