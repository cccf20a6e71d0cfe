"""A row grid is the checkpoint's own arithmetic, bit for bit, and its search keeps its word."""

from __future__ import annotations

import pytest
import torch

from quantlib.formats import Scheme, WeightFormat, decode_scales, decode_zeros, dequantize
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight
from quantlib.rounding.grid import CLIPS, SMALLEST_SCALE, RowGrid, exponents

SUFFIXES = ["", "z", *(f"z{bits}" for bits in range(2, 9))]
TWO_LEVEL = ["", *(f"s{bits}" for bits in range(4, 9)), "e"]
FORMATS = [
    f"w{bits}g32{zero}{scale}" for bits in range(2, 9) for zero in SUFFIXES for scale in TWO_LEVEL
]


def weight_format(name: str) -> WeightFormat:
    found = Scheme.parse(name).weight
    assert found is not None
    return found


def stored_scales(
    grid: RowGrid, format: WeightFormat, effective: torch.Tensor, row: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scale, row_scale) as `formats.weight` keeps them, for one group [R]."""
    if format.shares_exponent:
        return exponents(effective)[:, None], None
    if not format.two_level:
        return effective[:, None].half(), None
    return grid.scale_codes(effective, row)[:, None].to(torch.uint8), row.half()


def test_effective_scales_and_zeros_are_those_of_the_checkpoint_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 512
    row = torch.exp2(-24 * torch.rand(rows, generator=generator)).half().float()
    row[0] = SMALLEST_SCALE
    ideal = row * torch.rand(rows, generator=generator)
    for name in FORMATS:
        format = weight_format(name)
        grid = RowGrid.build([format], rows)
        effective = grid.stored_scale(ideal, row)
        stored = decode_scales(*stored_scales(grid, format, effective, row), format)
        assert torch.equal(stored[:, 0], effective), name
        zero = grid.stored_zero(grid.top * torch.rand(rows, generator=generator))
        if format.symmetric:
            assert torch.equal(zero, torch.full((rows,), float(1 << (format.bits - 1)))), name
        else:
            codes = grid.zero_codes(zero).to(torch.uint8)
            assert torch.equal(decode_zeros(codes, format), zero), name


@pytest.mark.parametrize("name", ["w2g32", "w3g32z", "w4g32z2", "w5g32zs6", "w8g32z4s4", "w3g32e"])
def test_storing_a_stored_value_changes_nothing(name: str) -> None:
    """The line search relies on it: the old scale and zero point are always among the choices."""
    generator = torch.Generator().manual_seed(1)
    grid = RowGrid.build([weight_format(name)], 4096)
    row = torch.rand(4096, generator=generator).half().float().clamp(min=SMALLEST_SCALE)
    scale = grid.stored_scale(row * torch.rand(4096, generator=generator), row)
    zero = grid.stored_zero(grid.top * torch.rand(4096, generator=generator))
    assert torch.equal(grid.stored_scale(scale, row), scale)
    assert torch.equal(grid.stored_zero(zero), zero)


def test_rows_of_different_formats_do_not_disturb_each_other() -> None:
    names = ["w2g32", "w4g32zs4", "w3g32z5", "w8g32s8", "w4g32ze"]
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(32, len(names) * 16, generator=generator)
    importance = torch.rand(32, generator=generator)
    together = RowGrid.build([weight_format(name) for name in names], 16)
    row_scale = together.row_scale(weights, 32)
    scale, zero = together.search(weights, importance, row_scale)
    for index, name in enumerate(names):
        own = slice(16 * index, 16 * (index + 1))
        alone = RowGrid.build([weight_format(name)], 16)
        assert torch.equal(alone.row_scale(weights[:, own], 32), row_scale[own])
        found = alone.search(weights[:, own], importance, row_scale[own])
        assert torch.equal(found[0], scale[own])
        assert torch.equal(found[1], zero[own])


@pytest.mark.parametrize("name", ["w2g32", "w2g32z", "w3g32z4s4", "w4g32s6", "w8g32z"])
def test_search_takes_the_clip_with_the_least_weighted_error(name: str) -> None:
    format = weight_format(name)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(20, 64, generator=generator) ** 3
    importance = torch.rand(20, generator=generator)
    grid = RowGrid.build([format], 64)
    row_scale = grid.row_scale(weights, 32)

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        codes = (weights / scale + zero).round().clamp(min=0).minimum(grid.top)
        return importance @ ((codes - zero) * scale - weights).square()

    low, high = grid.extremes(weights)
    candidates = []
    for clip in CLIPS:
        scale = grid.stored_scale(clip * (high - low) / grid.top, row_scale)
        candidates.append(error(scale, grid.stored_zero(-clip * low / scale)))
    found = error(*grid.search(weights, importance, row_scale))
    # The same sums in another order of additions.
    torch.testing.assert_close(found, torch.stack(candidates).amin(0), rtol=1e-5, atol=0)


def test_rounding_agrees_with_the_format() -> None:
    """Codes of `RowGrid.round`, dequantized by the format, are the nearest grid points."""
    format = weight_format("w3g32z5s5")
    generator = torch.Generator().manual_seed(4)
    column = torch.randn(256, generator=generator)
    grid = RowGrid.build([format], 256)
    row = grid.row_scale(column[None], 32)
    scale, zero = grid.search(column[None], torch.ones(1), row)
    codes = grid.round(column, 1 / scale, zero)
    stored = stored_scales(grid, format, scale, row)
    zeros = grid.zero_codes(zero)[:, None].to(torch.uint8)
    segment = Scheme(format).segments(1)[0]
    part = QuantizedSegment(segment, codes[:, None].to(torch.uint8), *stored, zeros)
    values = dequantize(QuantizedWeight((256, 1), (part,)))[:, 0]
    points = (torch.arange(8)[:, None] - zero) * scale
    nearest = (points - column).abs().amin(0)
    torch.testing.assert_close((values - column).abs(), nearest, rtol=1e-5, atol=1e-6)


def test_a_row_beyond_float16_is_marked() -> None:
    grid = RowGrid.build([weight_format("w2g32"), weight_format("w2g32s4")], 1)
    weights = torch.full((4, 2), 1e9)
    scale, _ = grid.search(weights, torch.ones(4), grid.row_scale(weights, 32))
    assert bool(torch.isinf(scale).all())
