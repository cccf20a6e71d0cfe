"""What only a real GPU can show: `TRITON_INTERPRET=0 pytest -m gpu`. Skipped, with a reason,
elsewhere.

What is exact in the emulator and in the interpreter must be the same bits here. The tests of
Triton's kernels (`triton/`) and of whole models (`test_dispatch_models.py`) run here too.
"""

import os
from dataclasses import replace

import pytest
import torch

from quantlib.formats import dequantize
from quantlib.formats.activation import ActivationFormat, ActivationSegment
from quantlib.kernels import dispatch, ops
from quantlib.kernels.cpu.forms import BlockRotation
from quantlib.kernels.cuda import decode, loading, segmented
from quantlib.kernels.cuda import launch as cuda
from quantlib.kernels.packed import PackedWeight
from quantlib.kernels.triton import inputs, launch, layout

from .cuda.emulated_segmented import linear
from .triton.bounds import assert_close, expected, moved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="run with TRITON_INTERPRET=0"
    ),
]

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SCHEMES = ["w2g64z4s4", "w3z", "w4g128", "w5g32z", "w6", "w7g256", "w8g16zs8", "fp8", "mxfp4"]
GPU = torch.device("cuda")
_A_WHILE = 200_000_000
"""Cycles: a tenth of a second."""


def needs(reason: str) -> None:
    if reason:
        pytest.skip(reason)


def sample(draw, scheme, tokens, dtype, rows=200, columns=1111):
    weight, packed = draw(rows, [(scheme, columns)])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    moved = {name: tensor.to(GPU) for name, tensor in packed.tensors.items()}
    return weight, PackedWeight.from_tensors(moved, packed.shape, packed.segments), x


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("tokens", [1, 17, 65])
def test_tritons_products(draw, scheme, dtype, tokens):
    needs(launch.why_not(GPU))
    weight, packed, x = sample(draw, scheme, tokens, dtype)
    split = layout.pack(packed.to_quantized())
    found = [launch.linear(x.to(GPU), split) for _ in range(20)]
    assert_close(found[0].cpu(), *expected(weight, x))
    assert all(torch.equal(again, found[0]) for again in found)


@pytest.mark.parametrize("scheme", ["w3g16", "w4g128", "w5", "w8g64"])
def test_tritons_integers_are_the_references_bits(draw, scheme):
    """Scales of 1: sums of integers, that any order gives."""
    needs(launch.why_not(GPU))
    weight, _ = draw(200, [(scheme, 640)], unit_scales=True)
    activations = (ActivationSegment(0, 640, ActivationFormat(8)),)
    codes = torch.randint(-127, 128, (9, 640), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(9, 1, device=GPU)
    split = layout.pack(moved(weight, GPU))
    found = launch.integer_linear(codes.to(GPU, torch.int8), ones, split, activations)
    assert torch.equal(found.cpu().double(), codes.double() @ dequantize(weight).double().T)


def test_rotating_twice_gives_back_what_was_rotated():
    needs(launch.why_not(GPU))
    x = torch.randn(5, 4096, generator=torch.Generator().manual_seed(0)).to(GPU)
    once = inputs.rotate(x, BlockRotation(4096))
    torch.testing.assert_close(inputs.rotate(once, BlockRotation(4096)), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["w2g16z8", "w3g32s4", "w4g64z5s5", "w5", "w6g128", "w7z", "w8"])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("tokens", [1, 20, 64])
def test_the_cuda_kernel(draw, scheme, dtype, tokens):
    """Twenty times the same bits, on a stream of its own too."""
    runner, weight, packed, x = decoding(draw, scheme, tokens, dtype)
    own = cuda.pack(packed.to_quantized())
    given = x.to(GPU)
    first = cuda.decode_linear(runner, given, own)
    assert_close(first.cpu(), *expected(weight, x))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [cuda.decode_linear(runner, given, own) for _ in range(20)]
    torch.cuda.synchronize()
    assert all(torch.equal(again, first) for again in found)


def decoding(draw, scheme, tokens, dtype):
    needs(dispatch.machine(GPU).cuda)
    return cuda.runner(GPU), *sample(draw, scheme, tokens, dtype)


def test_the_cuda_kernel_is_as_near_as_its_emulation(draw):
    """Tensor cores may cut where the emulator rounds: both stay within the bound."""
    runner, weight, packed, x = decoding(draw, "w4g64z", 9, F16)
    on_gpu = cuda.decode_linear(runner, x.to(GPU), cuda.pack(packed.to_quantized()))
    emulated = cuda.decode_linear(cuda.EmulatedRunner(), x, decode.pack(weight))
    exact, bound = expected(weight, x)
    assert_close(on_gpu.cpu(), exact, bound)
    assert_close(emulated, exact, bound)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4h8/8", "w4g64z5s5a4zg64h8/8"])
@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_rounded_inputs_give_the_emulators_bits(draw, scheme, tokens):
    """Kernel (b) and its quantizer; blocks share tiles, so sums change hands."""
    needs(dispatch.machine(GPU).cuda)
    runner = cuda.GpuRunner(loading.loader_for(GPU), GPU, processors=3)
    emulator = cuda.EmulatedRunner()
    emulator.architecture, emulator.processors = runner.architecture, runner.processors
    own = linear(draw, scheme, 200, 1111)
    x = torch.randn(tokens, 1111, generator=torch.Generator().manual_seed(1)).to(F16)
    weight = segmented.pack(own.weight, own.layout(runner.architecture))
    wanted = cuda.segmented_linear(emulator, x, weight, own.activations)
    there = {name: getattr(weight, name).to(GPU) for name in ("codes", "meta", "units")}
    moved = replace(weight, **there)
    for _ in range(20):
        found = cuda.segmented_linear(runner, x.to(GPU), moved, own.activations)
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("tokens", [1, 100, 400])
@pytest.mark.parametrize("mode", ops.MODES)
def test_the_operator_in_a_captured_graph(draw, tokens, mode):
    """Whichever kernel is chosen: replayed on other inputs, the graph gives their results."""
    needs(launch.why_not(GPU))
    _, packed, x = sample(draw, "w4g64z", tokens, F16)
    given = x.to(GPU)
    wanted = ops.linear(given, packed, None, mode)
    graph, fed = torch.cuda.CUDAGraph(), torch.zeros_like(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.linear(fed, packed, None, mode)  # compiles, packs, makes the stream's workspace
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        out = ops.linear(fed, packed, None, mode)
    fed.copy_(given)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("tokens", [1, 100, 400])
@pytest.mark.parametrize("mode", ops.MODES)
def test_the_operator_waits_for_its_own_stream(draw, tokens, mode):
    """Inputs come late on a stream: a kernel launched on another one would read zeros."""
    needs(launch.why_not(GPU))
    _, packed, x = sample(draw, "w4g64z", tokens, F16)
    given, late = x.to(GPU), torch.zeros(x.shape, dtype=F16, device=GPU)
    wanted = ops.linear(given, packed, None, mode)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_A_WHILE)
        late.copy_(given)
        found = ops.linear(late, packed, None, mode)
    stream.synchronize()
    assert torch.equal(found, wanted)


def test_rows_in_a_captured_graph(draw):
    needs(launch.why_not(GPU))
    weight, packed, _ = sample(draw, "w4g64z", 1, F16)
    ids = torch.tensor([3, 199, 0], device=GPU)
    graph, fed = torch.cuda.CUDAGraph(), torch.zeros_like(ids)
    ops.embedding(fed, packed, F32)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = ops.embedding(fed, packed, F32)
    fed.copy_(ids)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out.cpu(), dequantize(weight)[ids.cpu()], rtol=1e-6, atol=0)


def test_every_operator_is_accepted_and_compiled(draw):
    needs(launch.why_not(GPU))
    _, packed, x = sample(draw, "w4g64z", 3, F16)
    given, tensors = x.to(GPU), list(packed.tensors.values())
    check, op = torch.library.opcheck, torch.ops.quantlib
    for mode in ops.MODES:
        check(op.linear, (given, tensors, packed.layout, None, mode))
    check(op.embedding, (torch.tensor([5, 7], device=GPU), tensors, packed.layout, F16))
    check(op.dequantize, (tensors, packed.layout, F16))
    compiled = torch.compile(lambda x: ops.linear(x, packed).relu(), fullgraph=True)
    assert torch.equal(compiled(given), ops.linear(given, packed).relu())
