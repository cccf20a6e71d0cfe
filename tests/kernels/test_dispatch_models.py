"""Compressed checkpoints say the same through Triton's interpreter, through the emulated CUDA
kernels, and on the CPU: token by token, with a KV cache."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quantlib.checkpoint.reader import read_layout
from quantlib.cli.app import app
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.cuda import decode
from quantlib.kernels.dispatch import DECODE, SEGMENTED, TRITON
from quantlib.kernels.triton import launch
from quantlib.pipeline.compress import compress

from .greedy import greedy, natively

F16, F32 = torch.float16, torch.float32
REQUEST: dict[str, Any] = {
    "seqlen": 32,
    "windows": 2,
    "probes": 0,
    "passes": 1,
    "report": False,
    "refine": False,
}
PLAIN = REQUEST | {"schemes": ["w4g64z", "w3g32z4s4", "w8g64"], "bits": 7.0, "kv": "int8"}
RESQ = REQUEST | {
    "schemes": ["w4g32zs4a4zh8/8", "w8g32zs8"],
    "bits": 14.0,
    "rotation": "pca",
    "kv": "int4h16",
}
PRUNED = REQUEST | {"schemes": ["w4g64:2of4"], "bits": 6.0}
TOKENS = 3
TIPPED = {"plain": 0.02, "pruned": 0.02, "resq": 0.6}
"""Standard deviations by which logits may differ. Rotated inputs of 4 bits are rounded from other
numbers where they were not rounded to 16 bits before: codes tip over, as many as between 16 and 32
bits on the CPU, where logits differ by up to 0.66."""
BLOCKS, LINEARS = 2, 14
"""Each block has seven linears; in "resq" the inputs of the last of them are rotated."""


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], sample_text: str
) -> Callable[[str], Path]:
    """A folder of a tiny model, compressed: "plain" by issue A's pipeline in mixed precision,
    "resq" rotated, with 4-bit inputs and wider columns, with caches of 8 and of 4 bits; "pruned" to
    two of every four columns. Each is made once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            text = folder / "text.txt"
            text.write_text(sample_text)
            model = tiny_llama(folder / "model", head_dim=32)
            asked = {"plain": PLAIN, "resq": RESQ, "pruned": PRUNED}[kind]
            made[kind] = compress(model, out=folder / "out", data=str(text), **asked).path
        return made[kind]

    return make


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs Triton: pip install 'quantlib-torch[triton]'",
)
# ResQ takes the interpreter a minute; test_dispatch.py has single linears of it.
@pytest.mark.parametrize(
    "kind", ["plain", "pruned", pytest.param("resq", marks=pytest.mark.kernels)]
)
def test_a_compressed_model_says_the_same_through_tritons_interpreter(checkpoints, kind, use):
    if reason := launch.why_not(torch.device("cpu")):
        pytest.skip(reason)
    folder = checkpoints(kind)
    tokens, logits, launched = greedy(folder, F32, TOKENS)
    assert not launched
    use("triton")
    found, near, launched = greedy(folder, F32, TOKENS)
    assert launched[TRITON] >= LINEARS * TOKENS
    assert launched["rows"] == TOKENS  # the embedding
    assert launched["turned_by_triton"] == (BLOCKS * TOKENS if kind == "resq" else 0)
    assert found == tokens
    # Inputs, keys and values that lie between two codes may be rounded to either.
    torch.testing.assert_close(near, logits, rtol=0, atol=0.02 * float(logits.std()))


@pytest.mark.parametrize(
    ("kind", "most"), [("plain", DECODE), ("resq", SEGMENTED), ("pruned", DECODE)]
)
def test_a_compressed_model_says_the_same_through_the_emulated_cuda_kernels(
    checkpoints, kind, most, compiler, use
):
    """Rotated by hooks, as on the CPU: to 16 bits, before inputs are rounded to 4."""
    folder = checkpoints(kind)
    use("emulator")
    found, near, launched = greedy(folder, F16, TOKENS, fused=False)
    assert launched[most] >= LINEARS * TOKENS
    use("cpu")
    tokens, logits, launched = greedy(folder, F16, TOKENS)
    assert not launched
    assert found == tokens
    torch.testing.assert_close(near, logits, rtol=0, atol=0.02 * float(logits.std()))


def test_pruned_weights_are_stored_without_their_zeros_and_multiplied_by_mma_sp(
    checkpoints, emulated
):
    folder = checkpoints("pruned")
    found = read_layout(folder)
    linears = [name for name in found if str(found.schemes[name]) == "w4g64:2of4"]
    assert len(linears) == LINEARS
    for name in linears:
        rows, columns = found.shapes[name]
        stored = {suffix: tensor.nbytes for suffix, tensor in found.tensors(name).items()}
        # Half the codes in 4 bits, the places of each in two, a float16 for 64 columns.
        sizes = rows * columns // 4, rows * columns // 8, rows * -(-columns // 64) * 2
        assert stored == dict(zip(("_packed", "_places", "_scale"), sizes, strict=True))
    answer = CliRunner().invoke(app, ["inspect", str(folder)])
    assert "w4g64:2of4" in answer.stdout
    greedy(folder, F16, 1, fused=False)
    products = [one for one in emulated if one.name == decode.NAME]
    assert sum(one.macros["QL_SPARSE"] for one in products) == LINEARS


@pytest.mark.parametrize("kind", ["plain", "resq"])
def test_rotations_and_attention_of_the_cuda_kernels_say_the_same(checkpoints, kind, compiler, use):
    """Rotated and rounded in one pass, and attended to as packed keys and values lie."""
    folder = checkpoints(kind)
    use("emulator")
    found, near, launched = greedy(folder, F16, TOKENS)
    assert launched["multiply_turned"] == (BLOCKS * TOKENS if kind == "resq" else 0)
    assert launched["attend"] == BLOCKS * (TOKENS - 1), "every token but the prompt's"
    use("cpu")
    tokens, logits, _ = greedy(folder, F16, TOKENS)
    assert found == tokens
    torch.testing.assert_close(near, logits, rtol=0, atol=TIPPED[kind] * float(logits.std()))


@pytest.mark.skipif(cpu.load() is None, reason="no compiled kernels")
@pytest.mark.parametrize("kind", ["plain", "pruned", "resq"])
def test_the_path_they_are_compared_with_says_what_the_native_engine_says(checkpoints, kind):
    folder = checkpoints(kind)
    tokens, _, launched = greedy(folder, F32, TOKENS)
    assert not launched
    assert natively(folder, TOKENS) == tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["plain", "resq"])
def test_a_compressed_model_says_the_same_on_a_gpu(checkpoints, kind):
    folder = checkpoints(kind)
    tokens, logits, _ = greedy(folder, F16, TOKENS)
    found, near, launched = greedy(folder, F16, TOKENS, "cuda")
    assert launched[DECODE] + launched[SEGMENTED] + launched[TRITON] >= LINEARS * TOKENS
    assert found == tokens
    torch.testing.assert_close(near, logits, rtol=0, atol=TIPPED[kind] * float(logits.std()))
