"""Scheme names are a language: what is written reads back, what is not in it is refused."""

import pytest

from quantlib.errors import FormatError
from quantlib.formats import CHANNEL, TENSOR, Scheme, WeightFormat

INTEGERS = [f"w{bits}{group}" for bits in range(2, 9) for group in ("", "t", "g32", "g128")]
TWO_LEVEL = [f"w{bits}g64zs{scale}" for bits in (2, 4, 7) for scale in range(4, 9)]
ELEMENTS = ("fp8", "fp8e5m2", "fp6", "fp6e2m3", "fp4")
FLOATS = [f"{name}{group}" for name in ELEMENTS for group in ("", "t", "g16")]
SHARED = ["fp4g32s6", "mxfp8", "mxfp8e5m2", "mxfp6", "mxfp6e2m3", "mxfp4", "nvfp4"]
ZEROS = [name + "z" for name in INTEGERS] + ["w4g64z6", "w3z8", "w6g32z2s6"]
NAMES = [*INTEGERS, *ZEROS, *TWO_LEVEL, *FLOATS, *SHARED, "bf16", "f16", "f32"]


@pytest.mark.parametrize("name", [*NAMES, *[name + "a8" for name in NAMES]])
def test_a_name_that_is_read_is_written_the_same(name: str) -> None:
    assert str(Scheme.parse(name)) == name


NOT_NAMES = [
    "", "w", "w1", "w9", "W4", " w4", "w4g", "w4g48", "w4s6", "w4ts6", "w4g64s3",
    "w4g64s9", "w4zg64", "w4z9",
    "fp8z", "fp4g32z", "mxint8", "mxfp4g64", "nvfp4z", "w4a", "w4a4", "w4a8a8", "int4", "bf16z",
]  # fmt: skip


@pytest.mark.parametrize("name", NOT_NAMES)
def test_what_is_not_a_name_is_refused_with_a_sentence(name: str) -> None:
    with pytest.raises(FormatError, match=r"\w+ \w+"):
        Scheme.parse(name)


def test_the_parts_of_a_name_are_what_the_grammar_says() -> None:
    assert Scheme.parse("w4g64zs6a8") == Scheme(WeightFormat("int4", 64, False, "u6"), None, 8)
    assert Scheme.parse("w4g64z6").weight == WeightFormat("int4", 64, False, zero_bits=6)
    assert Scheme.parse("w3") == Scheme(WeightFormat("int3", CHANNEL))
    assert Scheme.parse("fp6e2m3t") == Scheme(WeightFormat("e2m3", TENSOR))
    assert Scheme.parse("bf16") == Scheme(None, "bf16")


@pytest.mark.parametrize(
    "fields",
    [
        ("int4", 32, True, "e8m0"),
        ("e2m1", 64, True, "e8m0"),
        ("int4", 16, True, "e4m3"),
        ("e2m1", 32, True, "e4m3"),
    ],
)
def test_scale_kinds_that_have_no_name_cannot_be_built(fields: tuple) -> None:
    with pytest.raises(FormatError, match="write"):
        WeightFormat(*fields)


def test_a_kept_weight_has_no_segments() -> None:
    with pytest.raises(FormatError, match="bf16"):
        Scheme.parse("bf16").segments(64)
