"""Which kernel computes what, and that forcing another one changes nothing that a user reads.

No GPU is needed: what a GPU would be given is decided by a pure function of what there is; launches
run in the emulator and in Triton's interpreter.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.errors import UsageError
from quantlib.formats.activation import ActivationFormat, ActivationSegment
from quantlib.kernels import accelerated, dispatch, ops, reference
from quantlib.kernels.cpu import build
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
from quantlib.kernels.triton import launch
from quantlib.pipeline.compress import compress

from .greedy import greedy

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


def test_an_unknown_name_is_a_sentence(monkeypatch):
    monkeypatch.setenv("QUANTLIB_KERNELS", "fast")
    with pytest.raises(UsageError, match=r"is 'fast': use one of cpu, cuda, emulator, reference"):
        dispatch.forced.__wrapped__()


@needs_triton
def test_triton_without_a_gpu_wants_its_interpreter(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert "set TRITON_INTERPRET=1 before Python starts" in launch.why_not(torch.device("cpu"))
    assert launch.why_not(torch.device("cuda")) == ""


def test_without_triton_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'quantlib-torch[triton]'" in launch.why_not(torch.device("cuda"))


OPERATOR = """
import torch
from quantlib.formats import Scheme, pack, quantize_rtn
from quantlib.kernels import dispatch, ops
from quantlib.kernels.packed import PackedWeight
from quantlib.formats.activation import ActivationFormat, ActivationSegment

torch.manual_seed(0)
segments = Scheme.parse("w4g64z").segments(128)
weight = quantize_rtn(torch.randn(32, 128), segments)
packed = PackedWeight.from_tensors(pack(weight), (32, 128), segments)
x, bias = torch.randn(2, 3, 128), torch.randn(32)
tensors = list(packed.tensors.values())
opcheck, op = torch.library.opcheck, torch.ops.quantlib
for dtype in (torch.float32, torch.bfloat16):
    given = x.to(dtype), tensors, packed.layout, bias.to(dtype)
    for mode in ("exact", "int8"):
        opcheck(op.linear, (*given, mode))
opcheck(op.embedding, (torch.tensor([[0, 31], [5, 5]]), tensors, packed.layout, torch.bfloat16))


def layer(x):
    return ops.linear(x, packed, bias).relu()


compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
assert torch.equal(compiled(x), layer(x))
dense = ops.dequantize(packed)
torch.testing.assert_close(layer(x), (x @ dense.T + bias).relu(), rtol=1e-4, atol=1e-4)
assert torch.equal(ops.embedding(torch.tensor([3, 31]), packed), dense[[3, 31]])
assert ops.linear(x[:0], packed).shape == (0, 3, 32)
rounding = (ActivationSegment(0, 128, ActivationFormat.parse("4zg64")),)
from quantlib.kernels import reference
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
def test_torch_accepts_the_operators_on_tritons_kernels():
    """opcheck, torch.compile with one graph, every mode, leading dimensions, embeddings."""
    said = run(OPERATOR, QUANTLIB_KERNELS="triton", TRITON_INTERPRET="1")
    assert said.endswith("all right triton")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`use(name)`: what QUANTLIB_KERNELS does, in this process."""

    def force(name: str) -> None:
        monkeypatch.setattr(dispatch, "forced", lambda: name)
        dispatch.machine.cache_clear()

    yield force
    dispatch.machine.cache_clear()


@pytest.fixture
def emulated(use: Callable[[str], None]) -> None:
    """This process on the emulator."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
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


REQUEST: dict[str, Any] = {
    "seqlen": 32,
    "windows": 2,
    "probes": 0,
    "passes": 1,
    "report": False,
    "refine": False,
}
PLAIN = REQUEST | {"schemes": ["w4g64z", "w3g32z4s4", "w8g64"], "bits": 7.0}
RESQ = REQUEST | {"schemes": ["w4g32zs4a4zh8/8", "w8g32zs8"], "bits": 14.0, "rotation": "pca"}
TOKENS = 3


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], sample_text: str
) -> Callable[[str], Path]:
    """A folder of a tiny model, compressed: "plain" by issue A's pipeline in mixed precision,
    "resq" rotated, with 4-bit inputs and wider columns. Each is made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            text = folder / "text.txt"
            text.write_text(sample_text)
            model = tiny_llama(folder / "model", head_dim=32)
            asked = {"plain": PLAIN, "resq": RESQ}[kind]
            made[kind] = compress(model, out=folder / "out", data=str(text), **asked).path
        return made[kind]

    return make


@needs_triton
@pytest.mark.parametrize(
    ("kind", "most"),
    [("plain", TRITON), pytest.param("resq", "multiply_rounded", marks=pytest.mark.slow)],
)
def test_a_compressed_model_says_the_same_through_tritons_interpreter(checkpoints, kind, most, use):
    if reason := launch.why_not(torch.device("cpu")):
        pytest.skip(reason)
    folder = checkpoints(kind)
    tokens, logits, launched = greedy(folder, F32, TOKENS)
    assert not launched
    use("triton")
    found, near, launched = greedy(folder, F32, TOKENS)
    assert launched[most] >= 14 * TOKENS  # two blocks of seven linears
    assert launched["rows"] == TOKENS  # the embedding
    assert found == tokens
    # Inputs that lie between two codes may be rounded to either.
    torch.testing.assert_close(near, logits, rtol=0, atol=0.02 * float(logits.std()))


@pytest.mark.parametrize(
    ("kind", "most"), [("plain", DECODE), pytest.param("resq", SEGMENTED, marks=pytest.mark.slow)]
)
def test_a_compressed_model_says_the_same_through_the_emulated_cuda_kernels(
    checkpoints, kind, most, emulated, use
):
    folder = checkpoints(kind)
    found, near, launched = greedy(folder, F16, TOKENS)
    assert launched[most] >= 14 * TOKENS
    use("cpu")
    tokens, logits, launched = greedy(folder, F16, TOKENS)
    assert not launched
    assert found == tokens
    torch.testing.assert_close(near, logits, rtol=0, atol=0.02 * float(logits.std()))


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
