"""Tiny random models of four families, and packed checkpoints of them made by plain rounding."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from quantlib.checkpoint.writer import write_checkpoint
from quantlib.formats import QuantizedWeight, Scheme, dequantize, pack, quantize_rtn

VOCABULARY = 384
"""That of the tiny tokenizer."""
SCHEMES = ("w4g32z", "w3g16zs6", "w8", "w5g64", "fp8", "mxfp4", "w2g16z", "w6t", "nvfp4")
"""Given to the weights in turn: every kind of scale and zero point, dense odd widths, floats."""

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def build(family: str, seed: int = 0) -> Any:
    """A random model of `llama`, `llama-wide` (two groups of 128 inputs in its down projections),
    `llama-untied`, `gemma2` or `qwen3-moe`, in float32."""
    moe = {
        "moe_intermediate_size": 24,  # 24 rows of 3-bit zero points: experts do not begin at words
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "tie_word_embeddings": False,
        "experts_implementation": "eager",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "llama":
            return LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=True)).eval()
        if family == "llama-wide":
            return LlamaForCausalLM(LlamaConfig(**COMMON | {"intermediate_size": 160})).eval()
        if family == "llama-untied":
            config = LlamaConfig(**COMMON, tie_word_embeddings=False, attention_bias=True)
            return LlamaForCausalLM(config).eval()
        if family == "gemma2":
            config = Gemma2Config(**COMMON, query_pre_attn_scalar=16, sliding_window=8)
            return Gemma2ForCausalLM(config).eval()
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **moe)).eval()


FAMILIES = ("llama", "llama-untied", "gemma2", "qwen3-moe")


@dataclass
class Packed:
    """A checkpoint folder, and what went into it."""

    folder: Path
    dense: Any
    weights: dict[str, QuantizedWeight]
    schemes: dict[str, str]

    def dequantized(self) -> Any:
        """The dense model, with the values that the packed weights stand for."""
        state = self.dense.state_dict()
        for name, weight in self.weights.items():
            state[name].copy_(dequantize(weight).view(state[name].shape))
        return self.dense


def matrices(model: Any) -> dict[str, torch.Tensor]:
    """The weights to quantize: all but norms, biases and routers (a tied head is the embedding)."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and not name.endswith("mlp.gate.weight")
    }


def schemes_in_turn(model: Any) -> dict[str, str]:
    return {name: SCHEMES[i % len(SCHEMES)] for i, name in enumerate(matrices(model))}


def quantize(model: Any, schemes: Mapping[str, str]) -> dict[str, QuantizedWeight]:
    weights = {}
    for name, matrix in matrices(model).items():
        scheme = Scheme.parse(schemes[name])
        if scheme.weight is not None:
            flat = matrix.reshape(-1, matrix.shape[-1])
            weights[name] = quantize_rtn(flat, scheme.segments(matrix.shape[-1]))
    return weights


def write(model: Any, schemes: Mapping[str, str], folder: Path, **changes: Any) -> Packed:
    """Round `model` to `schemes` and write it. `changes` to config.json: None removes an entry."""
    weights = quantize(model, schemes)
    tensors = {name: p.detach() for name, p in model.named_parameters() if name not in weights}
    for name, weight in weights.items():
        tensors |= {name + suffix: tensor for suffix, tensor in pack(weight).items()}
    config = model.config.to_dict() | {"architectures": [type(model).__name__]} | changes
    config = {key: value for key, value in config.items() if value is not None}
    shapes = {name: tuple(matrix.shape) for name, matrix in matrices(model).items()}
    write_checkpoint(folder, tensors, config, schemes, shapes)
    return Packed(folder, model, weights, dict(schemes))


@pytest.fixture(scope="session")
def build_tiny() -> Callable[..., Any]:
    """`build_tiny(family, seed=0)`, see `build`."""
    return build


@pytest.fixture(params=FAMILIES)
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Packed:
    """A packed checkpoint of each family."""
    model = build(request.param)
    return write(model, schemes_in_turn(model), tmp_path / "out", dtype="float32")


@pytest.fixture
def write_packed(tmp_path: Path) -> Callable[..., Packed]:
    """`write_packed(family, schemes=None, **changes_to_config) -> Packed`.

    schemes: weight name -> scheme, "" for all others; None for all kinds in turn.
    """

    def make(family: str, schemes: Mapping[str, str] | None = None, **changes: Any) -> Packed:
        model = build(family)
        given = schemes_in_turn(model)
        if schemes is not None:
            given = {name: schemes.get(name, schemes.get("", "")) for name in given}
        changes = {"dtype": "float32"} | changes
        return write(model, given, tmp_path / f"packed-{family}", **changes)

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Two sequences of 12 tokens, longer than Gemma's sliding window."""
    return torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
