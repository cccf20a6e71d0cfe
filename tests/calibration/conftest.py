"""Tiny random decoders of many families, and a store that keeps hidden states in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from quantlib.calibration.stream import BlockStream
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source

from ..models import stacked_models

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_one_block": ("llama", {"num_hidden_layers": 1}),
    "mistral_sliding": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "tie_word_embeddings": False}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "qwen3_moe_some_dense": ("qwen3_moe", {**MOE, "mlp_only_layers": [1]}),
    # Blocks that return tuples: bloom, falcon, mpt, gptj. Called with positions: gpt_bigcode.
    "bloom": ("bloom", {"n_head": 4, "n_layer": 3}),
    "falcon": ("falcon", {}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3}),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "opt": ("opt", {"ffn_dim": 48}),
}


@dataclass
class Tiny:
    """A model whole and in memory, and the same model streamed from disk."""

    model: PreTrainedModel
    model_map: ModelMap
    source: Source

    def stream(self) -> BlockStream:
        return BlockStream(self.source, self.model_map)


class MemoryStore:
    """`passes.HiddenStore` in a dictionary. Values are copies, as they are after a disk."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        return name in self.values

    def load(self, name: str) -> Tensor:
        return self.values[name].clone()

    def save(self, name: str, value: Tensor) -> None:
        self.values[name] = value.detach().clone()

    def drop(self, name: str) -> None:
        self.values.pop(name, None)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """tiny("llama"): every parameter random, norms and biases too; made once per session."""
    made: dict[str, Tiny] = {}

    def build(case: str) -> Tiny:
        if case not in made:
            model_type, own = CASES[case]
            config = CONFIG_MAPPING[model_type](**{**BASE, **own})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0.0, 0.2, generator=generator)
            folder: Path = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            source = Source.open(folder)
            made[case] = Tiny(model, ModelMap.from_source(source), source)
        return made[case]

    return build


@pytest.fixture
def store() -> MemoryStore:
    """An empty store."""
    return MemoryStore()


@pytest.fixture
def new_store() -> Callable[[], MemoryStore]:
    """For tests that need several."""
    return MemoryStore


@pytest.fixture(scope="session")
def windows() -> Tensor:
    """3 windows of 20 tokens: longer than the sliding windows of 6."""
    return torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def mapped(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[PreTrainedModel, ModelMap]]:
    """mapped("llava"): a tiny model of several stacks and its map; made once per session."""
    made: dict[str, tuple[PreTrainedModel, ModelMap]] = {}

    def build_once(case: str) -> tuple[PreTrainedModel, ModelMap]:
        if case not in made:
            model = stacked_models.build(case)
            folder = stacked_models.save(model, tmp_path_factory.mktemp(case))
            made[case] = model, ModelMap.from_source(Source.open(folder))
        return made[case]

    return build_once
