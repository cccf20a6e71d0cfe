"""A linear whose inputs are rounded, segment by segment: what it is, and how the operator takes
it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import FormatError, UsageError
from quantlib.formats import (
    ActivationFormat,
    ActivationSegment,
    Scheme,
    dequantize,
    fake_quantize,
    pack,
    quantize_activations,
    quantize_rtn,
    scale_columns,
    with_clips,
)
from quantlib.kernels import ops, reference
from quantlib.kernels.packed import PackedWeight, activations_of, parse_activations

SCHEMES = [
    "w4a4zh8/8", "w4g64zs4a4zh8x3/16", "w4a4h8/8", "w8a8g128", "w4g32a7zg64", "w8a6h8/2",
    "mxfp4amxfp4hmxfp6/8", "nvfp4anvfp4hfp8/8", "w4amxfp8", "w3a8h8/8",
]  # fmt: skip
COLUMNS = 320


def made(scheme, rows=48, columns=COLUMNS):
    """The unpacked and the packed weight, and activations with clip factors."""
    parsed = Scheme.parse(scheme)
    generator = torch.Generator().manual_seed(0)
    weight = quantize_rtn(torch.randn(rows, columns, generator=generator), parsed.segments(columns))
    packed = PackedWeight.from_tensors(pack(weight), weight.shape, parsed.segments(columns))
    activations = parsed.activations(columns)
    return weight, packed, with_clips(activations, [0.9] * len(activations))


def tokens(count, columns=COLUMNS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator) + 0.2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reference_multiplies_what_fake_quantize_gives(scheme):
    weight, _, activations = made(scheme)
    x, bias = tokens(5), torch.randn(48)
    expected = fake_quantize(x, activations).double() @ dequantize(weight).double().T + bias
    # fake_quantize rounds every product of code and scale to float32 once, and so does the result.
    found = reference.linear(x, weight, bias, activations=activations)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("scheme", ["w4a4h8/8", "w4a4zh8/8", "w8g64a7zg64", "w8a6h8/2"])
def test_the_reference_is_integer_arithmetic(scheme):
    """Of int8 codes without zero points: per segment an integer product, times two scales."""
    weight, _, activations = made(scheme)
    x = tokens(4)
    codes, scales = quantize_activations(x, activations)
    total = torch.zeros(4, 48, dtype=torch.float64)
    groups = scale_columns(activations)
    for part in weight.segments:
        start, form = part.segment.start, part.segment.format
        size = form.group_size or part.segment.length
        for group in range(form.groups(part.segment.length)):
            inside = slice(
                start + group * size, start + min((group + 1) * size, part.segment.length)
            )
            numbers = part.codes[:, inside.start - start : inside.stop - start].to(torch.int64)
            numbers = numbers - (1 << (form.bits - 1))
            weight_scale = part.scale[:, group].double()
            for index, columns in enumerate(groups):
                both = slice(max(columns.start, inside.start), min(columns.stop, inside.stop))
                if both.start >= both.stop:
                    continue
                own = numbers[:, both.start - inside.start : both.stop - inside.start]
                product = codes[:, both].to(torch.int64) @ own.T
                total += product * scales[:, index, None].double() * weight_scale
    found = reference.linear(x, weight, activations=activations)
    # One rounding to float32 at the end; weights of this reference are float32 products.
    torch.testing.assert_close(found.double(), total, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("count", [1, 8, 33])
def test_the_operator_computes_the_reference(scheme, count):
    weight, packed, activations = made(scheme)
    x, bias = tokens(count), torch.randn(48)
    found = ops.linear(x, packed, bias, activations=activations)
    expected = reference.linear(x, weight, bias, activations=activations)
    # Sums of 320 products in float32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("group", [0, 128, 256])
def test_eight_bits_everywhere_are_mode_int8(group):
    _, packed, _ = made("w4g64h8/8")
    activations = reference.int8_activations(packed.segments, group)
    x = tokens(5)
    found = ops.linear(x, packed, activations=activations)
    assert torch.equal(found, ops.linear(x, packed, mode="int8", act_group=group))
    clipped = with_clips(activations, [0.5] * len(activations))
    assert not torch.equal(found, ops.linear(x, packed, activations=clipped))


def test_int8_mode_of_the_reference_is_eight_bits_everywhere():
    weight, packed, _ = made("w4g64h8/8")
    x = tokens(5)
    for group in (0, 128):
        activations = reference.int8_activations(packed.segments, group)
        expected = reference.linear(x, weight, activation_bits=8, act_group=group)
        assert torch.equal(reference.linear(x, weight, activations=activations), expected)


def test_tokens_that_are_not_finite_give_nan_and_spoil_no_others():
    _, packed, activations = made("w4a4zh8/8")
    x = tokens(4)
    expected = ops.linear(x, packed, activations=activations)
    for bad in (torch.nan, torch.inf):
        spoiled = x.clone()
        spoiled[2, 7] = bad
        found = ops.linear(spoiled, packed, activations=activations)
        assert found[2].isnan().all()
        assert torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])


def test_torch_accepts_rounded_inputs_as_an_argument_of_the_operator():
    _, packed, activations = made("w4a4zh8/8")
    x, rounding = tokens(3), activations_of(activations)
    given = (x, list(packed.tensors.values()), packed.layout, None, "exact", 0, rounding)
    torch.library.opcheck(torch.ops.quantlib.linear, given)
    expected = ops.linear(x, packed, activations=activations)
    assert torch.equal(torch.ops.quantlib.linear(*given), expected)
    compiled = torch.compile(
        lambda x: ops.linear(x, packed, activations=rounding).relu(),
        backend="aot_eager",
        fullgraph=True,
    )
    assert torch.equal(compiled(x), expected.relu())


def test_what_does_not_fit_is_refused():
    _, packed, activations = made("w4a4zh8/8")
    with pytest.raises(UsageError, match="one of the two"):
        ops.linear(tokens(2), packed, None, "int8", activations=activations)
    narrow = Scheme.parse("w4a4").activations(64)
    with pytest.raises(FormatError, match="cover 64 of 320"):
        ops.linear(tokens(2), packed, activations=narrow)
    with pytest.raises(FormatError, match="cover 64 of 320"):
        reference.linear(tokens(2), made("w4a4")[0], activations=narrow)


forms = st.builds(
    ActivationFormat,
    bits=st.integers(2, 7),
    symmetric=st.booleans(),
    clip=st.floats(1e-3, 1.0),
    group=st.sampled_from([0, 16, 128]),
) | st.sampled_from(["mxfp4", "nvfp4", "fp8e5m2"]).map(
    lambda name: replace(ActivationFormat(element=name), clip=0.123456789)
)


@given(found=st.lists(st.tuples(st.integers(1, 999), forms), max_size=4))
def test_activations_are_one_line_of_text(found):
    segments, start = [], 0
    for length, form in found:
        segments.append(ActivationSegment(start, length, form))
        start += length
    assert parse_activations(activations_of(segments)) == tuple(segments)


@pytest.mark.parametrize(
    "text", ["4", "0:64:4", "0:64:4:x", "a:64:4:1.0", "0:64:4:2.0", "0:64:q:1"]
)
def test_text_that_says_nothing_is_refused(text):
    with pytest.raises(FormatError, match=r"\w+ \w+"):
        parse_activations(text)
