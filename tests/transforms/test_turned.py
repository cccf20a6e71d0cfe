"""Statistics of a folded model, turned, are those that calibrating the rotated one gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantlib.calibration import passes
from quantlib.calibration.statistics import (
    EmbeddingStatistics,
    GroupStatistics,
    group_from_tensors,
    group_to_tensors,
)
from quantlib.calibration.stream import BlockStream
from quantlib.errors import DataError
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.transforms.apply import RotatedSource
from quantlib.transforms.binding import wire
from quantlib.transforms.rotation import Rotation
from quantlib.transforms.turned import turned_embedding, turned_group, turned_outputs, turns

from .families import make, random_rotation

PARTS = ("norms", "residual", "value", "key", "hidden", "order")
CASES = ("llama", "llama_tied", "llama_biased", "qwen2", "phi3", "gemma", "mixtral")
WINDOWS = torch.arange(3, 3 + 3 * 12).reshape(3, 12) % 60


class Store(dict[str, Tensor]):
    """Hidden states in memory."""

    def has(self, name: str) -> bool:
        return name in self

    def load(self, name: str) -> Tensor:
        return self[name]

    def save(self, name: str, value: Tensor) -> None:
        self[name] = value.clone()

    def drop(self, name: str) -> None:
        self.pop(name, None)


def calibrated(
    source: RotatedSource, turned: frozenset[str] = frozenset()
) -> tuple[dict[str, GroupStatistics], EmbeddingStatistics]:
    """Groups by name, and the embedding."""
    model_map, store = ModelMap.from_source(source), Store()
    stream = BlockStream(source, model_map)
    passes.forward(stream, WINDOWS, store, lambda _: None)
    gradient, head = passes.head(stream, WINDOWS, store, 0)
    store.save(f"gradient.{len(stream.block_names)}", gradient)
    observed = passes.backward(stream, model_map, WINDOWS, store, 0, lambda _: None, turned)
    groups = {group.name: group for _, found in observed for group in found}
    vocabulary = int(head["variance"].shape[0])
    return groups, passes.embedding(WINDOWS, store.load("gradient.0"), vocabulary, head)


def near(found: Tensor, wanted: Tensor) -> None:
    """Float32 sums in two bases: equal to a few thousandths of the largest number."""
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-3 * scale)


@pytest.mark.parametrize("case", CASES)
def test_turned_statistics_are_the_rotated_model_s(case: str, tmp_path: Path) -> None:
    model = make(case)
    model.save_pretrained(tmp_path)
    source = Source.open(tmp_path)
    folded = RotatedSource.of(source, Rotation(fold_norms=True))
    rotated = RotatedSource.of(source, random_rotation(model, *PARTS))
    assert turns(folded.wiring)
    before, embedding = calibrated(folded, turned_outputs(folded.wiring))
    after, wanted = calibrated(rotated)
    assert before.keys() == after.keys()
    for name, group in before.items():
        found = turned_group(group, rotated.changes)
        for one, truth in zip(found.matrices, after[name].matrices, strict=True):
            assert one.tokens == truth.tokens
            assert not one.outputs
            near(one.hessian, truth.hessian)
            near(one.sample_x, truth.sample_x)
            near(one.token_weight, truth.token_weight)
            for member in truth.fisher:
                near(one.fisher[member], truth.fisher[member])
                near(one.sample_g[member], truth.sample_g[member])
    tied = rotated.wiring.tied
    table = rotated.changes.get("model.embed_tokens.weight")
    head = rotated.changes.get("lm_head.weight") if not tied else table
    turned = turned_embedding(embedding, table, head)
    near(turned.head_input, wanted.head_input)
    near(turned.sample_h, wanted.sample_h)
    # an orthogonal basis of the table keeps the length of its gradient
    near(turned.gradient.sum(), wanted.gradient.sum())


def test_norms_that_subtract_the_mean_are_calibrated_again() -> None:
    assert not turns(wire(make("whisper")))


def test_statistics_without_the_moments_of_outputs_are_refused(tmp_path: Path) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path)
    source = Source.open(tmp_path)
    groups, _ = calibrated(RotatedSource.of(source, Rotation(fold_norms=True)))
    changes = RotatedSource.of(source, random_rotation(model, *PARTS)).changes
    group = next(group for name, group in groups.items() if "down_proj" in str(group.matrices))
    with pytest.raises(DataError, match="cannot be turned into another basis"):
        turned_group(group, changes)


def test_moments_of_outputs_are_kept_in_the_file(tmp_path: Path) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path)
    folded = RotatedSource.of(Source.open(tmp_path), Rotation(fold_norms=True))
    groups, _ = calibrated(folded, turned_outputs(folded.wiring))
    kept = 0
    for name, group in groups.items():
        again = group_from_tensors(name, group_to_tensors(group))
        for one, other in zip(group.matrices, again.matrices, strict=True):
            assert one.outputs.keys() == other.outputs.keys()
            for member, moment in one.outputs.items():
                assert torch.equal(moment, other.outputs[member])
                near(moment.diagonal(), one.fisher[member])
                kept += 1
    assert kept == 3 * len(model.model.layers), "of values, output and down projections"
