"""The small floats are exactly the OCP ones: torch's own casts agree where torch has the type."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.formats import FLOATS, code_book, decode_float, encode_float
from quantlib.formats.elements import OCP_FLOATS

TORCH_TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def finite_codes(name: str) -> torch.Tensor:
    """Every code of a number, float32 order left aside."""
    book = code_book(name)
    return torch.nonzero(torch.isfinite(book)).flatten().to(torch.uint8)


@pytest.mark.parametrize(("name", "dtype"), TORCH_TYPES.items())
def test_code_books_equal_torchs(name: str, dtype: torch.dtype) -> None:
    expected = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).to(torch.float32)
    torch.testing.assert_close(code_book(name), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "dtype"), TORCH_TYPES.items())
def test_encoding_equals_torchs_cast_on_float32_from_end_to_end(
    name: str, dtype: torch.dtype
) -> None:
    # A stride that is odd visits every mantissa pattern; 1.7 million values of both signs.
    patterns = torch.arange(0, 0x7F800000, 1249, dtype=torch.int32)
    values = patterns.view(torch.float32)
    values = values[values <= FLOATS[name].max_value]
    # ... and every tie between neighbours, where rounding to even shows.
    book = code_book(name)[: FLOATS[name].specials]
    values = torch.cat([values, (book[1:] + book[:-1]) / 2, book])
    values = torch.cat([values, -values])
    assert torch.equal(encode_float(values, name), values.to(dtype).view(torch.uint8))


def test_books_of_the_sub_byte_floats_are_the_ocp_tables() -> None:
    assert code_book("e2m1").tolist()[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert code_book("e2m3").tolist()[:8] == [index / 8 for index in range(8)]
    assert code_book("e2m3").max() == 7.5
    assert code_book("e3m2").tolist()[:5] == [0, 0.0625, 0.125, 0.1875, 0.25]
    assert code_book("e3m2").max() == 28
    assert {name: FLOATS[name].max_exponent for name in OCP_FLOATS} == {
        "e4m3": 8, "e5m2": 15, "e3m2": 4, "e2m3": 2, "e2m1": 2,
    }  # fmt: skip


def test_all_floats_of_4_to_8_bits_are_there_and_fit_into_a_half() -> None:
    pairs = [(e, m) for e in range(2, 6) for m in range(1, 6) if 4 <= 1 + e + m <= 8]
    assert set(FLOATS) == {f"e{e}m{m}" for e, m in pairs}
    for name in FLOATS:
        book = code_book(name)[finite_codes(name).long()]
        assert torch.equal(book.half().float(), book)
    assert code_book("e2m2").tolist()[:8] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]
    assert torch.equal(code_book("e3m1")[:16], code_book("e3m2")[:32:2])
    assert code_book("e5m1")[0x3E] == math.inf, "five exponent bits are those of a half"


@pytest.mark.parametrize("name", FLOATS)
def test_every_number_has_its_code_and_every_code_its_number(name: str) -> None:
    codes = finite_codes(name)
    assert torch.equal(encode_float(decode_float(codes, name), name), codes)
    element = FLOATS[name]
    assert float(decode_float(codes, name).max()) == element.max_value
    assert codes.numel() == 2 * element.specials


@pytest.mark.parametrize("name", FLOATS)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_encoding_picks_a_nearest_number(name: str, numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    limit = FLOATS[name].max_value
    clamped = values.clamp(-limit, limit).to(torch.float64)
    book = code_book(name)[finite_codes(name).long()].to(torch.float64)
    nearest = (clamped[:, None] - book[None, :]).abs().amin(dim=1)
    chosen = (decode_float(encode_float(values, name), name).to(torch.float64) - clamped).abs()
    # In float64 both differences are of the same two numbers: no tolerance is needed.
    assert torch.equal(chosen, nearest)


@pytest.mark.parametrize("name", FLOATS)
def test_beyond_the_largest_number_encoding_saturates(name: str) -> None:
    limit = FLOATS[name].max_value
    values = torch.tensor([limit * 1.01, math.inf, -limit * 4, -math.inf, 3e38])
    expected = torch.tensor([limit, limit, -limit, -limit, limit])
    assert torch.equal(decode_float(encode_float(values, name), name), expected)


def test_nan_is_refused_and_so_is_an_unknown_element() -> None:
    with pytest.raises(FormatError, match="nan"):
        encode_float(torch.tensor([0.0, math.nan]), "e2m1")
    with pytest.raises(FormatError, match="int4"):
        encode_float(torch.zeros(1), "int4")


def test_shapes_are_kept_across_chunks() -> None:
    values = torch.linspace(-7, 7, 3 * 100_003).view(3, 1, 100_003)
    codes = encode_float(values, "e2m1")
    assert codes.shape == values.shape
    assert torch.equal(codes[2], encode_float(values[2], "e2m1"))
