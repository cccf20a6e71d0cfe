"""Products in Triton's interpreter, or on a GPU: every width, ragged shapes, floats within a bound
that follows from float32, integers exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.formats import dequantize
from quantlib.formats.activation import (
    ActivationFormat,
    ActivationSegment,
    fake_quantize,
    quantize,
    quantize_float8,
)
from quantlib.kernels import workspace
from quantlib.kernels.triton import launch, layout
from quantlib.kernels.triton.configurations import Configuration

from .bounds import assert_close, expected, moved

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SMALL = Configuration(block_rows=16, block_tokens=16, warps=4, stages=2)
# Scheme, tokens, rows, columns, dtype: every width, every way of scaling, N and K that nothing
# divides, fewer columns than a tile.
CASES = [
    ("w2g16z8", 1, 20, 72, F16),
    ("w2g64z4s4", 5, 33, 331, BF16),
    ("w3g32s4", 17, 18, 200, F32),
    ("w3z", 3, 17, 130, F16),
    ("w4", 20, 31, 331, F16),
    ("w4g64z5s5", 3, 40, 193, BF16),
    ("w4t", 2, 16, 128, F16),
    ("w5g128z7", 4, 20, 272, F32),
    ("w6g32z", 17, 19, 100, F16),
    ("w7g256", 2, 20, 700, BF16),
    ("w7g16z", 1, 16, 90, F16),
    ("w8g16zs8", 2, 20, 72, F16),
    ("w8z", 18, 17, 80, F32),
    ("fp8", 3, 20, 150, F16),
    ("fp8e5m2g64", 2, 20, 150, BF16),
    ("fp6", 2, 17, 140, F16),
    ("fp6e2m3g32", 2, 17, 140, F16),
    ("mxfp4", 3, 20, 200, F16),
    ("mxfp8", 1, 20, 96, F32),
    ("nvfp4", 3, 20, 200, F16),
    ("fp5e2m2g32", 3, 20, 200, BF16),
    ("fp5e3m1", 2, 17, 140, F16),
    ("fp6e4m1g64", 2, 17, 140, F32),
    ("fp7e2m4g16", 3, 20, 90, F16),
    ("fp7e3m3", 2, 17, 140, BF16),
    ("fp7e4m2t", 17, 16, 128, F16),
    ("fp7e5m1", 2, 17, 140, F16),
    ("fp8e2m5g64", 2, 20, 150, F16),
    ("fp8e3m4", 1, 20, 96, BF16),
]
SEGMENTS = [[("w4g64z6", 192), ("w8", 64)], [("w2g16z", 100), ("mxfp4", 31), ("w8g32", 145)]]


def inputs(tokens, columns, dtype=F32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_every_format_and_ragged_shapes(draw, device, case):
    scheme, tokens, rows, columns, dtype = case
    weight, _ = draw(rows, [(scheme, columns)])
    x, bias = inputs(tokens, columns, dtype), inputs(1, rows, dtype, 2)[0]
    packed = layout.pack(moved(weight, device))
    found = launch.linear(x.to(device), packed, bias.to(device), SMALL)
    assert found.dtype == dtype
    assert_close(found, *expected(weight, x, bias))


@pytest.mark.parametrize("parts", SEGMENTS, ids=len)
@pytest.mark.parametrize("splits", [1, 2])
def test_segments_and_splits_are_added_up(draw, device, parts, splits):
    weight, _ = draw(21, parts)
    x, bias = inputs(3, weight.shape[1], F16), inputs(1, 21, F16)[0]
    packed, split = layout.pack(moved(weight, device)), Configuration(16, 16, 4, 2, splits)
    found = launch.linear(x.to(device), packed, bias.to(device), split)
    assert_close(found, *expected(weight, x, bias))


@settings(max_examples=6)
@given(
    bits=st.integers(2, 8),
    tokens=st.integers(0, 20),
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    splits=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_any_shape_in_any_number_of_splits(draw, device, bits, tokens, rows, columns, splits, seed):
    weight, _ = draw(rows, [(f"w{bits}g128z", columns)], seed=seed)
    x = inputs(tokens, columns, F16, seed)
    packed, split = layout.pack(moved(weight, device)), Configuration(32, 16, 4, 2, splits)
    found = launch.linear(x.to(device), packed, None, split)
    assert found.shape == (tokens, rows)
    assert_close(found, *expected(weight, x))


ROUNDED = [
    ("w4", "8"),
    ("w4g64z5s5", "4zg128"),
    ("w8z", "8g128"),
    ("w8g32", "8"),
    ("w3g16z", "8"),
    ("w5", "4z"),
    ("w2g128z4", "8g48"),
    ("w7z", "8g256"),
    ("w6g64", "6zg64"),
]


@pytest.mark.parametrize(("scheme", "form"), ROUNDED)
def test_integers_are_multiplied_exactly(draw, device, scheme, form):
    """Scales that are powers of two make the result an integer: not a bit may differ."""
    columns = 331
    weight, _ = draw(23, [(scheme, columns)], unit_scales=True)
    activations = (ActivationSegment(0, columns, ActivationFormat.parse(form)),)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (5, columns), generator=generator).to(torch.int8)
    count = -(-columns // (activations[0].format.group or columns))
    scales = torch.exp2(torch.randint(-3, 4, (5, count), generator=generator).float())
    numbers = (
        codes.double()
        * scales.repeat_interleave(activations[0].format.group or columns, dim=1)[:, :columns]
    )
    exact, _ = expected(weight, numbers)
    given = codes.to(device), scales.to(device), layout.pack(moved(weight, device))
    found = launch.integer_linear(*given, activations, dtype=F32, configuration=SMALL)
    if weight.segments[0].segment.format.two_level or weight.segments[0].zero is not None:
        # Fractional zero points and two-level scales round, as float32 does.
        _, bound = expected(weight, numbers.float())
        assert_close(found, exact, bound)
    else:
        assert torch.equal(found.cpu().double(), exact)


def test_the_form_of_resq_with_wider_columns(draw, device):
    """4-bit asymmetric activations in groups, and a slice of 8 bits, of weights of 4 and 8 bits."""
    weight, _ = draw(37, [("w4g64z5s5", 448), ("w8g64z5s5", 64)])
    activations = (
        ActivationSegment(0, 448, ActivationFormat.parse("4zg128")),
        ActivationSegment(448, 64, ActivationFormat.parse("8")),
    )
    x = inputs(6, 512)
    codes, scales = quantize(x, activations)
    rounded = codes.float() * scales[:, [0] * 128 + [1] * 128 + [2] * 128 + [3] * 64 + [4] * 64]
    given = codes.to(device), scales.to(device), layout.pack(moved(weight, device))
    assert_close(launch.integer_linear(*given, activations), *expected(weight, rounded))


def test_scales_that_change_within_16_columns_have_no_integer_kernel(draw):
    weight, _ = draw(8, [("w4", 20), ("w8", 44)])
    activations = (
        ActivationSegment(0, 24, ActivationFormat(8)),
        ActivationSegment(24, 40, ActivationFormat(8)),
    )
    packed = layout.pack(weight)
    assert launch.integer_plan(packed, activations) is None
    with pytest.raises(FormatError, match="change within 16 columns"):
        launch.integer_linear(
            torch.zeros(1, 64, dtype=torch.int8), torch.ones(1, 2), packed, activations
        )


FLOAT8 = [
    ("fp8", "fp8"),
    ("fp8e5m2g64", "fp8e5m2"),
    ("mxfp8", "mxfp8"),
    ("fp8g128", "mxfp8"),
    ("mxfp8e5m2", "fp8e5m2"),
]


@pytest.mark.parametrize(("scheme", "form"), FLOAT8)
@pytest.mark.parametrize("splits", [1, 3])
def test_eight_bit_floats_are_multiplied_as_codes(draw, device, scheme, form, splits):
    if not launch.has_float8(device):
        pytest.skip("these tensor cores do not multiply 8-bit floats")
    weight, _ = draw(23, [(scheme, 331)])
    activations = (ActivationSegment(0, 331, ActivationFormat.parse(form)),)
    x = inputs(5, 331)
    codes, scales = quantize_float8(x, activations)
    given = codes.to(device), scales.to(device), layout.pack(moved(weight, device))
    found = launch.float8_linear(
        *given, activations, configuration=Configuration(16, 16, 4, 2, splits)
    )
    rounded = fake_quantize(x, activations)
    exact, bound = expected(weight, rounded)
    if device.type == "cuda":
        # Hopper adds the products of 32 columns with 13 bits behind the largest one's first.
        bound = bound + 2.0**-13 * rounded.double().abs() @ dequantize(weight).double().abs().T
    assert_close(found, exact, bound)


def test_eight_bit_floats_of_two_kinds_have_no_product_of_codes(draw):
    weight, _ = draw(8, [("fp8", 64)])
    packed = layout.pack(weight)
    for form in ("fp8e5m2", "8", "fp6"):
        activations = (ActivationSegment(0, 64, ActivationFormat.parse(form)),)
        assert launch.float8_plan(packed, activations) is None
    with pytest.raises(FormatError, match="8-bit floats of one kind"):
        launch.float8_linear(
            torch.zeros(1, 64, dtype=torch.float8_e5m2), torch.ones(1, 1), packed, activations
        )


def test_partial_sums_that_do_not_fit_are_made_for_fewer_tokens_at_a_time(
    draw, device, monkeypatch
):
    weight, _ = draw(21, SEGMENTS[0])
    x, packed = inputs(7, 256, F16).to(device), layout.pack(moved(weight, device))
    whole = launch.linear(x, packed, None, SMALL)
    monkeypatch.setattr(workspace, "BYTES", 4 * 21 * 2 * 3)  # two segments, three tokens
    assert torch.equal(launch.linear(x, packed, None, SMALL), whole)


def test_splits_do_not_depend_on_the_run(draw, device):
    weight, _ = draw(16, [("w4g64", 1024)])
    x, packed = inputs(2, 1024, F16).to(device), layout.pack(moved(weight, device))
    split = Configuration(16, 16, 4, 2, 4)
    first = launch.linear(x, packed, None, split)
    again = 3 if device.type == "cpu" else 20
    assert all(torch.equal(launch.linear(x, packed, None, split), first) for _ in range(again))


@pytest.mark.parametrize(
    "scheme", ["w4g64zs6", "w3", "w5g16z4", "w8t", "fp8e5m2", "nvfp4", "fp7e2m4"]
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_are_dequantized(draw, device, scheme, dtype):
    weight, _ = draw(37, [(scheme, 150)])
    packed, dense = layout.pack(moved(weight, device)), dequantize(weight)
    # Two-level scales are rounded in another order: three float32 roundings, and the last one.
    tolerance = {"rtol": 4 * 2.0**-24 + (2.0**-8 if dtype == BF16 else 0), "atol": 0}
    found = launch.dequantize(packed, dtype)
    torch.testing.assert_close(found.cpu().float(), dense, **tolerance)
    ids = torch.tensor([36, 0, 5, 5], device=device)
    assert torch.equal(launch.dequantize(packed, dtype, ids), found[ids])
    assert launch.dequantize(packed, dtype, torch.tensor([37, -1], device=device)).isnan().all()
    assert launch.dequantize(packed, dtype, ids[:0]).shape == (0, 150)
