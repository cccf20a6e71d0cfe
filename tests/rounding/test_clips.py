"""Clip factors keep what the outputs need of the inputs' range."""

from __future__ import annotations

import pytest
import torch

from quantlib.errors import RoundingError
from quantlib.formats.activation import ActivationSegment, fake_quantize, with_clips
from quantlib.formats.scheme import Scheme
from quantlib.rounding.clips import CLIPS, choose_clips


def inputs(columns: int, tokens: int = 200) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))


def segments(scheme: str, columns: int) -> tuple[ActivationSegment, ...]:
    return Scheme.parse(scheme).activations(columns)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a3z", "w4a4zh8/8", "fp4afp4"])
def test_the_outputs_are_nearer_than_with_any_other_common_factor(scheme: str) -> None:
    """By the outputs themselves, token weights included."""
    x, parts = inputs(96), segments(scheme, 96)
    generator = torch.Generator().manual_seed(1)
    weight, tokens = torch.randn(64, 96, generator=generator), torch.rand(200, generator=generator)
    clips = choose_clips(x, parts, weight.T @ weight, tokens)

    def error(chosen: tuple[float, ...]) -> float:
        moved = (fake_quantize(x, with_clips(parts, chosen)) - x) @ weight.T
        return float((moved.square().sum(1) * tokens).sum())

    others = [error((clip,) * len(parts)) for clip in CLIPS]
    # Segments are decided alone; what their errors have in common is chance.
    assert error(clips) <= min(others) * 1.03
    assert error(clips) < others[0]


def test_fewer_bits_keep_less() -> None:
    x, cost = inputs(256), torch.eye(256)
    clips = [choose_clips(x, segments(f"w4a{b}", 256), cost, torch.ones(200))[0] for b in (2, 3, 4)]
    assert clips == sorted(clips)
    assert clips[0] < clips[-1] < 1.0


def test_columns_that_matter_decide() -> None:
    """The largest number of every token stands in a column that outputs hardly read, or in the only
    one they do."""
    x = inputs(64)
    x[:, 0] = 8.0
    unread, read = torch.eye(64), torch.zeros(64, 64)
    unread[0, 0], read[0, 0] = 1e-6, 1.0
    parts, ones = segments("w4a4", 64), torch.ones(200)
    assert choose_clips(x, parts, unread, ones) == (CLIPS[-1],)
    assert choose_clips(x, parts, read, ones) == (1.0,)


def test_a_segment_that_is_not_rounded_keeps_everything() -> None:
    part = Scheme.parse("w4").activations(64)
    assert choose_clips(inputs(64), part, torch.eye(64), torch.ones(200)) == ()


def test_what_does_not_fit_is_a_sentence() -> None:
    x, parts = inputs(64), segments("w4a4", 64)
    with pytest.raises(RoundingError, match="need a cost of"):
        choose_clips(x, parts, torch.eye(32), torch.ones(200))
    with pytest.raises(RoundingError, match="inf or nan"):
        choose_clips(x * torch.inf, parts, torch.eye(64), torch.ones(200))
