"""Packed convolutions: two ways to compute them, and both are torch's convolution."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantlib.errors import ModelError
from quantlib.formats.activation import fake_quantize
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize
from quantlib.models.window import Window, from_rows, to_rows
from quantlib.runtime.assemble import quantize_in_memory
from quantlib.runtime.convolution import QuantizedConvolution

TOLERANCE = 1e-4
"""Of numbers around 1: the same products in another order, in float32."""
SEGMENTS = "w4g32zs4"


class Holder(nn.Module):
    """A model of one convolution."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.inner = convolution


def packed(dense: Any) -> tuple[Any, Any]:
    """The packed form of a convolution, and a dense one with the same numbers."""
    matrix = dense.weight.detach().reshape(dense.out_channels, -1)
    weight = quantize_rtn(matrix, Scheme.parse(SEGMENTS).segments(matrix.shape[1]))
    twin = copy.deepcopy(dense)
    with torch.no_grad():
        twin.weight.copy_(dequantize(weight).reshape(dense.weight.shape))
    model = Holder(dense)
    quantize_in_memory(model, {"inner.weight": weight})
    assert isinstance(model.inner, QuantizedConvolution)
    return model.inner, twin


SHAPES = [
    (nn.Conv1d(8, 40, 3, padding=1), (2, 8, 12)),
    (nn.Conv1d(8, 40, 3, stride=2, padding=1, bias=False), (8, 30)),
    (nn.Conv2d(3, 48, 4, stride=4), (1, 3, 8, 8)),
    (nn.Conv2d(3, 8, 3, padding="same", dilation=2), (2, 3, 9, 7)),
    (nn.Conv2d(4, 8, (1, 3), padding=(0, 1), padding_mode="reflect"), (1, 4, 6, 6)),
    (nn.Conv3d(3, 40, (2, 4, 4), stride=(2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
]


@pytest.mark.parametrize(("dense", "shape"), SHAPES)
def test_a_packed_convolution_is_torchs(dense: Any, shape: tuple[int, ...]) -> None:
    module, twin = packed(copy.deepcopy(dense))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = twin(x)
        found = module(x)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_smaller_of_dense_filters_and_unfolded_input_is_made() -> None:
    module, twin = packed(nn.Conv2d(3, 40, 3, padding=1))
    few, many = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(module(few), twin(few), rtol=TOLERANCE, atol=TOLERANCE)
        assert module._dense is None  # 16 places, 40 filters
        torch.testing.assert_close(module(many), twin(many), rtol=TOLERANCE, atol=TOLERANCE)
        assert module._dense is not None  # 256 places
    assert set(module.state_dict()) == {*module.packed_names(), "bias"}
    assert copy.deepcopy(module)._dense is None


def test_filters_that_are_cast_are_made_again() -> None:
    module, _ = packed(nn.Conv2d(3, 8, 3, bias=False))
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        before = module(x)
        module.to(torch.bfloat16)
        assert module.weight.dtype == torch.bfloat16
        assert module(x.bfloat16()).dtype == torch.bfloat16
        module.to(torch.float32)
        assert torch.equal(module(x), before)


def test_models_may_ask_for_what_torchs_convolutions_have() -> None:
    dense = nn.Conv2d(3, 8, (3, 5), stride=(1, 2), dilation=1)
    module, twin = packed(copy.deepcopy(dense))
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
        assert getattr(module, name) == getattr(dense, name), name
    torch.testing.assert_close(module.weight, twin.weight.detach())


def test_grouped_convolutions_are_no_matrix_product() -> None:
    with pytest.raises(ModelError, match="inner is not a convolution of all channels"):
        Window.of("inner", nn.Conv2d(4, 4, 3, groups=2))


@settings(max_examples=30)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(5, 9)
)
def test_rows_times_filters_are_the_convolution(
    kernel: int, stride: int, dilation: int, padding: int, size: int
) -> None:
    generator = torch.Generator().manual_seed(size)
    dense = nn.Conv2d(2, 3, kernel, stride, padding, dilation, bias=False)
    window = Window.of("dense", dense)
    x = torch.randn(2, 2, size, size, generator=generator)
    with torch.no_grad():
        expected = dense(x)
        rows = window.rows(x) @ dense.weight.reshape(3, -1).T
    assert window.places(x) == tuple(expected.shape[2:])
    assert rows.shape[1] == 3
    assert window.rows(x).shape[1] == window.columns
    found = from_rows(rows, 2, window.places(x))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(to_rows(found), rows)


@pytest.mark.parametrize("form", ["4", "8", "fp6"])
def test_inputs_are_rounded_sample_by_sample_where_the_scheme_says_so(form: str) -> None:
    module, twin = packed(nn.Conv2d(3, 8, 3, padding=1))
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    x[1] *= 30
    columns = module.window.columns
    activations = Scheme.parse(f"w4a{form}").activations(columns)
    module.set_inputs("weight", activations)
    whole = Scheme.parse(f"w4a{form}").activations(x[0].numel())
    rounded = fake_quantize(x.flatten(1), whole).view(x.shape)
    with torch.no_grad():
        assert torch.allclose(module(x), twin(rounded), atol=30 * TOLERANCE)
        assert torch.allclose(module(x[2]), twin(rounded[2]), atol=TOLERANCE)
        module.mode = "exact"
        assert torch.allclose(module(x), twin(x), atol=30 * TOLERANCE)


@pytest.mark.parametrize("scheme", ["w4a4z", "w4a8g16", "w4a4h8/4"])
def test_inputs_in_parts_are_refused(scheme: str) -> None:
    module, _ = packed(nn.Conv2d(16, 8, 3))
    with pytest.raises(ModelError, match="window of a convolution"):
        module.set_inputs("weight", Scheme.parse(scheme).activations(module.window.columns))
