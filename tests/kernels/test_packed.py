"""PackedWeight holds the checkpoint's tensors, checks them, and copies nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.formats import Scheme, Segment, dequantize
from quantlib.kernels.ops import PackedWeight
from quantlib.kernels.packed import layout_of, parse_layout, suffixes_of

SCHEMES = ["w4g64", "w2t", "w3g16z5", "w8g128zs6", "fp8t", "mxfp6", "nvfp4", "w6tz"]


@given(
    rows=st.integers(1, 10**6),
    parts=st.lists(st.tuples(st.sampled_from(SCHEMES), st.integers(1, 9000)), min_size=1),
)
def test_layouts_read_back_as_they_were_written(rows, parts):
    segments, start = [], 0
    for scheme, length in parts:
        segments.append(Segment(start, length, Scheme.parse(scheme).weight))
        start += length
    assert parse_layout(layout_of((rows, start), segments)) == ((rows, start), tuple(segments))


@pytest.mark.parametrize("text", ["", "4x8", "4x8|0:8:int4:64:0", "x|", "4x8|0:8:int9:64:0:f16"])
def test_other_text_is_not_a_layout(text):
    with pytest.raises(FormatError):
        suffixes_of(text)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_tensors_shares_memory_and_unpacks_to_the_same_weight(draw, scheme):
    weight, packed = draw(37, [(scheme, 100), ("w4g32", 60)])
    again = PackedWeight.from_tensors(packed.tensors, packed.shape, packed.segments)
    for suffix, tensor in packed.tensors.items():
        assert again.tensors[suffix].data_ptr() == tensor.data_ptr()
    assert again.nbytes == sum(tensor.nbytes for tensor in packed.tensors.values())
    assert torch.equal(dequantize(again.to_quantized()), dequantize(weight))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_selected_rows_are_those_rows(draw, scheme):
    weight, packed = draw(37, [(scheme, 100), ("w4g32", 60)])
    rows = torch.tensor([36, 3, 3, 0])
    chosen = packed.select_rows(rows)
    assert torch.equal(dequantize(chosen.to_quantized()), dequantize(weight)[rows])


def test_one_row_of_a_shared_scale_is_still_one_row(draw):
    weight, packed = draw(1, [("nvfp4", 32), ("w4t", 8), ("w4tz", 8)])
    chosen = packed.select_rows(torch.tensor([0, 0]))
    assert torch.equal(dequantize(chosen.to_quantized()), dequantize(weight)[[0, 0]])


def test_tensors_that_do_not_fit_are_refused(draw):
    _, packed = draw(37, [("w4g64z", 100)])
    without = {suffix: t for suffix, t in packed.tensors.items() if suffix != "_zero_point"}
    with pytest.raises(FormatError, match=r"missing \['_zero_point'\]"):
        PackedWeight.from_tensors(without, packed.shape, packed.segments)
    short = packed.tensors | {"_packed": packed.tensors["_packed"][:, 1:]}
    with pytest.raises(
        FormatError, match=r"_packed is int32 \[37, 12\], expected int32 \[37, 13\]"
    ):
        PackedWeight.from_tensors(short, packed.shape, packed.segments)
    wide = packed.tensors | {"_scale": packed.tensors["_scale"].float()}
    with pytest.raises(FormatError, match="_scale is float32"):
        PackedWeight.from_tensors(wide, packed.shape, packed.segments)


def test_a_strided_view_is_made_contiguous(draw):
    weight, packed = draw(37, [("w4g64", 128)])
    stored = packed.tensors["_packed"]
    view = torch.stack([stored, stored], dim=-1)[..., 0]
    assert not view.is_contiguous()
    again = PackedWeight.from_tensors(
        packed.tensors | {"_packed": view}, packed.shape, packed.segments
    )
    assert torch.equal(dequantize(again.to_quantized()), dequantize(weight))
