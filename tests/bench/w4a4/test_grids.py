"""Min-max grids: what the papers' formula says, slice by slice."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.bench.w4a4.grids import Grid, round_tokens

BITS = st.integers(2, 8)


def tokens(seed: int, shape: tuple[int, ...] = (3, 5, 16)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@given(st.integers(0, 1000), BITS, st.booleans())
def test_no_number_moves_by_more_than_half_a_step(seed: int, bits: int, symmetric: bool) -> None:
    x = tokens(seed)
    rounded = round_tokens(x, (Grid(16, bits, symmetric),))
    if symmetric:
        step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    else:
        step = (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) / (
            2**bits - 1
        )
    # An asymmetric end may lie half a step outside, as the zero point is an integer.
    limit = step * (0.5 if symmetric else 1.0) * 1.0001
    assert bool(((rounded - x).abs() <= limit).all())


@given(st.integers(0, 1000), BITS, st.booleans(), st.sampled_from([0.7, 1.0]))
def test_a_token_has_no_more_values_than_codes(
    seed: int, bits: int, symmetric: bool, clip: float
) -> None:
    rounded = round_tokens(tokens(seed, (2, 400)), (Grid(400, bits, symmetric, clip),))
    for row in rounded:
        assert len(row.unique()) <= 2**bits - symmetric


def test_slices_and_groups_are_rounded_apart() -> None:
    x = tokens(0, (4, 24))
    whole = round_tokens(x, (Grid(16, 4, group=8), Grid(8, 8)))
    parts = [round_tokens(x[:, at : at + 8], (Grid(8, b),)) for at, b in ((0, 4), (8, 4), (16, 8))]
    assert torch.equal(whole, torch.cat(parts, 1))


def test_clipping_saturates_the_ends() -> None:
    x = torch.tensor([[1.0, -1.0, 0.25, 0.0]])
    rounded = round_tokens(x, (Grid(4, 4, symmetric=True, clip=0.5),))
    assert rounded.abs().max() == 0.5
    assert rounded[0, 3] == 0


def test_zeros_stay_and_nan_is_not_hidden() -> None:
    for symmetric in (True, False):
        assert not round_tokens(torch.zeros(2, 8), (Grid(8, 4, symmetric),)).any()
        broken = torch.ones(1, 8)
        broken[0, 3] = torch.nan
        assert round_tokens(broken, (Grid(8, 4, symmetric),)).isnan().any()


def test_sixteen_bits_are_not_rounded_and_slices_must_cover() -> None:
    x = tokens(1, (2, 8))
    assert torch.equal(round_tokens(x, (Grid(8, 16),)), x)
    with pytest.raises(ValueError, match="columns on 8"):
        round_tokens(x, (Grid(4, 4),))


def test_true_bits_count_scales_and_zero_points() -> None:
    assert Grid(64, 4).true_bits == 64 * 4 + 16 + 4
    assert Grid(64, 4, symmetric=True, group=16).true_bits == 64 * 4 + 4 * 16
    assert Grid(64, 16).true_bits == 64 * 16
