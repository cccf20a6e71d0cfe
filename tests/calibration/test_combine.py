"""Streams summed are the statistics of the sum of their losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantlib.calibration.combine import combined
from quantlib.calibration.losses import LossSum
from quantlib.calibration.streams import Sample, Stream, StreamStatistics
from quantlib.calibration.watch import Weighting
from quantlib.calibration.whole import collect
from quantlib.errors import DataError

MakeTiny = Callable[[str], Any]


def samples(windows: Tensor, factor: float = 1.0) -> list[Sample]:
    """Windows under a loss without chance: the largest logit, times a factor."""

    def loss(output: Any, _: torch.Generator) -> LossSum:
        best = output.logits.log_softmax(-1).amax(-1)
        return LossSum(-factor * best.sum(), best.numel())

    return [Sample({"input_ids": ids[None], "use_cache": False}, loss) for ids in windows]


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """float32 sums of the same terms in another order."""
    assert found.shape == expected.shape, what
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((found - expected).abs().max()) if expected.numel() else 0.0
    assert error <= 1e-4 * scale, f"{what}: {error} off at a scale of {scale}"


@pytest.fixture
def halves(tiny: MakeTiny, windows: Tensor) -> tuple[Any, StreamStatistics, StreamStatistics]:
    """A mixture of experts, and two streams of one window and of two."""
    it = tiny("mixtral")
    one = collect(it.model, it.model_map, Stream("one", samples(windows[:1])))
    two = collect(it.model, it.model_map, Stream("two", samples(windows[1:])))
    return it, one, two


def test_two_streams_of_weight_one_are_one_stream(
    halves: tuple[Any, StreamStatistics, StreamStatistics], windows: Tensor
) -> None:
    it, one, two = halves
    together = combined([one, two], {"one": 1.0, "two": 1.0})
    whole = collect(it.model, it.model_map, Stream("whole", samples(windows)))
    assert (together.terms, together.samples) == (whole.terms, whole.samples)
    assert together.ran == whole.ran
    for name, group in whole.groups.items():
        for found, expected in zip(together.groups[name].matrices, group.matrices, strict=True):
            assert found.tokens == expected.tokens
            assert found.weight_sum == pytest.approx(expected.weight_sum, rel=1e-4)
            close(found.hessian, expected.hessian, f"hessian of {name}")
            close(found.token_weight, expected.token_weight, f"token weights of {name}")
            for member in expected.fisher:
                close(found.fisher[member], expected.fisher[member], f"fisher of {member}")
            assert set(found.sample_window.tolist()) == set(expected.sample_window.tolist())
    lookup, expected_lookup = (s.embeddings["model.embed_tokens"] for s in (together, whole))
    close(lookup.frequency, expected_lookup.frequency, "frequency")
    close(lookup.gradient, expected_lookup.gradient, "gradient")
    close(together.embeddings["lm_head"].variance, whole.embeddings["lm_head"].variance, "variance")


def test_a_weight_is_a_loss_multiplied_by_its_root(
    halves: tuple[Any, StreamStatistics, StreamStatistics], windows: Tensor
) -> None:
    """A stream's weight multiplies second moments of gradients: nine is gradients times three."""
    it, one, two = halves
    tripled = collect(it.model, it.model_map, Stream("two", samples(windows[1:], factor=3.0)))
    weighted = combined([one, two], {"one": 1.0, "two": 9.0})
    expected = combined([one, tripled], {"one": 1.0, "two": 1.0})
    for name, group in expected.groups.items():
        for found, other in zip(weighted.groups[name].matrices, group.matrices, strict=True):
            close(found.hessian, other.hessian, f"hessian of {name}")
            close(found.token_weight, other.token_weight, f"token weights of {name}")
            for member in other.fisher:
                close(found.fisher[member], other.fisher[member], f"fisher of {member}")
                close(found.sample_g[member], other.sample_g[member], f"samples of {member}")
    close(
        weighted.embeddings["model.embed_tokens"].gradient,
        expected.embeddings["model.embed_tokens"].gradient,
        "gradient",
    )


@pytest.mark.parametrize("weighting", [Weighting.ROOT, Weighting.NONE])
def test_streams_count_by_their_gradients_however_tokens_do(
    tiny: MakeTiny, windows: Tensor, weighting: Weighting
) -> None:
    """Gradients times three are a weight of nine between streams, though within one stream the
    Hessian of roots, or of all tokens alike, does not change with them."""
    it = tiny("llama")
    one, two, tripled = (
        collect(it.model, it.model_map, Stream(name, data), weighting=weighting)
        for name, data in (
            ("one", samples(windows[:1])),
            ("two", samples(windows[1:])),
            ("two", samples(windows[1:], factor=3.0)),
        )
    )
    weighted = combined([one, two], {"one": 1.0, "two": 9.0})
    expected = combined([one, tripled], {"one": 1.0, "two": 1.0})
    for name, group in expected.groups.items():
        for found, other in zip(weighted.groups[name].matrices, group.matrices, strict=True):
            close(found.hessian, other.hessian, f"hessian of {name}")
            assert found.energy == pytest.approx(other.energy, rel=1e-4)


def test_a_stream_of_weight_zero_counts_for_nothing(
    halves: tuple[Any, StreamStatistics, StreamStatistics],
) -> None:
    _, one, two = halves
    alone = combined([one, two], {"one": 1.0, "two": 0.0})
    for name, group in one.groups.items():
        for found, expected in zip(alone.groups[name].matrices, group.matrices, strict=True):
            if expected.tokens:
                close(found.hessian, expected.hessian, f"hessian of {name}")
            assert found.weight_sum == pytest.approx(expected.weight_sum)


def test_weights_that_are_none_are_refused(
    halves: tuple[Any, StreamStatistics, StreamStatistics],
) -> None:
    _, one, two = halves
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="'two' has the weight"):
            combined([one, two], {"one": 1.0, "two": weight})
    with pytest.raises(DataError, match="no calibration stream"):
        combined([], {})


def test_an_expert_that_one_stream_missed_has_the_statistics_of_the_other(
    halves: tuple[Any, StreamStatistics, StreamStatistics],
) -> None:
    _, one, two = halves
    name = "model.layers.0.mlp.experts.down_proj"
    missed = replace(one, groups={**one.groups, name: _without(one.groups[name], 2)})
    total = combined([missed, two], {"one": 1.0, "two": 1.0})
    found, expected = (s.groups[name].matrices[2] for s in (total, two))
    assert found.tokens == expected.tokens > 0
    close(found.hessian, expected.hessian, "hessian")


def _without(group: Any, expert: int) -> Any:
    from quantlib.calibration.statistics import GroupStatistics, MatrixStatistics

    matrices = list(group.matrices)
    matrices[expert] = MatrixStatistics(torch.empty(0, 0), 0, 0.0)
    return GroupStatistics(group.name, matrices)
