"""Which kernel computes what, and that forcing another one changes nothing that a user reads.

No GPU is needed: what a GPU would be given is decided by a pure function of what there is; launches
run in the emulator and in Triton's interpreter.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quantlib.errors import UsageError
from quantlib.formats.activation import ActivationFormat, ActivationSegment
from quantlib.kernels import accelerated, dispatch, ops, reference, turned
from quantlib.kernels.cpu import build
from quantlib.kernels.cuda import loading, quantizer
from quantlib.kernels.dispatch import (
    CPU,
    DECODE,
    DENSE,
    REFERENCE,
    SEGMENTED,
    TRITON,
    Machine,
    Product,
)
from quantlib.kernels.packed import activations_of
from quantlib.kernels.triton import launch
from quantlib.transforms.hadamard import signs

W4, MIXED = "64x128|0:128:int4:64:0:f16", "64x128|0:96:int4:32:0:f16|96:32:int8:32:0:f16"
FLOAT, SHARED = "64x128|0:128:e2m1:32:0:e8m0", "64x128|0:128:int4:64:0:e8m0"
SHARED_ROWS, NARROW = "64x128|0:128:int4:-1:0:e8m0", "64x128|0:128:int4:16:0:f16"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
GPU = Machine("cuda", cpu=False, cuda="", triton="")


def rounded(*parts: tuple[int, str]) -> tuple[ActivationSegment, ...]:
    """Inputs whose columns are rounded so: (count, format)."""
    found, start = [], 0
    for length, form in parts:
        found.append(ActivationSegment(start, length, ActivationFormat.parse(form)))
        start += length
    return tuple(found)


INT8, RESQ_INPUTS = rounded((128, "8")), rounded((96, "4z"), (32, "8"))

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs Triton: pip install 'quantlib-torch[triton]'",
)


@pytest.mark.parametrize(
    ("product", "kernel"),
    [
        (Product(1, F16, W4), DECODE),
        (Product(64, BF16, W4), DECODE),
        (Product(65, F16, W4), TRITON),
        (Product(257, F16, W4), DENSE),
        (Product(1, F32, W4), TRITON),
        (Product(1, F16, MIXED), TRITON),
        (Product(1, F16, FLOAT), TRITON),
        (Product(1, F16, SHARED), TRITON),
        (Product(1, F16, SHARED_ROWS), TRITON),
        (Product(1, F16, W4, INT8), SEGMENTED),
        (Product(4000, BF16, W4, INT8), SEGMENTED),
        (Product(1, F16, MIXED, RESQ_INPUTS), SEGMENTED),
        (Product(1, F32, MIXED, RESQ_INPUTS), TRITON),
        (Product(4000, F32, W4, INT8), TRITON),
        (Product(1, F16, FLOAT, INT8), TRITON),
        (Product(1, F16, SHARED, INT8), TRITON),
        (Product(1, F16, NARROW, INT8), TRITON),
        (Product(1, F16, W4, rounded((128, "mxfp4"))), TRITON),
        (Product(1, F16, W4, RESQ_INPUTS), TRITON),  # scales change within a weight's segment
    ],
)
def test_a_gpu_gets_the_kernel_for_its_product(product, kernel):
    assert dispatch.choose(product, GPU) == kernel


def test_what_is_missing_is_passed_over():
    product = Product(1, F16, W4)
    assert dispatch.choose(product, Machine("cuda", False, "no CuPy", "")) == TRITON
    assert dispatch.choose(product, Machine("cuda", False, "no CuPy", "no Triton")) == REFERENCE
    assert dispatch.choose(product, Machine("cuda", False, "", "no Triton")) == DECODE
    many = Product(1000, F16, W4)
    assert dispatch.choose(many, Machine("cuda", False, "", "no Triton")) == REFERENCE
    integers = Product(1000, F16, W4, INT8)
    assert dispatch.choose(integers, Machine("cuda", False, "", "no Triton")) == SEGMENTED
    assert dispatch.choose(integers, Machine("cuda", False, "no CuPy", "")) == TRITON
    assert dispatch.choose(integers, Machine("cuda", False, "no CuPy", "no Triton")) == REFERENCE
    assert dispatch.choose(product, Machine("cpu", True, "-", "-")) == CPU
    assert dispatch.choose(product, Machine("cpu", False, "-", "-")) == REFERENCE
    assert dispatch.choose(product, Machine("mps", False, "-", "-")) == REFERENCE


def test_a_forced_kernel_is_used_or_refused():
    def chosen(name, product=None, **changes):
        product = product or Product(1, F16, W4)
        there = {"kind": "cpu", "cpu": True, "cuda": "no GPU", "triton": ""} | changes
        return dispatch.choose(product, Machine(**there, forced=name))

    assert chosen("triton") == TRITON
    assert chosen("triton", Product(4000, F16, W4)) == TRITON
    assert chosen("emulator") == DECODE
    assert chosen("emulator", Product(1, F32, W4)) == REFERENCE
    assert chosen("emulator", Product(99, F16, MIXED, RESQ_INPUTS)) == SEGMENTED
    assert chosen("triton", Product(99, F16, MIXED, RESQ_INPUTS)) == TRITON
    assert chosen("reference") == REFERENCE
    assert chosen("cpu") == CPU
    with pytest.raises(UsageError, match="QUANTLIB_KERNELS=cuda, but no GPU: unset it"):
        chosen("cuda")
    with pytest.raises(UsageError, match="QUANTLIB_KERNELS=triton, but set TRITON_INTERPRET"):
        chosen("triton", triton="set TRITON_INTERPRET")
    with pytest.raises(UsageError, match=r"C\+\+ kernels are not to be had"):
        chosen("cpu", cpu=False)


def test_rows_come_from_triton_on_a_gpu_and_from_the_reference_without_it():
    assert dispatch.choose_rows(GPU) == TRITON
    assert dispatch.choose_rows(Machine("cuda", False, "", "no Triton")) == REFERENCE
    assert dispatch.choose_rows(Machine("cpu", True, "-", "-")) == CPU
    assert dispatch.choose_rows(Machine("cpu", True, "-", "", forced="triton")) == TRITON
    assert dispatch.choose_rows(Machine("cpu", True, "-", "", forced="emulator")) == REFERENCE
    assert dispatch.choose_rows(Machine("mps", False, "-", "-")) == REFERENCE


def test_a_cuda_kernel_that_cannot_be_compiled_is_passed_over_and_said_once(draw, monkeypatch):
    weight, packed = draw(8, [("w4g32", 64)])
    given = torch.ones(2, 64, dtype=F16), list(packed.tensors.values()), packed.layout, None

    def refuse(*_, **__):
        raise build.BuildError("NVRTC refuses decode_gemm.cu")

    monkeypatch.setattr(accelerated.cuda, "runner", refuse)
    monkeypatch.setattr(dispatch, "machine", lambda device: Machine("cuda", False, "", "none"))
    dispatch.say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="NVRTC refuses.*the torch reference computes"):
        found = accelerated.multiply(DECODE, *given)
    assert torch.equal(found, reference.linear(given[0], weight))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerated.multiply(DECODE, *given)
    monkeypatch.setattr(dispatch, "forced", lambda: "cuda")
    with pytest.raises(UsageError, match="QUANTLIB_KERNELS=cuda, but NVRTC refuses"):
        accelerated.multiply(DECODE, *given)


def test_a_product_of_integers_that_cannot_be_compiled_is_passed_over_too(draw, monkeypatch):
    weight, packed = draw(8, [("w4g32", 64)])
    rounding = rounded((64, "8"))
    given = torch.ones(2, 64, dtype=F16), list(packed.tensors.values()), packed.layout, None

    def refuse(*_, **__):
        raise build.BuildError("NVRTC refuses segmented_gemm.cu")

    monkeypatch.setattr(accelerated.cuda, "runner", refuse)
    monkeypatch.setattr(dispatch, "machine", lambda device: Machine("cuda", False, "", "none"))
    dispatch.say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="NVRTC refuses.*the torch reference computes"):
        found = accelerated.multiply_rounded(SEGMENTED, *given, rounding)
    assert torch.equal(found, reference.linear(given[0], weight, activations=rounding))
    monkeypatch.setattr(dispatch, "forced", lambda: "cuda")
    with pytest.raises(UsageError, match="QUANTLIB_KERNELS=cuda, but NVRTC refuses"):
        accelerated.multiply_rounded(SEGMENTED, *given, rounding)


@pytest.mark.parametrize("without_triton", ["", "Triton is not installed"])
def test_what_a_gpu_lacks_is_said_once(monkeypatch, without_triton):
    monkeypatch.setattr(loading, "why_not", lambda device: "CuPy is not installed")
    monkeypatch.setattr(launch, "why_not", lambda device: without_triton)
    monkeypatch.setattr(dispatch, "forced", lambda: None)
    dispatch.machine.cache_clear()
    dispatch.say_once.cache_clear()
    gpu = torch.device("cuda")
    with pytest.warns(RuntimeWarning) as said:
        machine = dispatch.machine(gpu)
    instead = "the torch reference" if without_triton else "Triton"
    wanted = [f"CuPy is not installed; {instead} computes in its place"]
    if without_triton:
        wanted.append("Triton is not installed; the torch reference computes in its place")
    assert [str(one.message) for one in said] == wanted
    assert dispatch.choose(Product(1, F16, W4), machine) == (
        REFERENCE if without_triton else TRITON
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.machine(torch.device("cuda", 1))  # another GPU of the same machine
    dispatch.machine.cache_clear()


def test_an_unknown_name_is_a_sentence(monkeypatch):
    monkeypatch.setenv("QUANTLIB_KERNELS", "fast")
    with pytest.raises(UsageError, match=r"is 'fast': use one of cpu, cuda, emulator, reference"):
        dispatch.forced.__wrapped__()


@needs_triton
def test_triton_without_a_gpu_wants_its_interpreter(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert "set TRITON_INTERPRET=1 before Python starts" in launch.why_not(torch.device("cpu"))


def test_without_triton_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'quantlib-torch[triton]'" in launch.why_not(torch.device("cuda"))


OPERATOR = """
import torch
from quantlib.formats import Scheme, pack, quantize_rtn
from quantlib.formats.activation import ActivationFormat, ActivationSegment
from quantlib.kernels import ops, reference
from quantlib.kernels.packed import PackedWeight

torch.manual_seed(0)
segments = Scheme.parse("w4g64z").segments(128)
weight = quantize_rtn(torch.randn(32, 128), segments)
packed = PackedWeight.from_tensors(pack(weight), (32, 128), segments)
x, bias = torch.randn(2, 3, 128), torch.randn(32)
dense = ops.dequantize(packed)
torch.testing.assert_close(ops.linear(x, packed, bias), x @ dense.T + bias, rtol=1e-4, atol=1e-4)
assert torch.equal(ops.embedding(torch.tensor([3, 31]), packed), dense[[3, 31]])
assert ops.linear(x[:0], packed).shape == (0, 3, 32)
rounding = (ActivationSegment(0, 128, ActivationFormat.parse("4zg64")),)
found = ops.linear(x, packed, bias, activations=rounding)
wanted = reference.linear(x, weight, bias, activations=rounding)
torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
floats = (ActivationSegment(0, 128, ActivationFormat.parse("mxfp4")),)
found = ops.linear(x, packed, bias, activations=floats)
wanted = reference.linear(x, weight, bias, activations=floats)
torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
print("all right", ops.backend())
"""


@needs_triton
def test_the_variable_sends_the_operators_to_tritons_kernels():
    """Inputs as they are and rounded to integers and to floats, leading dimensions, embeddings."""
    said = run(OPERATOR, QUANTLIB_KERNELS="triton", TRITON_INTERPRET="1")
    assert said.endswith("all right triton")


@pytest.mark.parametrize("name", ["emulator", pytest.param("triton", marks=needs_triton)])
def test_every_operator_is_accepted_and_is_one_node_of_a_graph(draw, compiler, use, name):
    """torch.library.opcheck (fake tensors, schemas, dynamic shapes), and torch.compile without a
    break, with whoever computes."""
    use(name)
    _, packed = draw(24, [("w4g64z", 128)])
    tensors, layout = list(packed.tensors.values()), packed.layout
    x, ids = (
        torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(F16),
        torch.arange(4),
    )
    rounding = activations_of(INT8)
    check, op = torch.library.opcheck, torch.ops.quantlib
    check(op.linear, (x, tensors, layout, None, "exact"))
    check(op.linear, (x, tensors, layout, None, "exact", 0, rounding))
    check(op.embedding, (ids, tensors, layout, F16))
    check(op.dequantize, (tensors, layout, F16))

    def model(x, ids):
        x = x + ops.embedding(ids, packed, F16).sum(0) * 2**-6
        x = ops.linear(x, packed).relu() * 2**-10 @ ops.dequantize(packed, F16)
        return ops.linear(x, packed, activations=rounding)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, ids), model(x, ids))


@needs_triton
@pytest.mark.parametrize("ordered", [False, True])
def test_triton_rotates_inputs_that_it_rounds(draw, use, ordered):
    """In one pass, or (columns in another order) before: what a rotation and a product give."""
    use("triton")
    _, packed = draw(24, [("w4g64z", 192)])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 192, generator=generator)
    turn, text = quantizer.hadamard(signs(12), 16), activations_of(rounded((192, "8")))
    order = torch.randperm(192, generator=generator).int() if ordered else None
    assert turned.fuses(x, 192, text, turn)
    found = turned.linear(x, packed, text, turn, order)
    rotated = quantizer.rotate(x, turn)
    wanted = ops.linear(rotated if order is None else rotated[:, order], packed, activations=text)
    # A rotated number between two codes may be rounded to either: of 192, one by a 127th.
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02 * float(wanted.std()))
    parts = turn.sylvester, turn.dense, turn.factor, order
    given = x, list(packed.tensors.values()), packed.layout, None, text, *parts
    torch.library.opcheck(torch.ops.quantlib.turned_linear, given)


def test_fake_tensors_of_a_gpu_need_no_gpu(draw):
    _, packed = draw(24, [("w4g64z", 128)])
    with FakeTensorMode():
        x = torch.empty(2, 5, 128, dtype=BF16, device="cuda")
        tensors = [
            torch.empty(own.shape, dtype=own.dtype, device="cuda")
            for own in packed.tensors.values()
        ]
        for mode in ops.MODES:
            out = torch.ops.quantlib.linear(x, tensors, packed.layout, None, mode)
            assert (out.shape, out.dtype, out.device.type) == ((2, 5, 24), BF16, "cuda")
        rows = torch.ops.quantlib.dequantize(tensors, packed.layout, F16)
        assert (rows.shape, rows.dtype, rows.device.type) == ((24, 128), F16, "cuda")
        ids = torch.empty(7, dtype=torch.int64, device="cuda")
        rows = torch.ops.quantlib.embedding(ids, tensors, packed.layout, F32)
        assert (rows.shape, rows.dtype, rows.device.type) == ((7, 128), F32, "cuda")


@pytest.fixture
def emulated(compiler: None, use: Callable[[str], None]) -> None:
    """This process on the emulator."""
    use("emulator")


def test_a_forced_reference_is_the_reference(draw, use):
    weight, packed = draw(8, [("w4g32", 64)])
    x = torch.ones(2, 64) / 3
    use("reference")
    assert ops.backend() == "reference"
    assert torch.equal(ops.linear(x, packed, mode="int8"), reference.linear(x, weight, None, 8))


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_operator_launches_the_cuda_kernel_in_the_emulator(draw, emulated, dtype):
    """With rows that are not aligned, more tokens than a launch takes, and a bias."""
    weight, packed = draw(40, [("w4g64z", 130)])
    generator = torch.Generator().manual_seed(0)
    for tokens in (3, 70):
        x = torch.randn(tokens, 130, generator=generator).to(dtype)
        bias = torch.randn(40, generator=generator).to(dtype)
        found = ops.linear(x, packed, bias)
        wanted = reference.linear(x.double(), weight, bias, compute_dtype=torch.float64)
        # Sums in float32, and one rounding to 16 bits.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=1e-3)


def test_the_operator_multiplies_rounded_inputs_in_the_emulator(draw, emulated):
    """One weight, inputs rounded in one way and in another, mode int8 (one scale for both
    segments), leading dimensions, no tokens at all."""
    weight, packed = draw(40, [("w4g64z", 128), ("w8", 64)])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 192, generator=generator).to(F16)
    bias = torch.randn(40, generator=generator).to(F16)
    ways = [rounded((128, "4z"), (64, "8")), rounded((128, "8"), (64, "8"))]
    ways += [rounded((192, "8")), ways[0]]
    for way in ways:
        mode: dict[str, Any] = {"mode": "int8"} if len(way) == 1 else {"activations": way}
        found = ops.linear(x, packed, bias, **mode)
        wanted = reference.linear(x.double(), weight, bias, activations=way)
        # Sums in float32, and one rounding to 16 bits.
        eps = torch.finfo(F16).eps
        torch.testing.assert_close(found.double(), wanted.double(), rtol=eps, atol=1e-3)
    assert ops.linear(x[:0], packed, bias, activations=ways[0]).shape == (0, 3, 40)


def test_what_the_cuda_kernel_does_not_take_the_reference_computes(draw, emulated):
    for parts in ([("mxfp4", 64)], [("w4g32", 32), ("w8", 32)]):
        weight, packed = draw(8, parts)
        x = torch.ones(2, 64, dtype=F16)
        assert torch.equal(ops.linear(x, packed), reference.linear(x, weight))


def run(script: str, **environment: str) -> str:
    """What a script prints in another process."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
