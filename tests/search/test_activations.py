"""Mean bits of activations, as a cost of the allocation problem."""

import pytest

from quantlib.errors import UsageError
from quantlib.formats.scheme import Scheme
from quantlib.models.rows import Weight
from quantlib.search.activations import (
    ACTIVATION_BITS,
    activation_costs,
    mean_bits,
    parse_activation_bits,
    rounds_inputs,
)


def weight(name: str, rows: int, columns: int, kind: str = "linear") -> Weight:
    return Weight(name, name, (rows, columns), kind, "language_model", "b", "g", "F32", 4)


@pytest.mark.parametrize(
    ("scheme", "columns", "bits"),
    [
        ("w4g64", 128, 16.0),
        ("w4a8", 128, 8 + 16 / 128),
        ("w4a4z", 128, 4 + (16 + 4) / 128),
        ("w4a4zg64", 128, 4 + 2 * (16 + 4) / 128),
        ("w4a4zg64", 96, 4 + 2 * (16 + 4) / 96),
        ("mxfp4amxfp4", 128, 4 + 4 * 8 / 128),
        ("nvfp4anvfp4", 128, 4 + (8 * 8 + 32) / 128),
        ("w4a4zh8/8", 128, (112 * 4 + 16 * 8 + (16 + 4) + 16) / 128),
    ],
)
def test_codes_scales_and_zero_points_count(scheme: str, columns: int, bits: float) -> None:
    assert mean_bits(Scheme.parse(scheme), columns) == pytest.approx(bits, rel=1e-12)


def test_costs_add_to_the_mean_over_multiply_adds() -> None:
    weights = [weight("big", 30, 64), weight("small", 10, 64), weight("table", 500, 64)]
    schemes = {"big": ["w4a4z", "w8a8"], "small": ["w4a4z", "w8a8"], "table": ["w8g64"]}
    costs = activation_costs(weights, schemes)
    four, eight = (mean_bits(Scheme.parse(s), 64) for s in ("w4a4z", "w8a8"))
    assert costs["big", "w4a4z"] + costs["small", "w8a8"] == pytest.approx(
        0.75 * four + 0.25 * eight, rel=1e-12
    )
    assert costs["table", "w8g64"] == 0, "an embedding has no inputs to round"


def test_a_limit_is_a_number_of_bits_that_can_be_had() -> None:
    assert parse_activation_bits(None) == {}
    assert parse_activation_bits(4.5) == {ACTIVATION_BITS: 4.5}
    for wrong in (1.5, float("nan")):
        with pytest.raises(UsageError, match="give 2 or more"):
            parse_activation_bits(wrong)


def test_whether_something_is_rounded_is_read_off_the_schemes() -> None:
    assert rounds_inputs(["w4g64", "w4a8"])
    assert not rounds_inputs(["w4g64", "bf16"])
