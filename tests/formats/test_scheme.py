"""Scheme names are a language: what is written reads back, what is not in it is refused."""

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.formats import (
    CHANNEL,
    TENSOR,
    ActivationFormat,
    Scheme,
    Segment,
    WeightFormat,
    check_activations,
    check_segments,
    with_clips,
)

INTEGERS = [f"w{bits}{group}" for bits in range(2, 9) for group in ("", "t", "g32", "g128")]
TWO_LEVEL = [f"w{bits}g64zs{scale}" for bits in (2, 4, 7) for scale in range(4, 9)]
ELEMENTS = ("fp8", "fp8e5m2", "fp6", "fp6e2m3", "fp4", "fp5e2m2", "fp7e4m2", "fp8e3m4")
FLOATS = [f"{name}{group}" for name in ELEMENTS for group in ("", "t", "g16")]
EXPONENTS = ["w8e", "w8te", "w4g32e", "w3g64ze", "w2g16z4e"]
SHARED = ["fp4g32s6", "mxfp8", "mxfp8e5m2", "mxfp6", "mxfp6e2m3", "mxfp4", "nvfp4"]
ZEROS = [name + "z" for name in INTEGERS] + ["w4g64z6", "w3z8", "w6g32z2s6"]
NAMES = [*INTEGERS, *ZEROS, *TWO_LEVEL, *EXPONENTS, *FLOATS, *SHARED, "bf16", "f16", "f32"]
ACTIVATIONS = ["", "a8", "a2", "a4z", "a7z", "a8g128", "a4zg64", "amxfp4", "anvfp4", "afp8"]
HIGHS = ["h8/8", "h8x3/16", "h8/2", "h7x5/7", "hfp8/8", "hmxfp6e2m3x3/16", "hnvfp4/2"]
HIGHS += ["h3x5/16h4/16", "h3x2/9h4/9h6/18", "h6/4hfp8/8"]
SEGMENTED = ["w4a4zh8/8", "w4g64zs4a4zh8x3/16", "w4h8/8", "mxfp4amxfp4hmxfp6/8", "nvfp4anvfp4h8/4"]
SEGMENTED += ["w2g64z4s4h3x5/16h4/16", "w4a4h6/8h8/16"]


def readable(name: str) -> bool:
    """Whether the name is one: not every combination of parts makes sense."""
    try:
        Scheme.parse(name)
    except FormatError:
        return False
    return True


schemes = st.builds(
    "{}{}{}".format,
    st.sampled_from(NAMES),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from(["", *HIGHS]),
).filter(readable)


@pytest.mark.parametrize("name", [*NAMES, *[name + "a8" for name in NAMES]])
def test_a_name_that_is_read_is_written_the_same(name: str) -> None:
    assert str(Scheme.parse(name)) == name


@pytest.mark.parametrize("name", SEGMENTED)
def test_wider_columns_have_names_too(name: str) -> None:
    assert str(Scheme.parse(name)) == name


@given(name=schemes)
def test_reading_and_writing_are_inverse(name: str) -> None:
    assert str(Scheme.parse(name)) == name
    assert Scheme.parse(str(Scheme.parse(name))) == Scheme.parse(name)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 31, 576, 1536, 4099])
@given(name=schemes)
def test_segments_cover_every_column_once_and_agree_with_the_activations(
    length: int, name: str
) -> None:
    scheme = Scheme.parse(name)
    assume(scheme.weight is not None)
    segments, activations = scheme.segments(length), scheme.activations(length)
    check_segments((1, length), segments)
    assert len(segments) <= 1 + len(scheme.wide)
    if activations:
        check_activations(length, activations)
        spans = [(part.start, part.length) for part in segments]
        assert [(part.start, part.length) for part in activations] == spans


@given(length=st.integers(1, 20000), parts=st.integers(2, 64), count=st.integers(1, 63))
def test_high_columns_are_the_share_to_the_nearest_four(
    length: int, parts: int, count: int
) -> None:
    assume(count < parts)
    high = length - Scheme.parse(f"w4h8x{count}/{parts}").low_columns(length)
    assert high % 4 == 0 or high == length
    assert high >= min(4, length)
    if high not in (4, length):
        assert abs(high - Fraction(length * count, parts)) <= 2


def test_every_further_share_lies_behind_the_one_before_it() -> None:
    segments = Scheme.parse("w2g64z4s4h3x2/9h4/9h6/18").segments(576)
    assert [(part.length, str(part.format)) for part in segments] == [
        (352, "w2g64z4s4"),
        (128, "w3g64zs4"),
        (64, "w4g64zs4"),
        (32, "w6g64zs4"),
    ]


def test_in_a_narrow_layer_the_widest_columns_come_first() -> None:
    segments = Scheme.parse("w2h3/4h4/4").segments(6)
    assert [(part.length, part.format.bits) for part in segments] == [(2, 3), (4, 4)]


def test_high_columns_of_a_sixteenth_grid_fall_on_its_lines() -> None:
    # A basis is mixed in segments of d/16: ranks must end where these do.
    for width in (576, 1536, 2048, 4096, 11008):
        for count in range(1, 16):
            low = Scheme.parse(f"w4a4h8x{count}/16").low_columns(width)
            assert width - low == count * width // 16


NOT_NAMES = [
    "", "w", "w1", "w9", "W4", " w4", "w4g", "w4g48", "w4s6", "w4ts6", "w4g64s3",
    "w4g64s9", "w4zg64", "w4z9",
    "mxfp5e2m2", "fp5", "fp8e4m3", "fp6e3m2", "w4amxfp7e3m3",
    "fp8z", "fp4g32z", "mxint8", "mxfp4g64", "nvfp4z", "w4a", "w4a8a8", "int4", "bf16z",
    "w4a9", "w4a1", "w4a8z", "w4a16z", "w4a16g64", "w4a4g8", "w4a4g0", "w4a8g24", "w4aint4",
    "amxfp4", "w4h8", "w4h8/0", "w4h8/1", "w4h8x9/8", "w4h8x0/8", "w4h/8", "w4hw8/8", "w4h8/8a8",
    "w4h8/8h8/8", "w4h8/8h6/8", "w4h6/8h8", "w2h3/2h4/2",
    "w8h4/8", "bf16h8/8", "bf16a4h8/8", "mxfp4h7/8", "mxfp6h4/8", "nvfp4a4h5/8",
    "w4amxfp4h7/8",
]  # fmt: skip


@pytest.mark.parametrize("name", NOT_NAMES)
def test_what_is_not_a_name_is_refused_with_a_sentence(name: str) -> None:
    with pytest.raises(FormatError, match=r"\w+ \w+"):
        Scheme.parse(name)


def test_the_parts_of_a_name_are_what_the_grammar_says() -> None:
    assert Scheme.parse("w4g64zs6a8") == Scheme(
        WeightFormat("int4", 64, False, "u6"), None, ActivationFormat(8)
    )
    assert Scheme.parse("w4g64z6").weight == WeightFormat("int4", 64, False, zero_bits=6)
    assert Scheme.parse("w3") == Scheme(WeightFormat("int3", CHANNEL))
    assert Scheme.parse("fp6e2m3t") == Scheme(WeightFormat("e2m3", TENSOR))
    assert Scheme.parse("bf16") == Scheme(None, "bf16")
    assert Scheme.parse("w4a16") == Scheme.parse("w4")
    assert Scheme.parse("w4h8x2/16") == Scheme.parse("w4h8/8")


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("w4a4zh8/8", "w4a4z", "w8a8"),
        ("w4g64zs4a4zh8/8", "w4g64zs4a4z", "w8g64zs4a8"),
        ("w2g64z4s4a4g64h6/8", "w2g64z4s4a4g64", "w6g64zs4a6g64"),
        ("w4a8h6/8", "w4a8", "w6a8"),
        ("w4th8/8", "w4t", "w8t"),
        ("mxfp4amxfp4h8/8", "mxfp4amxfp4", "mxfp8amxfp8"),
        ("mxfp4amxfp4hmxfp6/8", "mxfp4amxfp4", "mxfp6amxfp6"),
        ("mxfp4amxfp8h6/8", "mxfp4amxfp8", "mxfp6amxfp8"),
        ("nvfp4anvfp4h8/8", "nvfp4anvfp4", "fp8afp8"),
        ("nvfp4anvfp4hfp8e5m2/8", "nvfp4anvfp4", "fp8e5m2afp8e5m2"),
        ("mxfp4a4zh8/8", "mxfp4a4z", "mxfp8a8"),
        ("mxfp4a4hfp6/8", "mxfp4a4", "fp6a6"),
        ("w4hfp8/8", "w4", "fp8"),
    ],
)
def test_the_parts_of_a_segmented_scheme_are_schemes_themselves(
    name: str, low: str, high: str
) -> None:
    scheme = Scheme.parse(name)
    for part, text in zip(scheme.segments(64), (low, high), strict=True):
        assert part.format == Scheme.parse(text).weight
    found = [part.format for part in scheme.activations(64)]
    expected = [Scheme.parse(text).activation for text in (low, high)]
    assert found == (expected if expected[0].rounds else [])


@given(name=schemes, length=st.sampled_from([64, 576, 1000]))
def test_a_scheme_is_found_from_its_segments(name: str, length: int) -> None:
    scheme = Scheme.parse(name)
    assume(scheme.weight is not None)
    segments, activations = scheme.segments(length), scheme.activations(length)
    clipped = with_clips(activations, [0.9] * len(activations))
    found = Scheme.of(segments, clipped)
    assert found.segments(length) == segments
    assert found.activations(length) == activations


def test_formats_that_no_scheme_has_are_refused() -> None:
    int4, int8 = WeightFormat("int4", CHANNEL), WeightFormat("int8", 32)
    for parts in ([(32, int4), (32, int8)], [(30, int4), (34, int4)], [(32, int4)] * 3):
        segments, start = [], 0
        for length, form in parts:
            segments.append(Segment(start, length, form))
            start += length
        with pytest.raises(FormatError, match="no scheme has the formats w4"):
            Scheme.of(segments)


def test_a_scheme_takes_no_clip_factor() -> None:
    with pytest.raises(FormatError, match="one weight"):
        Scheme(WeightFormat("int4", CHANNEL), None, ActivationFormat(4, clip=0.9))


@pytest.mark.parametrize(
    "fields",
    [
        ("e2m1", 16, True, "e8m0"),
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
