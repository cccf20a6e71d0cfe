"""The KV cache: names of formats, exact bytes, and codes that equal the torch reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlib.errors import DataError, FormatError, UsageError
from quantlib.kernels import kv_reference
from quantlib.kernels.cpu import attention_library
from quantlib.kernels.kv_cache import KVCache
from quantlib.kernels.kv_format import BLOCK, KvFormat, SideFormat, padded_columns

FORMATS = [
    "f32",
    "int8",
    "int4",
    "int4r",
    "int4g32",
    "int4h16",
    "int8g16r/int4",
    "int4g32h16r/int8",
    "int4k5",
    "int8/int4rk64",
    "f32/int8k17",
]


def heads(seed: int, *shape: int, spread: bool = True) -> Tensor:
    """Normal numbers; with `spread` columns have sizes of their own, as those of keys do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.rand(shape[-1], generator=generator).mul(4).exp() if spread else x


def numbers_of(x: Tensor, side: SideFormat, sinks: int = 0) -> Tensor:
    """What a side makes of x [..., head_dim], by the reference; of positions [T, ..., head_dim]
    when the first ones are kept in float32."""
    if side.bits == 32:
        return x
    found = kv_reference.numbers(*kv_reference.round_to_codes(x, side), side, x.shape[-1])
    if sinks:  # into the basis they are kept in, and back
        found[:sinks] = kv_reference.rotate(x[:sinks]) if side.rotate else x[:sinks]
    return kv_reference.rotate(found) if side.rotate else found


# Names and bytes


@st.composite
def sides(draw: st.DrawFn) -> SideFormat:
    bits = draw(st.sampled_from([32, 8, 4]))
    if bits == 32:
        return SideFormat(32)
    columns = st.sampled_from([0, 16, 32, 48, 128])
    return SideFormat(bits, draw(columns), draw(columns) if bits == 4 else 0, draw(st.booleans()))


@given(sides(), sides(), st.integers(0, 64))
def test_a_name_and_its_format_are_inverse(key, value, sinks):
    form = KvFormat(key, value)
    if not key.bits == value.bits == 32:
        form = form.with_sinks(sinks)
    assert KvFormat.parse(str(form)) == form


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("int3", "not a format of a KV cache"),
        ("", "not a format of a KV cache"),
        ("f32r", "not a format of a KV cache"),
        ("int4rg32", "in this order"),
        ("int8/", "not a format of a KV cache"),
        ("int4g24", "multiples of 16"),
        ("int4h0", "multiples of 16"),
        ("int8h16", "all columns"),
        ("int4k", "after the k"),
        ("int4k0", "after the k"),
        ("int4k4/int8", "after the k"),
        ("int4k65", "keep 0 to 64"),
        ("f32k4", "drop the k"),
    ],
)
def test_a_wrong_name_is_explained(name, reason):
    with pytest.raises(FormatError, match=reason):
        KvFormat.parse(name)


@pytest.mark.parametrize(
    ("name", "head_dim", "expected"),
    [
        ("f32", 64, 4 * 64 * 2),
        ("int8", 64, (64 + 4) * 2),
        ("int4", 64, (32 + 4) * 2),
        ("int4r", 64, (32 + 4) * 2),
        ("int8/int4", 128, 128 + 4 + 64 + 4),
        ("int4g32", 128, (64 + 4 * 4) * 2),
        ("int4h16", 64, (16 + 24 + 2 * 4) * 2),
        ("int4g32h16", 80, (16 + 32 + 3 * 4) * 2),
        ("int8", 72, (80 + 4) * 2),
    ],
)
def test_a_token_takes_exactly_these_bytes(name, head_dim, expected):
    cache = KVCache(3, 5, head_dim, capacity=100, batch=2, format=name)
    assert cache.form.bytes_per_position(head_dim) == expected
    assert cache.bytes_per_token == 3 * 5 * expected
    assert cache.capacity == 128
    assert cache.nbytes == 2 * 128 * cache.bytes_per_token


@given(sides(), st.integers(1, 256))
def test_the_kernels_count_the_same_bytes(side, head_dim):
    library = attention_library.load()
    if library is None:
        pytest.skip("the CPU kernels could not be compiled here")
    try:
        side.check(head_dim)
        expected = BLOCK * side.bytes_per_position(head_dim)
    except FormatError:
        expected = -1
    assert library.block_bytes(side, head_dim) == expected


# Codes


@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("name", FORMATS)
def test_packed_codes_are_those_of_the_reference(isa, name, head_dim, monkeypatch):
    form = KvFormat.parse(name)
    try:
        form.key.check(head_dim)
        form.value.check(head_dim)
    except FormatError:
        pytest.skip("such heads cannot be kept so")
    keys, values = heads(0, 2, 70, 2, head_dim), heads(1, 2, 70, 2, head_dim, spread=False)
    found = KVCache(1, 2, head_dim, 128, 2, name, isa=isa)
    monkeypatch.setattr(attention_library, "load", lambda: None)
    expected = KVCache(1, 2, head_dim, 128, 2, name)
    for cache, part in itertools.product((found, expected), (slice(0, 13), slice(13, 70))):
        cache.append(0, keys[:, part], values[:, part])
    for mine, theirs in zip(found.stored, expected.stored):
        if mine.shape[-1] == BLOCK * 4 * padded_columns(head_dim):  # its padding is free
            mine, theirs = mine.view(torch.float32), theirs.view(torch.float32)
            assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
        else:
            assert torch.equal(mine, theirs)
    for row in range(2):
        for a, b, x, side in zip(
            found.dequantize(0, row),
            expected.dequantize(0, row),
            (keys[row], values[row]),
            (form.key, form.value),
        ):
            assert torch.equal(a, b)
            assert torch.equal(a, numbers_of(x, side, form.sinks))
            if side.bits != 32 and not side.rotate:
                assert torch.equal(a[: form.sinks], x[: form.sinks])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["int8", "int4", "int8g16", "int4g32", "int4h16"]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    st.sampled_from([0.0, 1.0, 300.0]),
)
def test_a_number_is_off_by_half_a_step_at_most(seed, name, size, offset):
    side = SideFormat.parse(name)
    x = (heads(seed, 5, 64) + offset) * size
    codes, meta = kv_reference.round_to_codes(x, side)
    found = kv_reference.numbers(codes, meta, side, 64)
    for index, group in enumerate(side.groups(64)):
        step = (meta[..., index, None] & -0x10000).view(torch.float32)
        error = (found - x)[..., group.columns_slice].abs()
        # Half a step for the code, and as much when rounding the zero the other way clamps it.
        assert (error <= step * (1 + 1e-5)).all()
        ideal = x[..., group.columns_slice]
        levels = (1 << group.bits) - 1
        finest = torch.maximum(
            (ideal.amax(-1) - ideal.amin(-1)) / levels, ideal.abs().amax(-1) / 32767
        )
        # bfloat16 has 8 bits: rounded up, the step is at most 2^-7 longer.
        assert (step[..., 0] <= finest * (1 + 2**-7 + 1e-6)).all()


@pytest.mark.parametrize("name", ["int8", "int4", "int4r", "int4h16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_group_nan_and_no_other(isa, name, bad):
    keys, values = heads(0, 1, 9, 2, 64), heads(1, 1, 9, 2, 64)
    keys[0, 4, 1, 20] = bad
    cache = KVCache(1, 2, 64, 64, 1, name, isa=isa)
    cache.append(0, keys, values)
    found, _ = cache.dequantize(0, 0)
    side = cache.form.key
    expected = torch.zeros(9, 2, 64, dtype=torch.bool)
    # Rotated back, one bad group is a bad head.
    expected[4, 1, 16 if name == "int4h16" else 0 :] = True
    assert torch.equal(found.isnan(), expected)
    assert side == cache.form.value


@pytest.mark.parametrize("name", ["int8", "int4", "int4g16"])
def test_zeros_and_constants_are_kept(isa, name):
    x = torch.zeros(1, 3, 1, 48)
    x[0, 1] = 3.25
    x[0, 2] = -1e-3
    cache = KVCache(1, 1, 48, 64, 1, name, isa=isa)
    cache.append(0, x, x)
    for found in cache.dequantize(0, 0):
        assert (found[0] == 0).all()
        # A constant is kept as zero * scale, with a zero of 15 bits.
        torch.testing.assert_close(found, x[0], rtol=2**-14, atol=0)


def test_any_size_of_number_is_kept_without_a_crash(isa):
    sizes = torch.tensor([1e-45, 1e-39, 1e-20, 1.0, 1e20, 3.3e38])
    x = heads(0, 6, 32, spread=False).clamp(-1, 1) * sizes[:, None]
    cache = KVCache(1, 1, 32, 64, 1, "int8", isa=isa)
    cache.append(0, x[None, :, None], x[None, :, None])
    found, _ = cache.dequantize(0, 0)
    assert torch.equal(found[:, 0], numbers_of(x, cache.form.key))
    assert (found[2:, 0] - x[2:]).abs().amax(-1).le(sizes[2:] / 100).all()


def test_a_rotation_is_its_own_inverse_and_keeps_products():
    for head_dim in (16, 32, 48, 64, 80, 128, 256):
        a, b = heads(0, 7, head_dim), heads(1, 7, head_dim)
        turned = kv_reference.rotate(a)
        # log2(n) + 16 additions of float32 each way.
        tolerance = 2**-24 * 50 * a.norm(dim=-1, keepdim=True)
        assert ((kv_reference.rotate(turned) - a).abs() <= tolerance).all()
        products = (turned * kv_reference.rotate(b)).sum(-1)
        bound = 2**-24 * (2 * head_dim + 100) * a.norm(dim=-1) * b.norm(dim=-1)
        assert ((products - (a * b).sum(-1)).abs() <= bound).all()


def test_rotated_keys_with_outliers_are_kept_better():
    keys = heads(0, 200, 64, spread=False)
    keys[:, [3, 40]] *= 12
    errors = [
        (numbers_of(keys, SideFormat.parse(name)) - keys).norm() for name in ("int4r", "int4")
    ]
    assert errors[0] < 0.6 * errors[1]


# Sequences


@pytest.mark.parametrize("name", ["f32", "int4h16", "int4rk9"])
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.integers(1, 70), min_size=1, max_size=6))
def test_positions_appended_in_pieces_are_those_appended_at_once(name, steps):
    total = sum(steps)
    keys, values = heads(0, 1, total, 2, 32), heads(1, 1, total, 2, 32)
    whole, pieces = (KVCache(1, 2, 32, total, 1, name) for _ in range(2))
    whole.append(0, keys, values)
    at = 0
    for count in steps:
        pieces.append(0, keys[:, at : at + count], values[:, at : at + count])
        at += count
    assert torch.equal(whole.lengths, pieces.lengths)
    for a, b in zip(whole.dequantize(0, 0), pieces.dequantize(0, 0)):
        assert torch.equal(a, b)


def test_layers_and_sequences_have_lengths_of_their_own():
    cache = KVCache(2, 1, 16, 64, batch=3, format="int8")
    cache.append(1, heads(0, 2, 5, 1, 16), heads(1, 2, 5, 1, 16), sequences=[2, 0])
    cache.append(1, heads(2, 1, 3, 1, 16), heads(3, 1, 3, 1, 16), sequences=[0])
    assert cache.lengths.tolist() == [[0, 0, 0], [8, 0, 5]]
    expected = numbers_of(heads(0, 2, 5, 1, 16), cache.form.key)
    assert torch.equal(cache.dequantize(1, 2)[0], expected[0])
    assert torch.equal(cache.dequantize(1, 0)[0][:5], expected[1])


def test_a_full_cache_says_so_and_keeps_what_it_has():
    cache = KVCache(1, 2, 16, 64, batch=2, format="int4")
    cache.append(0, heads(0, 1, 60, 2, 16), heads(1, 1, 60, 2, 16), sequences=[1])
    before = [stored.clone() for stored in cache.stored]
    with pytest.raises(DataError, match="holds 64 positions of a sequence, and one would have 65"):
        cache.append(0, heads(2, 2, 5, 2, 16), heads(3, 2, 5, 2, 16))
    assert cache.lengths.tolist() == [[0, 60]]
    assert all(map(torch.equal, before, cache.stored))
    cache.append(0, heads(2, 2, 4, 2, 16), heads(3, 2, 4, 2, 16))


@pytest.mark.parametrize("name", ["int4r", "int4rk4"])
def test_a_reordered_cache_has_the_sequences_asked_for(name):
    cache = KVCache(2, 2, 32, 128, batch=3, format=name)
    for layer, row in itertools.product(range(2), range(3)):
        length = 20 * row + 30
        x = heads(10 * layer + row, 1, length, 2, 32)
        cache.append(layer, x, x + 1, sequences=[row])
    before = [[cache.dequantize(layer, row) for row in range(3)] for layer in range(2)]
    cache.reorder([2, 2, 0])
    assert cache.lengths.tolist() == [[70, 70, 30]] * 2
    for layer, (row, origin) in itertools.product(range(2), enumerate([2, 2, 0])):
        for a, b in zip(cache.dequantize(layer, row), before[layer][origin]):
            assert torch.equal(a, b)


def test_first_positions_take_bytes_of_their_own():
    form = KvFormat.parse("int4/f32k4")
    assert form.bytes_per_position(64) == KvFormat.parse("int4/f32").bytes_per_position(64)
    assert form.sink_bytes(64) == 4 * 64 * 16  # in whole vectors, and of the packed side alone
    cache = KVCache(3, 5, 64, capacity=64, batch=2, format="int4/f32k4")
    assert cache.nbytes == 2 * (64 * cache.bytes_per_token + 3 * 5 * form.sink_bytes(64))


def test_a_truncated_sequence_goes_on_where_it_was_cut():
    keys, values = heads(0, 1, 90, 1, 32), heads(1, 1, 90, 1, 32)
    cache = KVCache(1, 1, 32, 128, format="int4")
    cache.append(0, keys, values)
    cache.truncate(0, 37)
    cache.append(0, keys[:, 60:], values[:, 60:])
    expected = torch.cat((keys[0, :37], keys[0, 60:]))
    assert torch.equal(cache.dequantize(0, 0)[0], numbers_of(expected, cache.form.key))
    cache.reset()
    assert cache.lengths.tolist() == [[0]]


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"layers": 0}, UsageError, "layers of at least 1"),
        ({"capacity": 0}, UsageError, "capacity of at least 1"),
        ({"head_dim": 257}, FormatError, "can keep 1 to 256"),
        ({"head_dim": 72, "format": "int4r"}, FormatError, "multiple of 16 columns"),
        ({"head_dim": 32, "format": "int4h32"}, FormatError, "a head has 32"),
    ],
)
def test_an_impossible_cache_is_refused(arguments, error, reason):
    sizes = {"layers": 1, "kv_heads": 1, "head_dim": 64, "capacity": 64}
    with pytest.raises(error, match=reason):
        KVCache(**(sizes | arguments))


def test_a_wrong_call_is_explained():
    cache = KVCache(1, 2, 16, 64, batch=2)
    x = heads(0, 2, 3, 2, 16)
    for call, error, reason in [
        (lambda: cache.append(1, x, x), UsageError, "no layer 1"),
        (lambda: cache.append(0, x[:, :, :1], x[:, :, :1]), FormatError, "this KV cache takes"),
        (lambda: cache.append(0, x, x[:1]), FormatError, "this KV cache takes"),
        (lambda: cache.append(0, x, x, sequences=[0, 0]), UsageError, "different numbers"),
        (lambda: cache.append(0, x, x, sequences=[0, 2]), UsageError, "different numbers"),
        (lambda: cache.attend(0, x), DataError, "append keys and values first"),
        (lambda: cache.attend(0, x[..., :8]), FormatError, "the query is"),
        (lambda: cache.truncate(2, 0), UsageError, "sequences 0 to 1"),
        (lambda: cache.reorder([0]), UsageError, "a new order"),
    ]:
        with pytest.raises(error, match=reason):
            call()


def test_columns_are_padded_to_whole_vectors():
    assert [padded_columns(n) for n in (1, 16, 17, 72, 80)] == [16, 16, 32, 80, 80]


@pytest.mark.parametrize(
    ("name", "positions", "bits"),
    [
        ("f32", 5, 32),
        ("int4", 512, 4 + 32 / 64),  # a scale and a zero of 16 bits each
        ("int4h16", 512, (8 * 16 + 4 * 48 + 64) / 64),
        ("int8/int4", 512, 6 + 32 / 64),
        ("int4k4", 512, 4 + 32 / 64 + 32 * 16 / 512),  # 4 positions in room for 16, besides
    ],
)
def test_the_bits_of_a_number_count_everything(name, positions, bits):
    assert KvFormat.parse(name).mean_bits(64, positions) == pytest.approx(bits)
