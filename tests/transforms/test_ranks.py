"""Predicted losses: the formula against rounded Gaussians, and tables in the right order."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from quantlib.calibration.stream import BlockStream
from quantlib.errors import TransformError
from quantlib.formats.activation import ActivationFormat, ActivationSegment, fake_quantize
from quantlib.transforms.apply import RotatedSource
from quantlib.transforms.bases import Bases, Source, hidden_orders, resq_bases
from quantlib.transforms.mixing import SHARES
from quantlib.transforms.moments import merge, stream_moments
from quantlib.transforms.ranks import (
    RankTable,
    Spectrum,
    head_spectra,
    predicted_loss,
    rank_table,
    spectra,
)
from quantlib.transforms.rotation import Rotation

from .small_models import HEAD_DIM, HEADS, KV_HEADS, WIDTH, small_llama


def flat(columns: int, readers: tuple[str, ...] = ("w",)) -> Spectrum:
    ones = torch.ones(1, columns, dtype=torch.float64)
    return Spectrum("x", readers, ones, ones)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 256])
def test_the_formula_prices_rounded_gaussians(columns: int, bits: int) -> None:
    """Activations alone (as for a KV cache): 1/2 sum of squared errors, all prices 1.

    The largest of d Gaussians is below sqrt(2 ln d) sigma (by 10 % at 256), and a symmetric 4-bit
    scale has 14 steps and not 15: together within 30 %.
    """
    x = torch.randn(4000, columns, generator=torch.Generator().manual_seed(0))
    rounding = (ActivationSegment(0, columns, ActivationFormat(bits)),)
    measured = 0.5 * float((fake_quantize(x, rounding) - x).square().sum(1).mean())
    predicted = predicted_loss(flat(columns, ()), 0, low_bits=bits)
    assert predicted == pytest.approx(measured, rel=0.3)


def test_scales_of_their_own_and_groups_lose_less() -> None:
    one = flat(64)
    two = Spectrum("x", ("w",), torch.ones(2, 64).double() / 2, torch.ones(2, 64).double() / 2)
    assert predicted_loss(two, 0) == pytest.approx(predicted_loss(one, 0) / 2)
    assert predicted_loss(one, 0, group=16) < predicted_loss(one, 0)
    assert predicted_loss(one, 64) < 0.01 * predicted_loss(one, 0)  # 8 bits: (15 / 255)^2
    assert predicted_loss(flat(64, ()), 0) == predicted_loss(one, 0) / 2  # weights are not rounded
    with pytest.raises(TransformError, match="65 of 64"):
        predicted_loss(one, 65)


def test_a_slice_mixed_in_parts_is_predicted_as_it_rounds() -> None:
    """A fourth of the columns 9 times as energetic: mixed apart, the scale is theirs. Measured on
    Gaussians, as above."""
    energies = torch.tensor([1.0] * 96 + [9.0] * 32, dtype=torch.float64)[None]
    spectrum = Spectrum("x", (), energies, torch.ones(1, 128, dtype=torch.float64))
    whole, apart = (predicted_loss(spectrum, 0, cuts=cuts) for cuts in (None, (32,)))
    assert apart > 1.5 * whole
    x = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0)) * energies.sqrt().float()
    rounding = (ActivationSegment(0, 128, ActivationFormat(4)),)
    measured = 0.5 * float((fake_quantize(x, rounding) - x).square().sum(1).mean())
    assert apart == pytest.approx(measured, rel=0.3)
    assert predicted_loss(spectrum, 32, cuts=(32,)) == predicted_loss(spectrum, 32)


def test_without_a_cut_wide_columns_are_like_any_other() -> None:
    """Half of a slice that was mixed whole at 8 bits: half the loss, whatever the spectrum was."""
    energies = torch.arange(1, 65).double()[None] ** 2
    spectrum = Spectrum("x", ("w",), energies, energies)
    none, half, chosen = (
        predicted_loss(spectrum, n, cuts=c) for n, c in ((0, ()), (32, ()), (32, None))
    )
    assert half / none == pytest.approx(0.5 * (math.log(32) / math.log(64)), rel=0.01)
    assert chosen < 0.5 * half


@pytest.mark.parametrize("cuts", [(8,), (8, 32), (1, 2, 63)])
def test_equal_parts_are_no_worse_than_one(cuts: tuple[int, ...]) -> None:
    assert predicted_loss(flat(64), 0, cuts=cuts) == pytest.approx(predicted_loss(flat(64), 0))


def test_a_table_offers_every_share_and_takes_what_was_measured() -> None:
    energies = torch.arange(1, 65).double()[None] ** 2
    spectrum = Spectrum("x", ("w",), energies, energies)
    table = rank_table(spectrum, measured={Fraction(1, 8): 0.125})
    assert [choice.share for choice in table.choices] == list(SHARES)
    assert [choice.high for choice in table.choices] == [0, 4, 8, 12, 16, 32, 64]
    assert [choice.bits for choice in table.choices] == [4, 4.25, 4.5, 4.75, 5, 6, 8]
    losses = [choice.loss for choice in table.choices if not choice.measured]
    assert losses == sorted(losses, reverse=True)
    (measured,) = [choice for choice in table.choices if choice.measured]
    assert (measured.share, measured.loss) == (Fraction(1, 8), 0.125)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Bases]:
    """A small model's moments and ResQ's bases."""
    model = small_llama(tmp_path_factory.mktemp("llama"))
    folded = RotatedSource.of(model.source, Rotation(fold_norms=True))
    windows = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(7))
    stream = BlockStream(folded, model.model_map)
    moments = merge(stream_moments(stream, model.model_map, model.wiring, windows))
    source = Source(moments, model.wiring, folded.read)
    return source, resq_bases(moments, model.wiring)


@pytest.fixture(scope="module")
def tables(small: tuple[Source, Bases]) -> dict[str, tuple[Spectrum, RankTable]]:
    """Of its groups and heads."""
    source, bases = small
    found = [*spectra(source, bases), *head_spectra(source, bases)]
    return {spectrum.name: (spectrum, rank_table(spectrum)) for spectrum in found}


def test_every_group_and_both_sides_of_every_cache_have_a_table(
    tables: dict[str, tuple[Spectrum, RankTable]],
) -> None:
    names = ["self_attn.q_proj", "mlp.gate_proj", "self_attn.o_proj", "mlp.down_proj"]
    blocks = [f"model.layers.{i}" for i in range(2)]
    expected = {f"{b}.{n}.weight" for b in blocks for n in names}
    assert set(tables) == expected | {f"{b}.{side}" for b in blocks for side in ("key", "value")}
    readers = {name for _, table in tables.values() for name in table.readers}
    assert len(readers) == 14  # 7 linears in 2 blocks
    for _, table in tables.values():
        losses = [choice.loss for choice in table.choices]
        assert all(0 < loss < float("inf") for loss in losses)
        assert losses[-1] < losses[0]


def test_spectra_have_the_energy_of_the_moments_and_ascend(
    tables: dict[str, tuple[Spectrum, RankTable]],
) -> None:
    shapes = {"q_proj": WIDTH, "gate_proj": WIDTH, "o_proj": HEADS * HEAD_DIM, "down_proj": 48}
    for name, (spectrum, _) in tables.items():
        if spectrum.readers:
            assert spectrum.activation.shape == (1, shapes[name.split(".")[-2]])
        elif name.endswith("value"):
            assert spectrum.activation.shape == (KV_HEADS, HEAD_DIM)
            assert bool((spectrum.activation.diff(dim=1) >= 0).all())  # PCA of what is stored
        else:
            assert spectrum.activation.shape == (1, HEAD_DIM)
        assert bool((energy(spectrum) > 0).all())


def test_wide_hidden_channels_outside_the_hadamard_matrix_lose_less(
    small: tuple[Source, Bases],
) -> None:
    source, bases = small
    name = "model.layers.0.mlp.down_proj.weight"
    mixed, apart = (
        next(s for s in spectra(source, bases, orders) if s.name == name)
        for orders in (None, hidden_orders(source))
    )
    assert predicted_loss(apart, 0) == pytest.approx(predicted_loss(mixed, 0))  # none is wide
    assert predicted_loss(apart, 4) < predicted_loss(mixed, 4)


def energy(spectrum: Spectrum) -> Tensor:
    return torch.stack((spectrum.activation, spectrum.price)).sum(-1)
