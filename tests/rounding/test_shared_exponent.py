"""Rounding to powers of two: the sweeps know scales as they are stored, and beat plain rounding."""

from __future__ import annotations

import pytest
import torch

from quantlib.formats import Scheme, effective_scale, quantize_rtn
from quantlib.rounding import round_integers
from quantlib.rounding.grid import RowGrid


@pytest.mark.parametrize("name", ["w3g32e", "w2g32ze", "w5e"])
def test_gptq_stores_powers_of_two_and_loses_less_than_plain_rounding(
    name, problem, error_of
) -> None:
    weight, hessian = problem(24, 96)
    segments = Scheme.parse(name).segments(96)
    rounded = round_integers({"w": weight}, hessian, [segments])["w", 0]
    for part in rounded.segments:
        mantissa, _ = torch.frexp(effective_scale(part))
        assert torch.equal(mantissa, torch.full_like(mantissa, 0.5))
    plain = error_of(quantize_rtn(weight, segments), weight, hessian)
    assert error_of(rounded, weight, hessian) < 0.9 * plain


def test_the_search_tries_the_powers_on_both_sides_of_the_range() -> None:
    """A range that needs a step of 1.3: 2 clips nothing, 1 clips a little and is finer."""
    form = Scheme.parse("w4g32e").weight
    assert form is not None
    grid = RowGrid.build([form], 1)
    spread = torch.linspace(-1, 1, 32) * 1.3 * 7.5
    spike = torch.zeros(32)
    spike[0] = -1.3 * 7.5
    spike = spike + torch.linspace(-1, 1, 32)
    importance = torch.ones(32)
    importance[1:] = 40.0  # what matters in the spiked row is small
    scale, _ = grid.search(spread[:, None], torch.ones(32), torch.ones(1))
    assert float(scale) == 2.0
    narrow, _ = grid.search(spike[:, None], importance, torch.ones(1))
    assert float(narrow) <= 1.0
