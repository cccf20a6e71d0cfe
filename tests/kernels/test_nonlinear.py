"""Integer softmax, GELU and LayerNorm are as near to the float ones as their papers say."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from quantlib.errors import FormatError, UsageError
from quantlib.kernels.nonlinear import CANDIDATES, Operator, fit, fqvit, ibert, ivit, sqnr
from quantlib.kernels.nonlinear.integers import (
    FINEST,
    Integers,
    bit_length,
    grid_scale,
    square_root,
    squares_in_32_bits,
    to_integers,
)
from quantlib.kernels.nonlinear.operators import describe
from quantlib.kernels.nonlinear.rule import Rule, choose, thresholds

FINE = 2.0**-12
"""A grid on which a step is far below what the methods themselves are wrong by."""
WIDTH = 96


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def within(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """False for NaN."""
    return bool((found - wanted).abs().max() <= tolerance)


@given(st.lists(st.integers(0, 2**60), min_size=1, max_size=9))
def test_square_roots_and_bit_lengths_are_those_of_whole_numbers(values: list[int]) -> None:
    given_ = torch.tensor(values)
    assert square_root(given_).tolist() == [math.isqrt(value) for value in values]
    assert bit_length(given_).tolist() == [value.bit_length() for value in values]


@given(st.integers(1, 40), st.integers(1, 2000), st.integers(0, 9))
def test_sums_of_squares_fit_32_bits(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(2**bits), 2**bits, (2, count), generator=generator)
    squares, shifted = squares_in_32_bits(values)
    assert bool((squares <= 2**32).all())
    assert torch.equal(squares[..., 0], ((values >> shifted) ** 2).sum(-1))


def test_nothing_of_a_value_becomes_a_float() -> None:
    scores = to_integers(normal(4, WIDTH), 0.01, 16)
    for found in (ibert.softmax(scores, 8), ivit.softmax(scores, 8), fqvit.softmax(scores)):
        assert found.values.dtype == torch.int64
    for found in (ibert.gelu(scores), ivit.gelu(scores, 8), ibert.layer_norm(scores)):
        assert found.values.dtype == torch.int64


def test_the_exponential_of_i_bert_is_wrong_by_no_more_than_its_polynomial() -> None:
    values = -torch.arange(int(10 / FINE))
    found = ibert.exponential(values, FINE).floats()
    # 1.9e-3 (section 3.5), and whole coefficients of a fine grid.
    assert within(found, torch.exp(values * FINE), 1.95e-3)


def test_the_gelu_of_i_bert_is_wrong_by_no_more_than_its_polynomial() -> None:
    x = Integers(torch.arange(-20000, 20001), FINE)
    # 0.018 (table 1), which the paper rounds down, and whole coefficients.
    assert within(ibert.gelu(x).floats(), gelu(x.floats()), 0.0185)


def test_the_exponential_of_i_vit_is_wrong_by_no_more_than_its_line() -> None:
    values = -torch.arange(int(10 / FINE))
    found = ivit.exponential(values, FINE, 15).double() * FINE * 2.0**-15
    exact = torch.exp(values * FINE)
    # 1 + f/2 is above 2^f by up to 6.2 % (f = -0.53), and 1 + 1/2 - 1/16 below log2 e by 0.4 %
    # of the exponent: at exp(-10), another 5.5 %.
    assert within(found / exact, torch.ones_like(found), 0.12)
    # Where it counts: the largest error of all is at exp(-0.4).
    assert within(found, exact.double(), 0.045)


def test_the_gelu_of_i_vit_is_that_of_a_sigmoid() -> None:
    x = Integers(torch.arange(-8000, 8001)[:, None], 1e-3)
    floats = x.floats()
    # Exponentials wrong by 6 % make a sigmoid wrong by 1.5 % at most, next to 0, where x is small.
    assert within(ivit.gelu(x, 16).floats(), floats * torch.sigmoid(1.702 * floats), 0.012)
    # x sigmoid(1.702 x) itself is wrong by 0.02.
    assert within(ivit.gelu(x, 16).floats(), gelu(floats), 0.012 + 0.0205)


@pytest.mark.parametrize("method", ["ibert16", "ivit16"])
def test_layer_norm_on_a_fine_grid_is_exact_to_the_grid(method: str) -> None:
    x = normal(32, WIDTH) * 3 + 1
    gain, bias = normal(WIDTH, seed=1), normal(WIDTH, seed=2)
    operator = Operator("layer_norm", method, grid_scale(float(x.abs().max()), 16))
    exact = layer_norm(x, (WIDTH,), gain, bias, eps=0.0)
    # A step is 4e-4, the mean is off by half of one, and a deviation of 32 bits by 2^-12 or so.
    assert within(operator.layer_norm(x, gain, bias), exact, 4e-3)


def test_a_constant_row_has_a_layer_norm_of_its_bias() -> None:
    x, bias = torch.full((2, WIDTH), 3.7), normal(WIDTH)
    for method in ("ibert8", "ivit8"):
        found = Operator("layer_norm", method, 0.1).layer_norm(x, torch.ones(WIDTH), bias)
        assert torch.equal(found, bias.expand(2, -1))


def test_channels_of_different_size_share_8_bits_on_grids_of_powers_of_two() -> None:
    x = normal(256, WIDTH)
    x[:, ::2] *= 0.1
    gain, bias = normal(WIDTH, seed=1).abs() + 0.5, normal(WIDTH, seed=2)
    # Small channels count: their gains make up for their size.
    gain[::2] *= 10
    exact = layer_norm(x, (WIDTH,), gain, bias)
    operator, found = fit("layer_norm", "fqvit8", x, exact, gain=gain, bias=bias)
    assert set(operator.shifts[::2]) != set(operator.shifts[1::2])
    _, plain = fit("layer_norm", "ibert8", x, exact, gain=gain, bias=bias)
    assert found > plain


@pytest.mark.parametrize("method", CANDIDATES["softmax"])
def test_weights_of_a_softmax_are_shares_of_what_counts(method: str) -> None:
    scores = normal(2, 3, 8, WIDTH) * 3
    seen = torch.ones(8, WIDTH, dtype=torch.bool).tril(WIDTH - 8)
    operator = Operator("softmax", method, grid_scale(float(scores.abs().max()), 8))
    weights = operator.softmax(scores, seen)
    assert weights.shape == scores.shape
    assert bool((weights >= 0).all())
    assert bool((weights <= 1).all())
    assert not weights[:, :, ~seen].any()
    # Scores that do not count must not count as the largest either.
    hidden = torch.where(seen, scores, 1e4)
    assert torch.equal(operator.softmax(hidden, seen), weights)


@pytest.mark.parametrize(
    ("method", "decibels"), [("ibert16", 40.0), ("ivit16", 25.0), ("ivit8", 15.0), ("fqvit8", 9.0)]
)
def test_a_softmax_keeps_the_signal_of_its_method(method: str, decibels: float) -> None:
    """Far from exact is what the methods are: exponentials on lines, weights that are powers of
    two. Powers of two are wrong by up to 41 % of a weight: 10 log10(1 / 0.41^2) = 7.7 dB."""
    scores = normal(64, WIDTH) * 3
    _, found = fit("softmax", method, scores, scores.softmax(-1))
    assert found >= decibels


def test_logarithms_of_weights_are_rounded_to_the_nearest() -> None:
    scores = normal(8, 32)
    logs = fqvit.softmax(to_integers(scores, FINE, 16)).values
    exact = -torch.log2(scores.softmax(-1))
    # Rounding goes up from 1.5 times a power of two on (0.585 of a step); the rest is I-BERT's
    # exponential.
    assert bool(((logs - exact).abs() <= 0.6).all())


def test_ranges_are_cut_where_that_is_worth_it() -> None:
    x = normal(64, WIDTH)
    x[0, 0] = -40.0  # of which GELU makes nothing
    operator, _ = fit("gelu", "ibert8", x, gelu(x))
    assert operator.scale < grid_scale(40.0, 8)


def test_sqnr_is_in_decibels_and_never_nan() -> None:
    x = normal(1000)
    assert sqnr(x, x * 1.1) == pytest.approx(20.0, abs=1e-3)
    assert sqnr(x, x) == math.inf
    assert sqnr(x, x * math.nan) == -math.inf


@pytest.mark.parametrize("kind", list(CANDIDATES))
def test_operators_come_back_from_json(kind: str) -> None:
    for method in CANDIDATES[kind]:  # type: ignore[index]
        in_channels = (kind, method) == ("layer_norm", "fqvit8")
        given_ = (0, 3, 1), 0.25
        operator = Operator(kind, method, 0.125, *(given_ if in_channels else ()))  # type: ignore[arg-type]
        assert Operator.parse(operator.to_json()) == operator
        assert describe({"a": operator, "b": operator}) == {f"{kind} {method}": 2}


@pytest.mark.parametrize(
    "given_",
    [
        None,
        {"kind": "gelu", "method": "ibert8"},
        {"kind": "gelu", "method": "fqvit8", "scale": 1.0},
        {"kind": "tanh", "method": "ibert8", "scale": 1.0},
        {"kind": "gelu", "method": "ibert8", "scale": 0.0},
        {"kind": "gelu", "method": "ibert8", "scale": math.nan},
        {"kind": "layer_norm", "method": "fqvit8", "scale": 1.0},
        {"kind": "layer_norm", "method": "fqvit8", "scale": 1.0, "shifts": "04", "output": 1.0},
        {"kind": "gelu", "method": "ibert8", "scale": 1.0, "shifts": "01"},
    ],
)
def test_what_describes_no_operator_is_refused(given_: object) -> None:
    with pytest.raises(FormatError):
        Operator.parse(given_)


def test_inputs_that_are_not_finite_cannot_be_fitted() -> None:
    x = normal(4, 8)
    x[0, 0] = math.inf
    with pytest.raises(FormatError, match="finite"):
        fit("gelu", "ibert8", x, gelu(x))


def test_the_fewest_bits_that_are_good_enough_come_first() -> None:
    methods = {
        "ibert8": (Operator("gelu", "ibert8", 1.0), 31.0),
        "ivit8": (Operator("gelu", "ivit8", 1.0), 32.0),
        "ibert16": (Operator("gelu", "ibert16", FINEST), 50.0),
    }
    fits = {"layer": methods}
    assert choose(fits, 30.0)["layer"].method == "ivit8"
    assert choose(fits, 31.5)["layer"].method == "ivit8"
    assert choose(fits, 33.0)["layer"].method == "ibert16"
    assert choose(fits, 51.0) == {}
    assert thresholds(fits) == [31.0, 32.0, 50.0, math.inf]


def test_rules_are_read_and_written() -> None:
    assert Rule.parse("sqnr=30") == Rule("sqnr", 30.0)
    assert str(Rule.parse("output=22.5")) == "output=22.5"
    for wrong in ("30", "sqnr", "sqnr=-3", "psnr=30", "sqnr=x"):
        with pytest.raises(UsageError, match="sqnr=30"):
            Rule.parse(wrong)
