import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import UsageError
from quantlib.search.budget import format_size, parse_bits, parse_size, true_bits


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("90MB", 90_000_000),
        ("82.8MB", 82_800_000),
        ("82.8 mb", 82_800_000),
        ("1.2GB", 1_200_000_000),
        ("85MiB", 85 * 2**20),
        ("0.5GiB", 2**29),
        ("82800000", 82_800_000),
        ("82,800,000 bytes", 82_800_000),
        ("700kB", 700_000),
        ("90M", 90_000_000),
        (12345, 12345),
    ],
)
def test_sizes_are_read_as_written(text: str | int, size: int) -> None:
    assert parse_size(text) == size


def test_decimal_sizes_are_exact_where_floats_are_not() -> None:
    assert parse_size("4.35GB") == 4_350_000_000  # 4.35 * 1e9 is 4349999999.9999995


def test_percentages_are_of_the_source_and_rounded_down() -> None:
    assert parse_size("30%", source_bytes=999) == 299
    with pytest.raises(UsageError, match="source model"):
        parse_size("30%")


@pytest.mark.parametrize(
    "text", ["", "MB", "90 parsecs", "-5MB", "0", "0.1B", "1e9", "90MBit", "nan", "1,2GB"]
)
def test_what_is_not_a_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_size(text)
    assert repr(text) in str(error.value)


def test_bits_are_true_bits_per_parameter() -> None:
    assert parse_bits("4.25", 1_000_000) == 531_250
    assert parse_bits(4, 3) == 1  # 12 bits: one whole byte is within, two would be over


@pytest.mark.parametrize("bits", ["zero", "0", "-1", "33", "nan", "inf", "1/0"])
def test_bits_out_of_range_are_refused(bits: str) -> None:
    with pytest.raises(UsageError):
        parse_bits(bits, 1000)
    with pytest.raises(UsageError):
        parse_bits("4", 0)


@given(bits=st.floats(0.01, 32), parameters=st.integers(1, 10**12))
def test_a_budget_in_bits_never_allows_more_than_asked(bits: float, parameters: int) -> None:
    size = parse_bits(bits, parameters)
    # the comparison divides floats: allow their rounding, 1e-12 of 32 bits
    assert true_bits(size, parameters) <= bits * (1 + 1e-12)
    assert true_bits(size + 1, parameters) > bits * (1 - 1e-12)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (999, "999 bytes"),
        (1_000, "1.00 kB"),
        (82_800_000, "82.8 MB"),
        (999_960_000, "1.00 GB"),
        (1_234_567_890, "1.23 GB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_sizes_are_written_for_people(size: int, text: str) -> None:
    assert format_size(size) == text
