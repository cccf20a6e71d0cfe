"""Tokens of several kinds in one cache: each is what its own format gives back, in as few bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlib.errors import DataError, FormatError
from quantlib.kernels.kv_format import SideFormat
from quantlib.kernels.kv_reference import numbers, rotate, round_to_codes
from quantlib.kernels.kv_spans import SideSpans, TokenIndex, TokenPool
from quantlib.kernels.kv_static import Ranges, check_meta, static_codes

HEADS, DIM = 2, 32
FORMS = ("f32", "int8", "int4", "int4g16", "int4h16", "int4g16r", "int8r")
KINDS = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, form: SideFormat) -> Tensor:
    """x [..., d] as a packed cache gives it back."""
    if form.bits == 32:
        return x
    found = numbers(*round_to_codes(x, form), form, x.shape[-1])
    return rotate(found) if form.rotate else found


@pytest.mark.parametrize("head_dim", [DIM, 24])
@pytest.mark.parametrize("name", FORMS)
def test_a_pool_gives_back_what_its_format_does_in_its_bytes(name: str, head_dim: int) -> None:
    form = SideFormat.parse(name)
    if form.rotate and head_dim % 16:
        return
    pool, x = TokenPool(form, HEADS, head_dim), normal(150, HEADS, head_dim)
    for part in x.split(37):
        pool.append(part, torch.zeros(len(part), dtype=torch.int64))
    found = pool.read(torch.zeros(150, dtype=torch.int64))
    assert torch.equal(found, rounded(x, form))
    assert pool.nbytes == 150 * HEADS * form.bytes_per_position(head_dim)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 99))
def test_tokens_of_any_kind_in_any_order_are_each_of_their_own_format(
    steps: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    forms = [SideFormat.parse(name) for name in ("int8", "int4g16", "f32")]
    index, side = TokenIndex((0, 2, 0)), SideSpans(forms, HEADS, DIM, [None] * KINDS)
    all_kinds, tokens = [], []
    for count in steps:
        kinds = torch.randint(0, KINDS, (2, count), generator=generator)
        x = torch.randn(2, HEADS, count, DIM, generator=generator)
        index.extend(kinds)
        side.append(x, index)
        all_kinds.append(kinds)
        tokens.append(x)
    kinds, x = torch.cat(all_kinds, 1), torch.cat(tokens, 2)
    found = side.read(index, torch.float32)
    for row in range(2):
        for at in range(kinds.shape[1]):
            kind = int(kinds[row, at])
            exact = kind == 1 and at < 2
            form = SideFormat(32) if exact else forms[kind]
            assert torch.equal(found[row, :, at], rounded(x[row, :, at], form))


def test_places_count_tokens_of_one_kind_in_a_row() -> None:
    index = TokenIndex((0, 0, 0))
    index.extend(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    index.extend(torch.tensor([[1], [1]]))
    index.extend(torch.tensor([[0, 1], [2, 1]]))
    assert index.places[0].tolist() == [0, 0]
    assert index.places[1].tolist() == [0, 1, 0, 1, 2, 2, 3, 0, 0]
    assert index.places[2].tolist() == [0]


def test_sequences_may_take_over_what_others_have() -> None:
    form = SideFormat.parse("int8")
    index, side = TokenIndex((0, 0, 0)), SideSpans([form] * KINDS, HEADS, DIM, [None] * KINDS)
    x = normal(2, HEADS, 3, DIM)
    index.extend(torch.tensor([[0, 1, 1], [0, 0, 2]]))
    side.append(x, index)
    index.select(torch.tensor([1, 1, 0]))
    more = normal(3, HEADS, 1, DIM, seed=1)
    index.extend(torch.tensor([[2], [0], [1]]))
    side.append(more, index)
    wanted = rounded(torch.cat((x[[1, 1, 0]], more), 2), form)
    assert torch.equal(side.read(index, torch.float32), wanted)


def test_another_batch_is_refused() -> None:
    index = TokenIndex((0, 0, 0))
    index.extend(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(DataError, match="2 sequences"):
        index.extend(torch.zeros(1, 3, dtype=torch.int64))


def test_heads_that_a_format_does_not_fit_are_refused() -> None:
    with pytest.raises(FormatError, match="int4h16"):
        SideSpans([SideFormat.parse("int4h16")] * KINDS, HEADS, 16, [None] * KINDS)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "f32"])
def test_scales_of_one_image_are_those_that_its_own_tokens_would_get(name: str) -> None:
    form, x = SideFormat.parse(name), normal(8, HEADS, DIM)
    places = torch.arange(8)
    meta = Ranges.of(x, places, 8, form).meta(form, DIM)
    codes, dynamic = round_to_codes(x, form)
    assert torch.equal(meta, dynamic)
    assert torch.equal(static_codes(x, meta, form), codes)
    pool = TokenPool(form, HEADS, DIM, meta)
    pool.append(x, places)
    assert torch.equal(pool.read(places), rounded(x, form))
    # 4 bytes less for every group, and nothing else is different.
    saved = 4 * len(form.groups(DIM))
    assert pool.nbytes == 8 * HEADS * (form.bytes_per_position(DIM) - saved)


def test_scales_of_several_images_hold_all_of_them() -> None:
    form = SideFormat.parse("int8")
    images = normal(5, 4, HEADS, DIM) * torch.tensor([1, 2, 3, 4.0])[:, None, None]
    places = torch.arange(4).repeat(5)
    meta = Ranges.of(images.flatten(0, 1), places, 4, form).meta(form, DIM)
    pool = TokenPool(form, HEADS, DIM, meta)
    pool.append(images.flatten(0, 1), places)
    found = pool.read(places).view_as(images)
    steps = (meta & -0x10000).view(torch.float32)
    # Half a step of its place, and the zero point's own half.
    assert bool(((found - images).abs().amax(-1) <= steps[..., 0]).all())
    # Outside of it, values are clipped: the largest error is how far outside they are.
    pool.append(images[0] * 100, torch.arange(4))
    beyond = pool.read(torch.cat((places, torch.arange(4))))[-4:]
    assert float(beyond.abs().max()) <= float(images.abs().max()) * 1.02


def test_images_behind_images_begin_anew() -> None:
    form, x = SideFormat.parse("int4"), normal(3, HEADS, DIM)
    meta = Ranges.of(x, torch.arange(3), 3, form).meta(form, DIM)
    pool = TokenPool(form, HEADS, DIM, meta)
    pool.append(torch.cat((x, x)), torch.arange(6))
    first, second = pool.read(torch.arange(6)).split(3)
    assert torch.equal(first, second)


def test_ranges_that_cannot_be_known_are_reported() -> None:
    form, x = SideFormat.parse("int8"), normal(2, HEADS, DIM)
    with pytest.raises(FormatError, match="place 1"):
        Ranges.of(x, torch.tensor([0, 2]), 3, form).meta(form, DIM)
    with pytest.raises(FormatError, match="finite"):
        Ranges.of(x * torch.inf, torch.arange(2), 2, form)
    with pytest.raises(FormatError, match="f32"):
        Ranges.of(x, torch.arange(2), 2, SideFormat(32))


def test_scales_of_another_model_are_refused() -> None:
    form = SideFormat.parse("int4g16")
    check_meta(torch.zeros(4, HEADS, 2, dtype=torch.int32), form, DIM, HEADS)
    for shape in ((4, HEADS, 1), (4, HEADS + 1, 2), (HEADS, 2), (0, HEADS, 2)):
        with pytest.raises(FormatError, match="static scales"):
            check_meta(torch.zeros(shape, dtype=torch.int32), form, DIM, HEADS)
