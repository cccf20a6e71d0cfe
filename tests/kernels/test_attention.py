"""Attention on the packed cache equals attention on the numbers it stands for: to the last bit when
these are kept as float32, within rounding when torch computes it."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlib.kernels import kv_reference
from quantlib.kernels.cpu import attention_library
from quantlib.kernels.kv_cache import KVCache

FORMATS = ["f32", "int8", "int4", "int4r", "int4g32", "int4h16", "int8g16r/int4", "int4rk4"]
PACKED = ["int8", "int4r", "int4g32", "int4h16/int8", "f32/int4", "int8g16r/f32", "int4k20"]
"""Formats that integer attention multiplies in integers, on one side at least."""
UNIT = 2.0**-24
"""Half a unit in the last place of 1, in float32."""


def heads(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(
    lengths: list[int], kv_heads: int = 2, head_dim: int = 64, name: str = "f32", **options
) -> KVCache:
    """One layer, a sequence per length."""
    cache = KVCache(1, kv_heads, head_dim, max(lengths), len(lengths), name, **options)
    for row, length in enumerate(lengths):
        keys = heads(row, 1, length, kv_heads, head_dim) * (1 + heads(99, head_dim).exp())
        cache.append(0, keys, heads(row + 50, 1, length, kv_heads, head_dim), sequences=[row])
    return cache


def as_float32(cache: KVCache) -> KVCache:
    """A cache of the numbers that another one stands for."""
    layers, batch = cache.lengths.shape
    same = KVCache(layers, cache.kv_heads, cache.head_dim, cache.capacity, batch, "f32")
    for row in range(batch):
        keys, values = cache.dequantize(0, row)
        same.append(0, keys[None], values[None], sequences=[row])
    return same


def assert_equals_torch(cache: KVCache, row: int, query: Tensor, out: Tensor, **options) -> None:
    """out [T, heads, head_dim] against float64, within the rounding of float32."""
    keys, values = (x.double() for x in cache.dequantize(0, row))
    scale = options.pop("scale", 1 / math.sqrt(cache.head_dim))
    expected = kv_reference.attend(query.double(), keys, values, scale, **options)
    # A score is a sum of head_dim products of rounded factors, and rotations add 40 additions to
    # either factor; e^score is off by the score's error, weights and outputs by as much twice,
    # sums over positions by one unit each, the softcap and exp by a few.
    score = query.norm(dim=-1).max() * keys.norm(dim=-1).max() * abs(scale)
    units = 2 * (cache.head_dim + 100) * float(score) + 4 * options.get("softcap", 0.0)
    bound = UNIT * (units + len(keys) + 64) * float(values.abs().max())
    error = float((out - expected).abs().max())
    assert error <= bound, f"{error} > {bound}"
    # The bound is for the worst case. What is usual is far below: rounding errors cancel.
    assert error <= 1e-4, error


@pytest.mark.parametrize("length", [1, 15, 64, 65, 300])
@pytest.mark.parametrize("name", FORMATS)
def test_attention_equals_torch_on_the_dequantized_cache(isa, name, length):
    cache = filled([length], name=name, isa=isa)
    for tokens in {1, min(length, 7)}:
        query = heads(7, 1, tokens, 6, 64)
        found = cache.attend(0, query)
        assert_equals_torch(cache, 0, query[0], found[0])


def test_attention_equals_torch_scaled_dot_product_attention(library):
    cache = filled([130], kv_heads=3, name="int8")
    query = heads(7, 1, 130, 9, 64)
    keys, values = (x.transpose(0, 1)[None] for x in cache.dequantize(0, 0))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, is_causal=True, enable_gqa=True
    )
    # Two float32 computations of sums of 64 products up to some 50 and of 130 weights up to 1.
    torch.testing.assert_close(
        cache.attend(0, query), expected.transpose(1, 2), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize(
    "name", ["int8", "int4", "int4g32", "int8/int4g16", "int4h16/int8", "int8/int4k40"]
)
def test_a_packed_cache_gives_the_bits_of_its_numbers(isa, name, head_dim):
    if head_dim == 16 and "h16" in name:
        pytest.skip("no columns are left for 4 bits")
    cache = filled([70], head_dim=head_dim, name=name, isa=isa)
    same = as_float32(cache)
    for tokens, group in ((1, 1), (1, 3), (1, 7), (5, 4), (40, 1)):
        query = heads(tokens, 1, tokens, 2 * group, head_dim)
        assert torch.equal(cache.attend(0, query), same.attend(0, query))


@pytest.mark.parametrize("name", PACKED)
@settings(max_examples=10, deadline=None)
@given(
    length=st.sampled_from([1, 15, 65, 300]),
    tokens=st.sampled_from([1, 2, 40]),
    head_dim=st.sampled_from([32, 64, 80, 256]),
    window=st.sampled_from([0, 17, 100]),
    softcap=st.sampled_from([0.0, 30.0]),
)
def test_integer_attention_is_within_its_rounding(name, length, tokens, head_dim, window, softcap):
    """Against the same cache in float32: 16 bits of a query and of 64 weights."""
    cache, tokens = filled([length], head_dim=head_dim, name=name), min(tokens, length)
    query = heads(7, 1, tokens, 6, head_dim)
    options = {"window": window, "softcap": softcap}
    expected = cache.attend(0, query, **options)
    found = cache.attend(0, query, integer=True, **options)
    keys, values = (x[:, 0] for x in cache.dequantize(0, 0))
    # A rounded number is off by half a step of 1/32512 of the largest, and by float32's rounding of
    # it. So is a score by the sum of |key| times that; a weight by as much in relation; an output
    # by twice that (weights and their sum), and by half a step of every weight again.
    step = 0.51 / 32512
    if name.startswith("int"):
        basis = kv_reference.rotate(keys) if "r" in name.partition("/")[0] else keys
        turned = kv_reference.rotate(query) if "r" in name.partition("/")[0] else query
        score = float(turned.abs().max() * basis.abs().sum(-1).max()) * step / math.sqrt(head_dim)
    else:
        score = 0.0
    bound = (2 * score + 64 * step + 1e-5) * 2 * float(values.abs().max())
    error = float((found - expected).abs().max())
    assert error <= bound, f"{error} > {bound}"
    assert error <= 2e-3, error  # what is usual is far below the worst case


def test_integer_attention_leaves_a_float32_cache_alone(library):
    cache, query = filled([140]), heads(7, 1, 9, 4, 64)
    assert torch.equal(cache.attend(0, query, integer=True), cache.attend(0, query))


def test_integer_attention_sees_exactly_what_float32_attention_sees(library):
    """Queries that 16 bits hold give the same scores; weights are rounded all the same."""
    query = torch.randint(-127, 128, (1, 5, 2, 32), generator=torch.Generator().manual_seed(3))
    keys = torch.randint(0, 16, (1, 150, 2, 32), generator=torch.Generator().manual_seed(4))
    cache = KVCache(1, 2, 32, 150, 1, "int4")
    cache.append(0, keys.float(), heads(1, 1, 150, 2, 32))
    query[..., 0], keys[..., 0] = 127, 15
    for window in (0, 3, 70):
        found, expected = (
            cache.attend(0, query.float() / 64, window=window, scale=0.125, integer=integer)
            for integer in (True, False)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_instruction_set_gives_the_same_bits(isa, name, integer):
    options = {"window": 90, "softcap": 20.0, "integer": integer}
    found, expected = (
        filled([140], kv_heads=1, name=name, isa=choice) for choice in (isa, "portable")
    )
    for tokens in (1, 9):
        query = heads(7, 1, tokens, 3, 64)
        whole = {"integer": integer}
        for chosen in (whole, options):
            assert torch.equal(
                found.attend(0, query, **chosen), expected.attend(0, query, **chosen)
            )


@pytest.mark.parametrize("tokens", [1, 75])
@pytest.mark.parametrize(("name", "integer"), [("f32", False), ("int4", False), ("int8", True)])
def test_results_do_not_depend_on_the_number_of_threads(isa, name, integer, tokens):
    lengths = [310, 80, 600] if isa != "portable" else [90, 80]
    query = heads(7, len(lengths), tokens, 4, 32)
    one, two, three = (
        filled(lengths, head_dim=32, name=name, isa=isa, threads=threads).attend(
            0, query, integer=integer
        )
        for threads in (1, 2, 3)
    )
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@pytest.mark.parametrize(
    ("name", "integer"),
    [("f32", False), ("int8", False), ("int4rk3", False), ("int8k50", True), ("int4h16r", True)],
)
@settings(max_examples=15, deadline=None)
@given(
    chunks=st.lists(st.sampled_from([1, 1, 2, 31, 64, 130, 257]), min_size=1, max_size=5),
    window=st.sampled_from([0, 1, 50, 300]),
    softcap=st.sampled_from([0.0, 30.0]),
    group=st.sampled_from([1, 3, 8]),
)
def test_a_prompt_gives_the_same_bits_in_any_chunks(name, integer, chunks, window, softcap, group):
    """Also token by token: how a step is divided is nobody's business."""
    total = sum(chunks)
    query = heads(7, 1, total, 2 * group, 32)
    options = {"window": window, "softcap": softcap, "integer": integer}
    whole = filled([total], head_dim=32, name=name).attend(0, query, **options)
    keys, values = (x[None] for x in filled([total], head_dim=32).dequantize(0, 0))
    cache, at = KVCache(1, 2, 32, total, 1, name), 0
    for count in chunks:
        part = slice(at, at + count)
        cache.append(0, keys[:, part], values[:, part])
        assert torch.equal(cache.attend(0, query[:, part], **options), whole[:, part])
        at += count


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 13, 96])
def test_any_number_of_query_heads_may_share_a_key(isa, group):
    cache = filled([67], kv_heads=2, head_dim=16, name="int8", isa=isa)
    for tokens in (1, 3):
        query = heads(group, 1, tokens, 2 * group, 16)
        assert_equals_torch(cache, 0, query[0], cache.attend(0, query)[0])


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 700),
    tokens=st.sampled_from([1, 2, 33, 200]),
    window=st.sampled_from([0, 1, 17, 64, 256, 400]),
    softcap=st.sampled_from([0.0, 5.0, 50.0]),
    scale=st.sampled_from([None, 0.05, 1.0]),
)
def test_windows_softcaps_and_scales(length, tokens, window, softcap, scale):
    tokens = min(tokens, length)
    cache = filled([length], head_dim=48, name="int4")
    query = heads(7, 1, tokens, 4, 48) / 2
    found = cache.attend(0, query, window=window, softcap=softcap, scale=scale)
    options = {} if scale is None else {"scale": scale}
    assert_equals_torch(cache, 0, query[0], found[0], window=window, softcap=softcap, **options)


@pytest.mark.parametrize("tokens", [1, 20])
def test_sequences_of_a_batch_do_not_see_each_other(tokens):
    lengths = [20, 513, 64, 290]
    query = heads(7, 4, tokens, 6, 64)
    cache = filled(lengths, kv_heads=3, name="int4")
    together = cache.attend(0, query)
    for row in range(4):
        alone = cache.attend(0, query[row : row + 1], sequences=[row])
        assert torch.equal(alone[0], together[row])
    assert torch.equal(cache.attend(0, query[[2, 1]], sequences=[2, 1]), together[[2, 1]])


@pytest.mark.parametrize(
    ("name", "integer"),
    [("f32", False), ("int8", False), ("int4r", False), ("int8", True), ("int8k40", True)],
)
@pytest.mark.parametrize("side", ["query", "keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_out_and_only_where_it_is_seen(isa, name, integer, side, bad):
    parts = {"keys": heads(0, 1, 80, 2, 32), "values": heads(1, 1, 80, 2, 32)}
    # Positive, so that an infinite key has an infinite score: minus that would be a weight of 0.
    parts["query"] = heads(2, 1, 1, 4, 32).abs()
    parts[side][0, 0 if side == "query" else 30, 0, 5] = bad
    cache = KVCache(1, 2, 32, 80, 1, name, isa=isa)
    cache.append(0, parts["keys"], parts["values"])
    query = parts["query"]
    found = cache.attend(0, query, integer=integer)[0, 0]
    head = found[0] if side == "query" else found[:2]
    assert not head.isfinite().all(-1).any()
    assert found[2:].isfinite().all()
    if side != "query":
        # Position 30 is one too far back: 49 of the 80 are seen.
        assert cache.attend(0, query, window=49, integer=integer).isfinite().all()
        assert not cache.attend(0, query, window=50, integer=integer).isfinite().all()


@pytest.mark.parametrize(("name", "integer"), [("f32", False), ("int8", False), ("int8", True)])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_a_bad_token_of_a_prompt_is_felt_by_those_that_see_it(isa, name, integer, group):
    """Not by its neighbours in the same registers: the rest has the bits it has without."""
    keys, values = heads(0, 1, 80, 1, 32), heads(1, 1, 80, 1, 32)
    query = heads(2, 1, 80, group, 32)
    spoiled = values.clone()
    spoiled[0, 30, 0, 3] = float("nan")
    outputs = []
    for v in (values, spoiled):
        cache = KVCache(1, 1, 32, 80, 1, name, isa=isa)
        cache.append(0, keys, v)
        outputs.append(cache.attend(0, query, window=20, integer=integer)[0])
    good, bad = outputs
    assert torch.equal(bad[:30], good[:30])
    assert bad[30:50, :, 3].isnan().all()
    assert torch.equal(bad[50:], good[50:])


def test_what_was_forgotten_is_not_seen(isa):
    """Old NaNs behind the end of a sequence do not come back."""
    for name in ("f32", "int8", "int4", "int4k30"):
        cache = KVCache(1, 1, 32, 64, 1, name, isa=isa)
        x = torch.full((1, 60, 1, 32), float("nan"))
        cache.append(0, x, x)
        cache.truncate(0, 0)
        keys, values = heads(0, 1, 21, 1, 32), heads(1, 1, 21, 1, 32)
        cache.append(0, keys, values)
        for tokens in (1, 21):
            query = heads(2, 1, tokens, 2, 32)
            found = cache.attend(0, query)
            assert_equals_torch(cache, 0, query[0], found[0])
            assert cache.attend(0, query, integer=True).isfinite().all()


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("size", [1e-30, 1e4, 1e18])
def test_huge_and_tiny_scores_do_not_overflow(isa, integer, size):
    cache = KVCache(1, 1, 32, 64, 1, "int8", isa=isa)
    keys, values = heads(0, 1, 50, 1, 32) * size, heads(1, 1, 50, 1, 32)
    cache.append(0, keys, values)
    query = heads(2, 1, 1, 1, 32)
    found = cache.attend(0, query, integer=integer)[0, 0, 0]
    stored_keys, stored_values = (x[:, 0] for x in cache.dequantize(0, 0))
    if size < 1:  # all weights are equal
        expected = stored_values.double().mean(0)
    else:  # one weight is everything
        expected = stored_values[(stored_keys @ query[0, 0, 0]).argmax()].double()
    # Of 50 equal weights, or of one, each is off by half a step of 16 bits.
    atol = 2e-4 if integer else 1e-6
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("integer", [False, True])
def test_first_positions_in_float32_are_exact(isa, integer):
    """The first key takes nearly all of the attention, and its value comes out as it is."""
    keys, values = heads(0, 1, 100, 1, 64), heads(1, 1, 100, 1, 64)
    keys[0, 0] *= 20
    query = keys[:, :1].clone() / 10
    outputs = {}
    for name in ("f32", "int4", "int4k1"):
        cache = KVCache(1, 1, 64, 128, 1, name, isa=isa)
        cache.append(0, keys, values)
        outputs[name] = cache.attend(0, query, integer=integer)
    torch.testing.assert_close(outputs["int4k1"], outputs["f32"], rtol=1e-5, atol=1e-5)
    assert float((outputs["int4"] - outputs["f32"]).abs().max()) > 0.01


def test_calls_from_several_threads_do_not_disturb_each_other(library):
    caches = [filled([300 + 40 * i], name=name) for i, name in enumerate(["f32", "int8", "int4"])]
    queries = [heads(i, 1, 1 + 30 * (i % 2), 4, 64) for i in range(6)]

    def work(index: int) -> Tensor:
        return caches[index % 3].attend(0, queries[index % 6])

    expected = [work(index) for index in range(6)]
    with ThreadPoolExecutor(4) as pool:
        for index, found in enumerate(pool.map(work, range(90))):
            assert torch.equal(found, expected[index % 6])


@pytest.mark.parametrize("name", FORMATS)
def test_without_compiled_kernels_the_reference_computes(name, monkeypatch):
    fast = filled([70, 9], name=name)
    monkeypatch.setattr(attention_library, "load", lambda: None)
    slow = filled([70, 9], name=name)
    for tokens in (1, 5):
        query = heads(7, 2, tokens, 4, 64)
        found = slow.attend(0, query, window=40, softcap=30.0)
        torch.testing.assert_close(
            found, fast.attend(0, query, window=40, softcap=30.0), rtol=1e-4, atol=1e-4
        )
