"""A loaded checkpoint takes the memory of its file, at no time twice that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from quantlib.checkpoint.writer import write_checkpoint
from quantlib.formats import Scheme, pack, quantize_rtn
from quantlib.kernels.cpu import library as cpu

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 256,
}
LOAD = """
import json, re, sys
from quantlib.checkpoint.reader import read_layout
from quantlib.runtime.engine import Engine, NativeCheckpoint
from transformers import AutoConfig

def memory():
    with open("/proc/self/status") as file:
        text = file.read()
    return [1024 * int(re.search(rf"{name}:\\s+(\\d+)", text)[1]) for name in ("VmRSS", "VmHWM")]

folder = sys.argv[1]
native = NativeCheckpoint.open(read_layout(folder), AutoConfig.from_pretrained(folder))
before, _ = memory()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again
decoder = native.read()
engine = Engine(decoder, capacity=64)
engine.prefill([1, 2, 3])
after, peak = memory()
print(json.dumps({"resident": after - before, "peak": peak - before}))
"""


def repeated(rows: int, columns: int, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The packed tensors of a matrix that repeats 64 random rows."""
    matrix = torch.randn(64, columns, generator=torch.Generator().manual_seed(rows)) * 0.02
    packed = pack(quantize_rtn(matrix, scheme.segments(columns)))
    return {suffix: tensor.repeat(rows // 64, 1) for suffix, tensor in packed.items()}


def write_large(folder: Path) -> Path:
    """A Llama of 134 M weights in 4 bits; layers share their values, which costs the test less."""
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True)
    hidden, inner, scheme = config.hidden_size, config.intermediate_size, Scheme.parse("w4g64")
    sizes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    sizes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    sizes |= {"mlp.down_proj": (hidden, inner)}
    names = {
        f"model.layers.{layer}.{module}.weight": size
        for layer in range(config.num_hidden_layers)
        for module, size in sizes.items()
    }
    names["model.embed_tokens.weight"] = (config.vocab_size, hidden)
    packed = {size: repeated(*size, scheme) for size in set(names.values())}
    tensors = {
        name + suffix: tensor
        for name, size in names.items()
        for suffix, tensor in packed[size].items()
    }
    norms = [f"{part}_layernorm" for part in ("input", "post_attention")]
    for layer in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{layer}.{norm}.weight": torch.ones(hidden) for norm in norms}
    tensors["model.norm.weight"] = torch.ones(hidden)
    described = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    write_checkpoint(folder, tensors, described, dict.fromkeys(names, str(scheme)), names)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(cpu.load() is None, reason="no compiled kernels")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_a_loaded_checkpoint_takes_the_memory_of_its_file(tmp_path: Path) -> None:
    folder = write_large(tmp_path / "large")
    size = (folder / "model.safetensors").stat().st_size
    command = [sys.executable, "-P", "-c", LOAD, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    found = json.loads(done.stdout)
    slack = 8 << 20
    """Caches of 64 tokens, work space of three, and what the interpreter imports on the way."""
    assert size > 60e6 > 4 * slack
    assert 0.8 * size < found["resident"] <= 1.1 * size + slack
    largest = 4096 * 1024 // 2
    assert found["peak"] <= 1.1 * size + 2 * largest + slack
