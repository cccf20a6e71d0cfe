"""Tokens rotated, put in order and rounded segment by segment: every instruction set gives the bits
of `tile_reference`."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.formats.activation import ActivationFormat, ActivationSegment, quantize
from quantlib.kernels import layouts, reference, tile_reference
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.cpu.forms import BlockRotation, form, why_not
from quantlib.transforms import hadamard

from .test_bits import same_bits
from .test_linear import assert_close

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SCHEMES = ["w4g64", "w2g16z", "w4g32zs4", "w3g128", "w8", "w5g64zs6", "w4g64z5s5", "mxfp4", "fp8"]
SCHEMES += ["w6g256zs7", "w4tz", "nvfp4", "mxfp6e2m3", "fp5e2m2g64", "fp7e2m4", "fp7e5m1"]

SIZES = [(512, 512), (96, 32), (32, 16), (64, 4), (40, 20), (576, 576), (1536, 1536), (192, 96)]
SIZES += [(144, 48), (24, 12), (140, 28), (7, 1), (224, 224), (1, 1), (6, 2)]
"""Columns of a token, and of the blocks that are rotated."""

any_format = st.one_of(
    st.builds(
        ActivationFormat,
        bits=st.integers(2, 8),
        clip=st.sampled_from([1.0, 0.9, 0.5]),
        group=st.sampled_from([0, 0, 16, 32, 64, 128, 384]),
    ),
    st.builds(
        ActivationFormat,
        bits=st.integers(2, 7),
        symmetric=st.just(False),
        clip=st.sampled_from([1.0, 0.85]),
        group=st.sampled_from([0, 0, 16, 32, 64, 256]),
    ),
)


def follow(parts: list[tuple[int, ActivationFormat]]) -> tuple[ActivationSegment, ...]:
    """Segments of these lengths, one after the other."""
    starts = [sum(length for length, _ in parts[:i]) for i in range(len(parts))]
    return tuple(
        ActivationSegment(start, length, how) for start, (length, how) in zip(starts, parts)
    )


def draw_tokens(tokens: int, columns: int, seed: int) -> torch.Tensor:
    """With a mean and columns of different sizes; some tokens are not numbers, or tiny, or zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) * 3
    x *= torch.rand(columns, generator=generator)
    x += torch.randn(1, generator=generator)
    special = (torch.nan, torch.inf, 3e38, -3e38, 1e-45)[seed % 5]
    x[seed % tokens, seed % columns] = special
    x[tokens // 2] *= 1e-41 if seed % 3 == 0 else 0.0
    return x


@SETTINGS
@given(
    parts=st.lists(
        st.tuples(st.sampled_from(SCHEMES), st.integers(1, 300), any_format),
        min_size=1,
        max_size=3,
    ),
    rows=st.sampled_from([5, 37, 64]),
    tokens=st.sampled_from([1, 2, 5, 8, 14, 19]),
    seed=st.integers(0, 1000),
)
def test_any_formats_of_any_segments_give_the_reference_bits(
    library, draw, parts, rows, tokens, seed
):
    weight, packed = draw(rows, [(scheme, length) for scheme, length, _ in parts], seed=seed)
    activations = follow([(length, how) for _, length, how in parts])
    segments = [part.segment for part in weight.segments]
    x = draw_tokens(tokens, weight.shape[1], seed)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    expected = tile_reference.linear(x, weight, bias, activations=activations)
    tiled = layouts.tile(packed)
    shaped = form(segments, activations)
    for isa in filter(library.supports, cpu.ISAS[1:]):
        found = library.linear(tiled.description, x, bias, "exact", isa=isa, form=shaped)
        assert same_bits(found, expected), isa


@pytest.mark.parametrize("tokens", [1, 3, 8, 20, 200])
def test_a_resq_layer_is_one_integer_call(library, draw, isa, tokens):
    """Seven eighths at 4 bits, asymmetric activations; one eighth at 8 bits."""
    weight, packed = draw(70, [("w4g64", 448), ("w8g64", 64)])
    activations = follow([(448, ActivationFormat(4, False, 0.9)), (64, ActivationFormat(8))])
    x = draw_tokens(tokens, 512, 1) if tokens > 1 else torch.randn(1, 512)
    tiled = layouts.tile(packed)
    shaped = form([part.segment for part in weight.segments], activations)
    found = [
        library.linear(tiled.description, x, None, "exact", isa, threads, form=shaped)
        for threads in (1, 2)
    ]
    assert same_bits(found[0], found[1])
    few = library.linear(tiled.description, x[-1:], None, "exact", isa, form=shaped)
    assert same_bits(few, found[0][-1:])
    good = torch.isfinite(x).all(dim=1) & (x.abs().amax(dim=1) < 1e30)
    expected = reference.linear(x.double(), weight, activations=activations)
    assert_close(found[0][good], x[good], reference.dequantize(weight), expected[good])
    assert torch.equal(found[0].isfinite().all(dim=1), torch.isfinite(x).all(dim=1))


def test_segments_of_the_weight_may_share_a_scale(library, draw, isa):
    weight, packed = draw(40, [("w4g64", 128), ("w2g16z", 64), ("w8", 40)])
    activations = follow([(192, ActivationFormat(5, False)), (40, ActivationFormat(8))])
    grouped = follow([(192, ActivationFormat(6, group=32)), (40, ActivationFormat(3))])
    x = draw_tokens(7, 232, 3)
    tiled = layouts.tile(packed)
    for how in (activations, grouped):
        expected = tile_reference.linear(x, weight, activations=how)
        shaped = form([part.segment for part in weight.segments], how)
        found = library.linear(tiled.description, x, None, "exact", isa, form=shaped)
        assert same_bits(found, expected)


@pytest.mark.parametrize("group", [16, 32, 64])
def test_short_groups_end_with_their_segment(library, draw, isa, group):
    """The last piece of 128 columns is one of 96, and no multiple of the group."""
    weight, packed = draw(40, [("w4g128", 224), ("w8g128z", 90), ("w2g64z4s4", 160)])
    how = follow([(length, ActivationFormat(6, group=group)) for length in (224, 90, 160)])
    tiled = layouts.tile(packed)
    shaped = form([part.segment for part in weight.segments], how)
    x = torch.randn(20, 474, generator=torch.Generator().manual_seed(1))
    expected = tile_reference.linear(x, weight, activations=how)
    for tokens in (1, 2, 5, 20):
        found = library.linear(tiled.description, x[:tokens], None, "exact", isa, form=shaped)
        assert same_bits(found, expected[:tokens]), tokens


def test_eight_bits_for_all_is_mode_int8(library, draw, isa):
    weight, packed = draw(40, [("w4g64", 128), ("w8", 40)])
    x = torch.randn(5, 168, generator=torch.Generator().manual_seed(0))
    tiled = layouts.tile(packed)
    segments = [part.segment for part in weight.segments]
    for group in (0, 128):
        shaped = form(segments, reference.int8_activations(segments, group))
        found = library.linear(tiled.description, x, None, "exact", isa, form=shaped)
        again = library.linear(tiled.description, x, None, "int8", isa, act_group=group)
        assert torch.equal(found, again)


def rotation_of(size: int) -> BlockRotation:
    """That of `transforms.hadamard`."""
    m, _ = hadamard.split(size)
    return BlockRotation(size, hadamard.signs(m) if m > 1 else None)


@pytest.mark.parametrize(
    ("columns", "size"),
    SIZES,
)
def test_rotations_are_those_of_the_transforms_and_bits_those_of_the_reference(
    library, draw, columns, size
):
    weight, packed = draw(33, [("w8", columns)])
    segments = [part.segment for part in weight.segments]
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    rotated = tile_reference.rotate(x, rotation_of(size))
    exact = hadamard.rotate(x.double(), size)
    # Two roundings of 6e-8 a stage, and there are at most 7 + 36 additions in a row.
    assert (rotated.double() - exact).abs().max() <= 3e-6 * x.abs().max()
    tiled = layouts.tile(packed)
    how = follow([(columns, ActivationFormat(4, False))])
    for activations in ((), how):
        expected = tile_reference.linear(rotated, weight, activations=activations)
        shaped = form(segments, activations, rotation_of(size))
        for isa in filter(library.supports, cpu.ISAS[1:]):
            found = library.linear(tiled.description, x, None, "exact", isa, form=shaped)
            assert same_bits(found, expected), isa


@pytest.mark.parametrize(
    ("columns", "size", "still"),
    [(192, 32, 32), (110, 48, 14), (52, 12, 4), (250, 64, 33), (300, 256, 0), (212, 128, 20)],
)
@pytest.mark.parametrize("ordered", [False, True])
def test_the_last_columns_may_stay_as_they_are(library, draw, columns, size, still, ordered):
    """And blocks of a power of two need not divide the others."""
    wide = still or 44
    weight, packed = draw(33, [("w4g64", columns - wide), ("w8", wide)])
    segments = [part.segment for part in weight.segments]
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(5, columns, generator=generator)
    order = torch.randperm(columns, generator=generator) if ordered else None
    rotation = BlockRotation(size, rotation_of(size).dense, still)
    rotated, end = tile_reference.rotate(x, rotation), columns - still
    assert torch.equal(rotated[:, end:], x[:, end:])
    exact = hadamard.rotate(x[:, :end].double(), size)
    assert (rotated[:, :end].double() - exact).abs().max() <= 3e-6 * x.abs().max()
    rotated = rotated if order is None else rotated[:, order]
    tiled = layouts.tile(packed)
    how = follow([(columns - wide, ActivationFormat(4, False)), (wide, ActivationFormat(8))])
    for activations in ((), how):
        expected = tile_reference.linear(rotated, weight, activations=activations)
        shaped = form(segments, activations, rotation, order)
        for isa in filter(library.supports, cpu.ISAS[1:]):
            found = library.linear(tiled.description, x, None, "exact", isa, form=shaped)
            assert same_bits(found, expected), isa


def test_an_order_is_applied_after_the_rotation_and_before_rounding(library, draw, isa):
    weight, packed = draw(33, [("w4g64", 100), ("w8", 44)])
    segments = [part.segment for part in weight.segments]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 144, generator=generator)
    order = torch.randperm(144, generator=generator)
    how = follow([(100, ActivationFormat(4, False)), (44, ActivationFormat(8))])
    tiled = layouts.tile(packed)
    for rotation, rotated in (
        (None, x),
        (rotation_of(48), tile_reference.rotate(x, rotation_of(48))),
    ):
        for activations in ((), how):
            expected = tile_reference.linear(rotated[:, order], weight, activations=activations)
            shaped = form(segments, activations, rotation, order)
            found = library.linear(tiled.description, x, None, "exact", isa, form=shaped)
            assert same_bits(found, expected)


def test_zero_points_of_subnormal_ranges_fit_an_int8(library, draw, isa):
    """-149 is the exponent of the least number: a scale of one such step, and 127 codes."""
    _, packed = draw(3, [("w8", 64)])
    x = torch.zeros(1, 64)
    x[0, :60] = -torch.arange(60) * 2.0**-149 * 3
    how = follow([(64, ActivationFormat(7, False))])
    tiled = layouts.tile(packed)
    shaped = form(packed.segments, how)
    found = library.linear(tiled.description, x, None, "exact", isa, form=shaped)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("parts", "activations", "words"),
    [
        ([("w4g64", 100)], [(50, ActivationFormat(4)), (50, ActivationFormat(8))], "whole segment"),
        ([("w4g64", 100)], [(90, ActivationFormat(4))], "cover 90 of 100"),
        ([("w4g64", 96)], [(96, ActivationFormat(4, group=48))], "no activation groups of 48"),
        ([("w4g64", 96)], [(96, ActivationFormat(element="mxfp4"))], "not integers"),
        ([("w4g64", 96)], [(96, ActivationFormat(16))], "not integers"),
        (
            [("w4g64", 40), ("w8", 56)],
            [(96, ActivationFormat(4, group=32))],
            "activations of its own",
        ),
    ],
)
def test_what_the_kernels_cannot_round_is_said_before(draw, parts, activations, words):
    weight, _ = draw(3, parts)
    segments = [part.segment for part in weight.segments]
    with pytest.raises(FormatError, match=words):
        form(segments, follow(activations))
    assert words in why_not(segments, follow(activations))


def test_wrong_rotations_and_orders_are_refused(library, draw):
    weight, packed = draw(3, [("w4g64", 96)])
    segments = [part.segment for part in weight.segments]
    with pytest.raises(FormatError, match="do not divide 96"):
        form(segments, (), BlockRotation(128))
    with pytest.raises(FormatError, match="do not divide 86"):
        form(segments, (), BlockRotation(8, still=10))
    with pytest.raises(FormatError, match="not 1 times a power of two"):
        BlockRotation(48)
    with pytest.raises(FormatError, match="multiple of 4"):
        BlockRotation(48, torch.ones(3, 3))
    for order in (torch.arange(95), torch.zeros(96, dtype=torch.int64), torch.arange(96) + 1):
        with pytest.raises(FormatError, match="not a permutation of 96"):
            form(segments, order=order)
    other = form([part.segment for part in draw(3, [("w4g64", 64)])[0].segments])
    tiled = layouts.tile(packed)
    with pytest.raises(FormatError, match="other segments"):
        library.linear(tiled.description, torch.zeros(1, 96), None, "exact", form=other)


def test_codes_are_those_of_the_formats(library, draw, isa):
    """Sums of integers, times the scale: nothing else is rounded."""
    weight, packed = draw(16, [("w8", 64)], unit_scales=True)
    tiled = layouts.tile(packed)
    x = draw_tokens(9, 64, 4)
    for how in (ActivationFormat(4, False, 0.7), ActivationFormat(2), ActivationFormat(7, False)):
        activations = follow([(64, how)])
        codes, scales = quantize(x, activations)
        integers = reference.dequantize(weight).double()
        expected = (codes.double() @ integers.T).float() * scales
        shaped = form(packed.segments, activations)
        found = library.linear(tiled.description, x, None, "exact", isa, form=shaped)
        assert same_bits(found, expected)
