"""What layers are trained in is what ships: rounding in training against the formats' own."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlib.errors import FormatError, SearchError
from quantlib.formats.activation import fake_quantize
from quantlib.formats.elements import FLOATS, code_book
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize
from quantlib.search.trained.numbers import SPACES, Candidate, space_of
from quantlib.search.trained.quantizers import (
    round_inputs,
    round_samples,
    round_weight,
    to_grid,
)

STORED = ("w2a2", "w4a4", "w8a8", "w4g16za5z", "w4a4h8/4", "fp4afp4", "fp8afp8", "fp8e5m2afp8e5m2")
STORED += (
    "w3g16a4",
    "w4g32a8",
    "w5ta5",
    "fp6afp6",
    "fp6e2m3afp6e2m3",
    "mxfp4amxfp4",
    "nvfp4anvfp4",
    "w4a8g16",
)


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Of many sizes, some zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values *= torch.exp(3 * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator))
    values[torch.rand(shape, generator=generator) < 0.1] = 0
    return values


@pytest.mark.parametrize("name", STORED)
def test_a_weight_is_rounded_to_what_a_checkpoint_holds(name: str) -> None:
    weight = numbers((6, 48))
    weight[1] = 0
    weight[2] *= 1e-9  # the scale is a float16 that is not normal
    expected = dequantize(quantize_rtn(weight, Scheme.parse(name).segments(48)))
    assert torch.equal(round_weight(weight, Candidate.parse(name)), expected)


@pytest.mark.parametrize("name", STORED)
def test_inputs_are_rounded_to_what_the_kernels_make_of_them(name: str) -> None:
    x = numbers((3, 5, 48))
    x[0, 0] = 0
    expected = fake_quantize(x, Scheme.parse(name).activations(48))
    assert torch.equal(round_inputs(x, Candidate.parse(name)), expected)


def test_inputs_stay_what_they_are_where_the_scheme_leaves_them() -> None:
    x = numbers((3, 48))
    assert round_inputs(x, Candidate.parse("w4g16")) is x
    assert round_samples(x, Candidate.parse("w4g16")) is x


@pytest.mark.parametrize("name", ["w4a4", "fp4afp4", "e3m1"])
def test_a_convolutions_input_has_one_scale_for_each_sample(name: str) -> None:
    x, candidate = numbers((4, 3, 5, 5)), Candidate.parse(name)
    rounded = round_samples(x, candidate)
    assert torch.equal(rounded, round_inputs(x.flatten(1), candidate).view(x.shape))
    scaled = x.clone()
    scaled[1] *= 4  # a power of two: exact
    expected = rounded.clone()
    expected[1] *= 4
    assert torch.equal(round_samples(scaled, candidate), expected)


@pytest.mark.parametrize("name", ["w4a4h8/4", "w4a4z", "w4a8g16"])
def test_a_convolution_refuses_inputs_in_parts(name: str) -> None:
    with pytest.raises(SearchError, match="convolution"):
        round_samples(numbers((2, 3, 4, 4)), Candidate.parse(name))


@pytest.mark.parametrize("name", ["w3a3", "e2m2", "fp8afp8"])
def test_gradients_pass_as_if_nothing_had_been_rounded(name: str) -> None:
    weight, x = numbers((4, 16)).requires_grad_(), numbers((3, 16), 1).requires_grad_()
    candidate = Candidate.parse(name)
    out = round_inputs(x, candidate) @ round_weight(weight, candidate).T
    seed = numbers((3, 4), 2)
    out.backward(seed)
    with torch.no_grad():
        assert torch.equal(x.grad, seed @ round_weight(weight, candidate))
        assert torch.equal(weight.grad, seed.T @ round_inputs(x, candidate))


@pytest.mark.parametrize("name", sorted(FLOATS))
def test_the_grid_of_a_stored_float_is_its_code_book(name: str) -> None:
    values = numbers((40, 50)) * 10
    book = code_book(name)
    book = book[book.isfinite()].double()
    nearest = (values.double().flatten()[:, None] - book).abs().amin(1).view(values.shape)
    rounded = to_grid(values, FLOATS[name])
    assert bool(torch.isin(rounded.double(), book).all())
    assert torch.equal((rounded.double() - values.double()).abs(), nearest)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(e, m) for e, m in itertools.product(range(2, 6), range(1, 6)) if e + m <= 7]),
    st.floats(-1e5, 1e5, width=32),
)
def test_any_float_rounds_to_the_nearest_of_its_numbers(
    bits: tuple[int, int], value: float
) -> None:
    element = FLOATS[f"e{bits[0]}m{bits[1]}"]
    mantissas = torch.arange(1 << element.mantissa_bits).double()
    exponents = torch.arange(1 << element.exponent_bits)
    fractions = mantissas / (1 << element.mantissa_bits)
    rows = [
        (fractions + (1 if e else 0)) * 2.0 ** (max(int(e), 1) - element.bias) for e in exponents
    ]
    book = torch.cat(rows)
    book = book[book <= element.max_value]
    assert float(book.max()) == element.max_value
    found = float(to_grid(torch.tensor([value]), element))
    distances = (book - abs(value)).abs()
    assert abs(found - value) == float(distances.min())


def test_spaces_hold_what_their_names_say() -> None:
    names = [candidate.name for candidate in space_of("float-l")]
    assert {c.scheme.activation.bits for c in space_of("float-l")} == {4, 5, 6, 7, 8}
    assert len(names) == len(FLOATS)
    assert {"fp4afp4", "fp5e2m2afp5e2m2", "fp8e3m4afp8e3m4", "fp8afp8"} <= set(names)
    assert [c.name for c in space_of("int-l")] == [f"w{b}a{b}" for b in range(4, 9)]
    assert all(len(space_of(name)) >= 2 for name in SPACES)


def test_bit_products_count_weights_and_inputs() -> None:
    assert Candidate.parse("w4a8").bit_products(64) == 32
    assert Candidate.parse("e2m2").bit_products(64) == 25
    assert Candidate.parse("w4g16").bit_products(64) == 64
    assert Candidate.parse("w4a4h8/4").bit_products(64) == 0.75 * 16 + 0.25 * 64


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("w4a4", "nothing to choose"),
        ("w4a4,w4a4", "nothing to choose"),
        ("w4a4,bf16", "nothing to train"),
        ("w4a4,e5m5", "none of the floats"),
        ("w4a4,w3g64z4+r16", "several matrices"),
    ],
)
def test_a_space_that_is_none_is_refused(names: str, says: str) -> None:
    with pytest.raises(SearchError, match=says):
        space_of(names)
    with pytest.raises(FormatError):
        space_of("w4a4,int9")


def test_a_diverged_weight_is_an_error_and_not_a_number() -> None:
    weight = numbers((4, 16))
    weight[1, 2] = torch.nan
    for name in ("w4a4", "e2m2"):
        with pytest.raises(FormatError):
            round_weight(weight, Candidate.parse(name))
