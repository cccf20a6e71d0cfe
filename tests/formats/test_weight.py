"""A quantized weight means the same before packing, after it, and in a plain formula."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.formats import (
    QuantizedSegment,
    QuantizedWeight,
    Scheme,
    Segment,
    code_book,
    dequantize,
    effective_scale,
    pack,
    packed_layout,
    quantize_rtn,
    unpack,
)

SCHEMES = [
    *[f"w{bits}{rest}" for bits in range(2, 9) for rest in ("", "g64", "g128z", "g32zs6")],
    *[
        "w3g32z6",
        "w4g32e",
        "w3g64ze",
        "w8te",
        "w6g64z3s6",
        "w2tz8",
        "w4t",
        "w5tz",
        "w3g16s4",
        "w6g256zs5",
        "w4g64s7",
        "w7g32zs8",
    ],
    *["fp8", "fp8e5m2g64", "fp6t", "fp6e2m3g32s6", "fp4g16"],
    *["mxfp8", "mxfp8e5m2", "mxfp6", "mxfp6e2m3", "mxfp4", "nvfp4"],
]
SHAPES = [(1, 1), (3, 31), (1, 33), (5, 576)]


def random_weight(rows: int, length: int, seed: int = 0, spread: float = 0.02) -> torch.Tensor:
    """Normal weights whose rows differ in size, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, length, generator=generator) * spread
    return weight * torch.exp(torch.randn(rows, 1, generator=generator))


def split(length: int, names: list[str], cuts: list[int]) -> tuple[Segment, ...]:
    """Segments of these schemes, cut at these columns."""
    edges = [0, *sorted(cuts), length]
    formats = [Scheme.parse(name).weight for name in names]
    return tuple(
        Segment(start, end - start, format)
        for (start, end), format in zip(pairwise(edges), formats, strict=True)
    )


def assert_same(first: QuantizedWeight, second: QuantizedWeight) -> None:
    assert first.shape == second.shape
    for a, b in zip(first.segments, second.segments, strict=True):
        assert a.segment == b.segment
        for left, right in zip(
            (a.codes, a.scale, a.row_scale, a.zero), (b.codes, b.scale, b.row_scale, b.zero)
        ):
            assert (left is None) == (right is None)
            if left is not None:
                torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_packing_loses_nothing_and_fills_the_layout(name: str, shape: tuple[int, int]) -> None:
    segments = Scheme.parse(name).segments(shape[1])
    weight = quantize_rtn(random_weight(*shape), segments)
    tensors = pack(weight)
    forms = {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()}
    assert forms == packed_layout(shape, segments)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_same(unpack(tensors, shape, segments), weight)


@settings(deadline=None)
@given(
    names=st.lists(st.sampled_from(SCHEMES), min_size=2, max_size=4),
    rows=st.integers(1, 6),
    length=st.integers(8, 200),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_segments_are_independent_weights_side_by_side(
    names: list[str], rows: int, length: int, seed: int, data: st.DataObject
) -> None:
    cut = st.integers(1, length - 1)
    size = len(names) - 1
    cuts = data.draw(st.lists(cut, min_size=size, max_size=size, unique=True))
    segments = split(length, names, cuts)
    weight = random_weight(rows, length, seed)
    whole = quantize_rtn(weight, segments)
    assert_same(unpack(pack(whole), (rows, length), segments), whole)
    alone = [
        dequantize(quantize_rtn(weight[:, s.start : s.start + s.length],
                                [Segment(0, s.length, s.format)]))
        for s in segments
    ]  # fmt: skip
    assert torch.equal(dequantize(whole), torch.cat(alone, dim=1))


def test_suffixes_of_later_segments_carry_their_number() -> None:
    layout = packed_layout((4, 64), split(64, ["w4g32z", "w8", "w3g16s6"], [32, 48]))
    assert set(layout) == {
        "_packed", "_scale", "_zero_point", "_packed_1", "_scale_1",
        "_packed_2", "_scale_2", "_row_scale_2",
    }  # fmt: skip


def test_layout_is_the_documented_one() -> None:
    segments = Scheme.parse("w3g64zs6").segments(576)
    assert packed_layout((10, 576), segments) == {
        "_packed": (torch.int32, (10, 54)),
        "_scale": (torch.uint8, (10, 7)),
        "_row_scale": (torch.float16, (10,)),
        "_zero_point": (torch.int32, (1, 9)),
    }
    assert packed_layout((10, 576), Scheme.parse("nvfp4").segments(576)) == {
        "_packed": (torch.uint8, (10, 288)),
        "_scale": (torch.uint8, (10, 36)),
        "_row_scale": (torch.float32, (1,)),
    }


def element_by_element(part: QuantizedSegment) -> list[list[float]]:
    """The meaning of a segment, written as the documentation says it, one weight at a time."""
    format, book = part.segment.format, None
    if not format.is_integer:
        book = code_book(format.element).tolist()
    rows = []
    for n, codes in enumerate(part.codes.tolist()):
        row = []
        for k, code in enumerate(codes):
            g = k // format.group_size if format.group_size > 0 else 0
            m = 0 if part.scale.shape[0] == 1 else n
            stored = part.scale[m, g].item()
            if format.scale == "f16":
                scale = stored
            elif format.scale == "e8m0":
                scale = 2.0 ** (stored - 127)
            elif format.scale == "e4m3":
                scale = part.row_scale.item() * code_book("e4m3")[stored].item()
            else:
                scale = part.row_scale[n].item() * stored / (2**format.scale_bits - 1)
            zero = 2 ** (format.bits - 1)
            if part.zero is not None:
                top, zero_top = 2**format.bits - 1, 2**format.zero_bits - 1
                zero = part.zero[m, g].item() * top / zero_top
            row.append((book[code] if book else code - zero) * scale)
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", SCHEMES)
def test_dequantizing_follows_the_documented_formula(name: str) -> None:
    weight = quantize_rtn(random_weight(3, 150), Scheme.parse(name).segments(150))
    expected = torch.tensor(element_by_element(weight.segments[0]), dtype=torch.float64)
    # Float32 roundings: two in a two-level scale, one in the last product; and two in a zero point
    # finer than a code, which count relative to the zero point, not to the difference.
    zeros = 2**-22 * float(effective_scale(weight.segments[0]).max()) * 2**8
    torch.testing.assert_close(
        dequantize(weight).to(torch.float64),
        expected,
        rtol=4 * 2**-24,
        atol=zeros if weight.segments[0].segment.format.zero_step != 1.0 else 1e-38,
    )


@pytest.mark.parametrize("name", ["w4g64zs6", "w4t", "mxfp4", "nvfp4"])
def test_effective_scales_have_a_row_per_row(name: str) -> None:
    segments = Scheme.parse(name).segments(80)
    part = quantize_rtn(random_weight(3, 80), segments).segments[0]
    scale = effective_scale(part)
    assert scale.dtype == torch.float32
    assert scale.shape == (3, segments[0].format.groups(80))


def test_every_e8m0_byte_is_its_power_of_two() -> None:
    segment = Segment(0, 255 * 32, Scheme.parse("mxfp4").weight)
    codes = torch.zeros(1, 255 * 32, dtype=torch.uint8)
    scale = torch.arange(255, dtype=torch.int32).to(torch.uint8)[None]
    exact = [math.ldexp(1.0, exponent - 127) for exponent in range(255)]
    assert effective_scale(QuantizedSegment(segment, codes, scale))[0].tolist() == exact


def test_dequantizing_casts_last() -> None:
    weight = quantize_rtn(random_weight(4, 64), Scheme.parse("w5g32zs6").segments(64))
    assert torch.equal(dequantize(weight, torch.bfloat16), dequantize(weight).to(torch.bfloat16))


def test_a_stack_of_experts_is_its_matrices_below_each_other() -> None:
    stack = random_weight(3 * 5, 96).view(3, 5, 96)
    segments = Scheme.parse("w4g64zs6").segments(96)
    together = dequantize(quantize_rtn(stack.reshape(15, 96), segments)).view(3, 5, 96)
    for expert, values in zip(stack, together, strict=True):
        assert torch.equal(dequantize(quantize_rtn(expert, segments)), values)


def damage(suffix: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Packed tensors of a good [4, 64] w4g32zs6 weight, with one of them replaced or removed."""
    tensors = pack(quantize_rtn(random_weight(4, 64), Scheme.parse("w4g32zs6").segments(64)))
    tensors.pop(suffix, None)
    return tensors if value is None else {**tensors, suffix: value}


@pytest.mark.parametrize(
    ("suffix", "value", "complaint"),
    [
        ("_packed", None, "missing"),
        ("_packed_1", torch.zeros(1), "unexpected"),
        ("_packed", torch.zeros(4, 7, dtype=torch.int32), r"\[4, 7\], expected int32 \[4, 8\]"),
        ("_packed", torch.zeros(4, 8, dtype=torch.int64), "expected int32"),
        ("_scale", torch.zeros(4, 3, dtype=torch.uint8), r"expected uint8 \[4, 2\]"),
        ("_row_scale", torch.full((4,), math.nan, dtype=torch.float16), "damaged"),
        ("_row_scale", torch.full((4,), -1.0, dtype=torch.float16), "damaged"),
        ("_zero_point", torch.zeros(2, 2, dtype=torch.int32), r"expected int32 \[1, 2\]"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_refused(
    suffix: str, value: torch.Tensor | None, complaint: str
) -> None:
    with pytest.raises(FormatError, match=complaint):
        unpack(damage(suffix, value), (4, 64), Scheme.parse("w4g32zs6").segments(64))


@pytest.mark.parametrize(
    ("name", "suffix", "byte"),
    [("mxfp4", "_scale", 255), ("nvfp4", "_scale", 0x7F), ("nvfp4", "_scale", 0x81),
     ("fp8", "_packed", 0xFF), ("fp8e5m2", "_packed", 0x7C)],
)  # fmt: skip
def test_codes_that_are_not_numbers_are_refused(name: str, suffix: str, byte: int) -> None:
    segments = Scheme.parse(name).segments(64)
    tensors = pack(quantize_rtn(random_weight(2, 64), segments))
    tensors[suffix][1, 1] = byte
    with pytest.raises(FormatError, match="damaged"):
        unpack(tensors, (2, 64), segments)


def test_segments_must_cover_the_row_exactly_once() -> None:
    format = Scheme.parse("w4").weight
    wrong = [[], [(0, 63)], [(0, 65)], [(1, 63)], [(0, 32), (31, 33)], [(0, 64), (64, 0)]]
    for places in wrong:
        with pytest.raises(FormatError, match="segments"):
            packed_layout((4, 64), [Segment(start, length, format) for start, length in places])
    for shape in ((64,), (2, 4, 64), (0, 64)):
        with pytest.raises(FormatError, match="matrix"):
            packed_layout(shape, Scheme.parse("w4").segments(64))


def test_a_segment_with_parts_that_do_not_fit_cannot_be_built() -> None:
    segment = Segment(0, 64, Scheme.parse("w4g32").weight)
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    scale = torch.ones(4, 2, dtype=torch.float16)
    with pytest.raises(FormatError, match="zero is uint8"):
        QuantizedSegment(segment, codes, scale, zero=torch.zeros(4, 2, dtype=torch.uint8))
    with pytest.raises(FormatError, match="scale is float32"):
        QuantizedSegment(segment, codes, scale.to(torch.float32))
    with pytest.raises(FormatError, match="row_scale is float16"):
        QuantizedSegment(segment, codes, scale, row_scale=scale[:, 0])
    with pytest.raises(FormatError, match="codes"):
        QuantizedSegment(segment, codes[:, :32], scale)
    with pytest.raises(FormatError, match="rows"):
        QuantizedWeight((5, 64), (QuantizedSegment(segment, codes, scale),))
