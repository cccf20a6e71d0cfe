"""What formats leave of numbers: integers where magnitudes are alike, floats where they are not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

from quantlib.bench import formats_explained, record
from quantlib.bench.formats_explained import (
    CRESTS,
    Layer,
    crests,
    decibels,
    kurtosis,
    layer_row,
    summary,
)
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize
from quantlib.search.trained.layers import RoundedLinear


def layer(tail: float, seed: int = 0, rows: int = 24, columns: int = 64) -> Layer:
    """A linear whose weights and inputs are Gaussians to the power `tail`, signs kept: 0.2 is
    nearly two values, 1 Gaussian, 3 a few numbers that are far larger than all others."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, rows)
    drawn = torch.randn(rows + 32, columns, generator=generator)
    drawn = drawn.sign() * drawn.abs().pow(tail)
    with torch.no_grad():
        linear.weight.copy_(drawn[:rows])
        assert linear.bias is not None
        linear.bias.fill_(100.0)
    return Layer("layer", RoundedLinear(linear), drawn[rows:])


def test_decibels_are_those_of_what_ships() -> None:
    found = layer(1.0)
    for name in ("w4a4", "fp4afp4"):
        scheme = Scheme.parse(name)
        shipped = dequantize(quantize_rtn(found.weight, scheme.segments(64)))
        noise = float((shipped - found.weight).square().sum())
        expected = 10 * math.log10(float(found.weight.square().sum()) / noise)
        row = layer_row(found)
        assert row["formats"][name]["weights"] == pytest.approx(expected, abs=1e-6)
    module = found.module
    assert module.candidate is None, "as it was"


def test_a_bias_is_no_signal() -> None:
    """One of 100 beside outputs of some 8 would add 20 decibels to every format."""
    row = layer_row(layer(1.0))
    figures = row["formats"]["w4a4"]
    assert figures["output"] < min(figures["weights"], figures["inputs"]) + 1


def test_more_bits_leave_more() -> None:
    formats = layer_row(layer(1.0))["formats"]
    for part in ("weights", "inputs", "output"):
        found = [formats[f"w{bits}a{bits}"][part] for bits in (4, 5, 6, 7, 8)]
        assert found == sorted(found)
        assert 5 < (found[-1] - found[0]) / 4 < 7  # 6.02 dB a bit


@pytest.mark.parametrize(("tail", "float_wins"), [(0.2, 0.0), (3.0, 1.0)])
def test_floats_win_where_few_numbers_are_large(tail: float, float_wins: float) -> None:
    found = summary([layer_row(layer(tail, seed)) for seed in range(3)])
    assert found["layers"] == 3
    e2m1 = found["bits"]["4"]["floats"]["e2m1"]
    assert e2m1["wins"] == {"weights": float_wins, "inputs": float_wins, "output": float_wins}
    assert found["bits"]["4"]["any_float_wins"]["output"] == float_wins
    for classes in found["by_crest"].values():
        assert sum(one["rows"] for one in classes) in (3 * 24, 3 * 32)
    rows = found["by_crest"]["weights"]
    assert (rows[-1]["from"] >= 4) == (tail == 3.0)


def test_crest_factors_and_kurtosis() -> None:
    square = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    assert crests(square).tolist() == pytest.approx([1.0, 2.0])
    assert kurtosis(square[:1]) == pytest.approx(1.0)
    normal = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    assert kurtosis(normal) == pytest.approx(3.0, abs=0.05)
    assert decibels(square, square + 0.1) == pytest.approx(10 * math.log10(13 / 0.12))
    assert decibels(square, square) == math.inf


def test_rows_are_counted_by_their_crest_factors() -> None:
    flat, spiked = torch.ones(1, 64), torch.full((1, 64), 0.08)
    flat[0, ::2], spiked[0, 0] = -0.9, 1.0
    rows = torch.cat([flat, spiked, torch.zeros(1, 64)])
    linear = nn.Linear(64, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(rows)
    counted = layer_row(Layer("layer", RoundedLinear(linear), rows))["by_crest"]["weights"]
    assert len(counted) == len(CRESTS) + 1
    assert counted[0] == (1, 0), "the flat row: integers"
    assert sum(count for count, _ in counted) == 2
    assert sum(won for _, won in counted[1:]) == 1, "the spiked one: E2M1 has its small step"


def test_the_command_keeps_what_other_subjects_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(seed: int) -> Iterator[Layer]:
        yield layer(1.0, seed)

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for name, seed in (("vit", 1), ("resnet", 2)):
        monkeypatch.setitem(formats_explained.SUBJECTS, name, partial(drawn, seed))
        formats_explained.main([name])
    written = json.loads((tmp_path / "formats_explained.json").read_text())
    assert sorted(written["subjects"]) == ["resnet", "vit"]
    assert written["subjects"]["vit"]["groups"][0]["group"] == 64
    with pytest.raises(typer.Exit):
        formats_explained.main(["bert"])
