"""A KV cache by CUDA's attention kernel, in the emulator: who is chosen, and that the cache's users
see the same as from the other kernels."""

import pytest
import torch

from quantlib.errors import FormatError, UsageError
from quantlib.kernels import dispatch, kv_reference, workspace
from quantlib.kernels.cuda import attend, launch
from quantlib.kernels.dispatch import ATTENTION, CPU, REFERENCE, Machine
from quantlib.kernels.kv_cache import KVCache
from quantlib.kernels.kv_format import KvFormat

F16, BF16 = torch.float16, torch.bfloat16

pytestmark = pytest.mark.usefixtures("compiler")


def filled(form, lengths, head_dim=64, kv_heads=2, layers=1):
    """A cache whose sequences have so many positions."""
    cache = KVCache(layers, kv_heads, head_dim, max(lengths) + 1, len(lengths), form)
    generator = torch.Generator().manual_seed(3)
    for layer in range(layers):
        for row, length in enumerate(lengths):
            new = torch.randn(2, 1, length, kv_heads, head_dim, generator=generator)
            cache.append(layer, new[0], new[1], [row])
    return cache


def query_of(count, heads, head_dim=64, tokens=1, dtype=F16):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, tokens, heads, head_dim, generator=generator).to(dtype)


def reference(cache, query, rows, **given):
    found = [cache_reference(cache, query[i], row, **given) for i, row in enumerate(rows)]
    return torch.stack(found)


def cache_reference(cache, query, row, window=0):
    keys, values = cache.dequantize(0, row)
    scale = cache.head_dim**-0.5
    return kv_reference.attend(query.float(), keys, values, scale, window)


@pytest.mark.parametrize(
    ("form", "lengths", "heads", "dtype", "window"),
    [
        ("int8", [70, 5], 4, F16, 0),
        ("int4h16", [300], 2, BF16, 0),
        ("int8g16r/int4r", [65, 12, 30], 6, F16, 40),
    ],
)
def test_one_new_token_is_attended_by_the_kernel(emulated, form, lengths, heads, dtype, window):
    cache = filled(form, lengths)
    query = query_of(len(lengths), heads, dtype=dtype)
    found = cache.attend(0, query, window=window)
    assert [one.name for one in emulated] == ["kv_attention"]
    assert found.dtype == torch.float32
    expected = reference(cache, query, range(len(lengths)), window=window)
    # The output has the queries' type, and so has a rotated query: half a unit in 64 columns.
    eps = torch.finfo(dtype).eps
    assert ((found - expected).abs() <= 4 * eps * (1 + expected.abs())).all()
    assert not workspace.flags(torch.device("cpu")).any()


def test_some_sequences_are_attended_one_by_one_where_they_lie(emulated):
    cache, query = filled("int8", [70, 5, 129]), query_of(2, 2)
    found = cache.attend(0, query, [2, 0])
    assert len(emulated) == 2
    expected = reference(cache, query, [2, 0])
    assert ((found - expected).abs() <= 4e-3 * (1 + expected.abs())).all()


def test_what_the_kernel_does_not_take_goes_elsewhere(emulated):
    cache = filled("int8", [70])
    cache.attend(0, query_of(1, 4, tokens=3))  # several tokens
    cache.attend(0, query_of(1, 4, dtype=torch.float32))
    cache.attend(0, query_of(1, 4), softcap=30.0)
    cache.attend(0, query_of(1, 18))  # nine heads to a KV head
    filled("int8k4", [70]).attend(0, query_of(1, 4))
    filled("f32", [70]).attend(0, query_of(1, 4))
    assert not emulated


def test_without_a_gpu_the_processors_kernels_attend(monkeypatch):
    monkeypatch.setattr(launch.EmulatedRunner, "run", None)
    cache, query = filled("int8", [70]), query_of(1, 4)
    found, expected = cache.attend(0, query), reference(cache, query, [0])
    assert ((found - expected).abs() <= 1e-4).all()


def test_who_attends_follows_from_the_machine():
    def chosen(kind="cuda", taken=True, **given):
        own = Machine(**({"kind": kind, "cpu": kind == "cpu", "cuda": "", "triton": ""} | given))
        return dispatch.choose_attention(taken, own)

    assert chosen() == ATTENTION
    assert chosen(taken=False) == chosen(cuda="no CuPy") == chosen(forced="triton") == REFERENCE
    assert chosen("cpu") == CPU
    assert chosen("cpu", cpu=False) == REFERENCE
    assert chosen("cpu", cuda="-", forced="emulator") == ATTENTION
    assert chosen("cpu", taken=False, forced="emulator") == REFERENCE
    with pytest.raises(UsageError, match="QUANTLIB_KERNELS=cuda, but no CuPy"):
        chosen(cuda="no CuPy", forced="cuda")


def test_a_workspace_too_small_is_divided_or_a_sentence(monkeypatch):
    runs = []
    monkeypatch.setattr(workspace, "FLAGS", 5)
    cache, query = filled("int8", [70, 300, 5]), query_of(3, 2)

    class Runner(launch.EmulatedRunner):
        def run(self, one):
            runs.append(one.blocks)
            super().run(one)

    form, lengths = KvFormat.parse("int8"), [70, 300, 5]
    given = (query[:, 0], cache.stored[0][0], cache.stored[1][0], form)
    found = attend.attend(Runner(), *given, lengths, 0.125)
    assert runs == [4, 4, 4]  # two heads, two splits, a sequence at a time
    expected = reference(cache, query, range(3))[:, 0]
    assert ((found - expected).abs() <= 4e-3 * (1 + expected.abs())).all()
    monkeypatch.setattr(workspace, "FLAGS", 3)
    with pytest.raises(FormatError, match="4 splits does not fit"):
        attend.attend(Runner(), *given, lengths, 0.125)
