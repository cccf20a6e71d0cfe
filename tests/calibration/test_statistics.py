"""Statistics survive the trip through a file, and damaged ones are a sentence."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load, save

from quantlib.calibration.statistics import (
    EmbeddingStatistics,
    GroupStatistics,
    MatrixStatistics,
    embedding_from_tensors,
    embedding_to_tensors,
    group_from_tensors,
    group_to_tensors,
)
from quantlib.errors import DataError

NAME = "model.layers.0.mlp.experts.gate_up_proj"


def matrix(tokens: int, gradients: bool) -> MatrixStatistics:
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return MatrixStatistics(
        hessian=draw(4, 4),
        tokens=tokens,
        weight_sum=tokens / 3,
        fisher={"a.weight": draw(6), "b.weight": draw(2)} if gradients else {},
        sample_x=draw(5, 4),
        sample_g={"a.weight": draw(5, 6), "b.weight": draw(5, 2)} if gradients else {},
        sample_window=torch.arange(5),
        token_weight=draw(tokens) if gradients else torch.empty(0),
    )


def embedding() -> EmbeddingStatistics:
    return EmbeddingStatistics(
        torch.rand(9), torch.rand(4), torch.rand(4, 4), torch.rand(9), torch.rand(3, 4),
        torch.arange(3), 77,
    )  # fmt: skip


def assert_same(left: object, right: object) -> None:
    assert vars(left).keys() == vars(right).keys()
    for key, value in vars(left).items():
        other = getattr(right, key)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other)
            assert value.dtype == other.dtype
        elif isinstance(value, dict):
            assert value.keys() == other.keys()  # a file keeps no order
            assert all(torch.equal(value[name], other[name]) for name in value)
        else:
            assert value == other


@pytest.mark.parametrize("gradients", [True, False])
def test_a_group_comes_back_from_a_file_as_it_was(gradients: bool) -> None:
    """A stack of experts of which one saw nothing."""
    unseen = MatrixStatistics(torch.empty(0, 0), 0, 0.0)
    stats = GroupStatistics(NAME, [matrix(11, gradients), unseen, matrix(2**24 + 1, False)])
    found = group_from_tensors(NAME, load(save(group_to_tensors(stats))))
    assert (found.name, found.tokens) == (NAME, 0)
    assert len(found.matrices) == 3
    for left, right in zip(stats.matrices, found.matrices, strict=True):
        assert_same(left, right)
        assert left.has_gradients == right.has_gradients


def test_the_embedding_comes_back_from_a_file_as_it_was() -> None:
    stats = embedding()
    assert_same(embedding_from_tensors(load(save(embedding_to_tensors(stats)))), stats)


@pytest.mark.parametrize("part", ["counts", "hessian", "sample_x", "sample_window", "token_weight"])
def test_a_missing_part_of_a_group_is_a_sentence(part: str) -> None:
    tensors = group_to_tensors(GroupStatistics(NAME, [matrix(3, True), matrix(4, True)]))
    del tensors[f"1|{part}"]
    with pytest.raises(DataError, match=rf"{NAME} lack .*{part}.*calibrate again"):
        group_from_tensors(NAME, tensors)


def test_tensors_of_something_else_are_a_sentence() -> None:
    for tensors in ({}, {"value": torch.ones(1)}, {"0|counts": torch.ones(3)}):
        with pytest.raises(DataError, match="calibrate again"):
            group_from_tensors(NAME, tensors)


@pytest.mark.parametrize("part", [f.name for f in dataclasses.fields(EmbeddingStatistics)])
def test_a_missing_part_of_the_embedding_is_a_sentence(part: str) -> None:
    tensors = embedding_to_tensors(embedding())
    del tensors[part]
    with pytest.raises(DataError, match=f"damaged .*{part}.*calibrate again"):
        embedding_from_tensors(tensors)
    with pytest.raises(DataError, match="damaged"):
        embedding_from_tensors(embedding_to_tensors(embedding()) | {"other": torch.ones(1)})


def test_expected_frequencies_leave_something_for_tokens_that_were_not_seen() -> None:
    """Good and Turing: as much as was seen once, where the model expects it."""
    stats = EmbeddingStatistics(
        frequency=torch.tensor([7.0, 2.0, 1.0, 0.0, 0.0]),
        gradient=torch.ones(3),
        head_input=torch.eye(3),
        variance=torch.tensor([0.2, 0.1, 0.1, 0.09, 0.01]),
        sample_h=torch.empty(0, 3),
        sample_window=torch.empty(0, dtype=torch.int64),
        tokens=10,
    )
    found = stats.expected().frequency
    torch.testing.assert_close(found.sum(), stats.frequency.sum())
    missing = torch.tensor([0.2, 0.1, 0.1, 0.09, 0.01]) / 0.5
    torch.testing.assert_close(found, 0.9 * stats.frequency + 0.1 * 10 * missing)
    silent = dataclasses.replace(stats, variance=torch.zeros(5)).expected().frequency
    torch.testing.assert_close(silent, 0.9 * stats.frequency + 0.2)
    sure = dataclasses.replace(stats, frequency=torch.tensor([8.0, 2.0, 0, 0, 0])).expected()
    assert torch.equal(sure.frequency, torch.tensor([8.0, 2.0, 0, 0, 0]))
