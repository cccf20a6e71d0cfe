"""Attention over a packed KV cache, the very source that GPUs get, on the emulator: what the
reference makes of the numbers that the codes stand for."""

import pytest
import torch

from quantlib.errors import FormatError
from quantlib.kernels import kv_reference
from quantlib.kernels.cuda import attention
from quantlib.kernels.emulator import build
from quantlib.kernels.emulator.machine import Kernel, Writable
from quantlib.kernels.kv_format import BLOCK, KvFormat

F16, BF16 = torch.float16, torch.bfloat16
# Format, head_dim, KV heads, query heads to each, lengths, window, dtype.
CASES = [
    ("int8", 64, 1, 1, [70], 0, F16),
    ("int4", 32, 2, 3, [5, 300], 0, BF16),
    ("int4g32", 128, 1, 2, [257], 0, F16),
    ("int4h16", 64, 1, 4, [600], 0, F16),
    ("int8/int4g16h16", 80, 1, 2, [64, 1], 0, F16),
    ("int4g32", 64, 1, 1, [530], 100, F16),
    ("int4", 256, 1, 8, [300], 290, BF16),
]

pytestmark = pytest.mark.usefixtures("compiler")


def stored(form, is_key, numbers, blocks):
    """numbers [batch][positions, kv_heads, head_dim], packed; what was never written is NaN."""
    packed = []
    for sequence in numbers:
        _, kv_heads, head_dim = sequence.shape
        bytes_ = BLOCK * form.bytes_per_position(head_dim)
        own = torch.full((kv_heads, blocks, bytes_), 0xFF, dtype=torch.uint8)
        kv_reference.store(own, form, is_key, 0, sequence)
        packed.append(own)
    return torch.stack(packed)


def run(case, seed=0, flags=(), launches=1, source=attention.SOURCE, offset=0.0):
    """What the kernel and what the reference makes of random keys and values; offset: of values."""
    name, head_dim, kv_heads, heads, lengths, window, dtype = case
    form, generator = KvFormat.parse(name), torch.Generator().manual_seed(7)
    blocks = -(-max(lengths) // BLOCK) + 1
    draw = [
        [torch.randn(length, kv_heads, head_dim, generator=generator) for length in lengths]
        for _ in range(2)
    ]
    draw[1] = [values + offset for values in draw[1]]
    keys = stored(form.key, True, draw[0], blocks)
    values = stored(form.value, False, draw[1], blocks)
    query = torch.randn(len(lengths), kv_heads * heads, head_dim, generator=generator).to(dtype)
    output = torch.full_like(query, torch.nan)
    splits = attention.splits(max(lengths))
    partials = torch.full(
        (len(lengths) * kv_heads, splits, attention.partial_floats(head_dim, heads)), torch.nan
    )
    waiting = torch.zeros(len(lengths) * kv_heads, splits, dtype=torch.int32)
    macros = attention.macros(form, head_dim, heads, dtype)
    kernel = Kernel(build.compile_kernel(source, macros, flags))
    scale = head_dim**-0.5
    given = attention.arguments(
        query,
        keys,
        values,
        torch.tensor(lengths, dtype=torch.int32),
        output,
        partials,
        waiting,
        scale,
        window,
    )
    arguments = [Writable(a) if i in (4, 5, 6) else a for i, a in enumerate(given)]
    shared = attention.shared_bytes(head_dim, heads)
    for _ in range(launches):
        output.fill_(torch.nan)
        kernel.launch(arguments, waiting.numel(), attention.THREADS, shared, seed)
        assert not waiting.any()
    expected = []
    for i, length in enumerate(lengths):
        used = -(-length // BLOCK)
        numbers = [
            kv_reference.dequantize(side[i][:, :used], own, is_key, head_dim)[:length].double()
            for side, own, is_key in ((keys, form.key, True), (values, form.value, False))
        ]
        expected.append(kv_reference.attend(query[i : i + 1].double(), *numbers, scale, window)[0])
    return output, torch.stack(expected)


def is_right(output, expected):
    """Scores are sums of up to 256 terms below 40 or so, each off by 2^-24: powers are off by some
    1e-4 at most. The output is a mean of values below 5, rounded to 16 bits."""
    last = torch.finfo(output.dtype).eps
    return (output.double() - expected).abs() <= 5e-4 + expected.abs() * last


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_attention_is_the_references(case):
    output, expected = run(case)
    assert is_right(output, expected).all()


def test_zero_points_may_be_negative():
    """Where all numbers of a group are far above 0."""
    output, expected = run(CASES[2], offset=8.0)
    assert is_right(output, expected).all()


def test_the_schedule_does_not_change_a_bit():
    first, _ = run(CASES[3])
    for seed in (1, 2):
        again, _ = run(CASES[3], seed, launches=2)
        assert torch.equal(first, again)


def test_no_undefined_behaviour(capfd):
    output, expected = run(CASES[4], seed=1, flags=build.SANITIZE)
    assert ((output.double() - expected).abs() <= 5e-3).all()
    assert "runtime error" not in capfd.readouterr().err


def test_what_the_kernel_does_not_take_is_a_sentence():
    with pytest.raises(FormatError, match="a KV cache of f32 keeps floats"):
        attention.macros(KvFormat.parse("f32"), 64, 1, F16)
    with pytest.raises(FormatError, match="a KV cache of int4k4 keeps floats"):
        attention.macros(KvFormat.parse("int4k4"), 64, 1, F16)
    with pytest.raises(FormatError, match="not 64 and 9"):
        attention.macros(KvFormat.parse("int4"), 64, 9, F16)
    with pytest.raises(FormatError, match=r"not torch\.float32"):
        attention.macros(KvFormat.parse("int4"), 64, 1, torch.float32)
    empty = torch.empty(0)
    with pytest.raises(FormatError, match="flags are"):
        attention.arguments(
            empty, torch.zeros(1, 1, 2, 8), empty, empty, empty, empty, torch.zeros(1, 9), 1.0
        )
