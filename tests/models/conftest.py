"""Tiny random models of the real classes, saved by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

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
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WITH_TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "smollm3": ("smollm3", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 8}),
    "gemma3_text": ("gemma3_text", {"head_dim": 8}),
    "gemma3": (
        "gemma3",
        {
            "text_config": {**BASE, "head_dim": 8},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 95,
        },
    ),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "qwen3_moe_some_dense": ("qwen3_moe", {**MOE, "mlp_only_layers": [0]}),
}
WITHOUT_TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "phi": ("phi", {}),
}
CASES = {**WITH_TABLE, **WITHOUT_TABLE}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    """Every tiny model in turn."""
    return str(request.param)


@pytest.fixture(params=[case for case in WITH_TABLE if case != "gemma3"])
def text_case(request: pytest.FixtureRequest) -> str:
    """Those with a table and nothing but text (the walk rightly refuses a vision tower)."""
    return str(request.param)


@pytest.fixture(params=WITHOUT_TABLE)
def walked_case(request: pytest.FixtureRequest) -> str:
    """Those that the generic walk has to map."""
    return str(request.param)


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """tiny("llama", num_hidden_layers=2): float32, every parameter random, norms and biases too."""

    def build(case: str, **settings: Any) -> PreTrainedModel:
        model_type, own = CASES[case]
        flat = {} if "text_config" in own else BASE
        config = CONFIG_MAPPING[model_type](**{**flat, **own, **settings})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.2, generator=generator)
        return model

    return build


@pytest.fixture
def saved(tmp_path: Path, tiny: Callable[..., PreTrainedModel]) -> Callable[..., Path]:
    """saved("llama", max_shard_size="20KB", num_hidden_layers=2) -> its folder."""

    def save(case: str, max_shard_size: str = "5GB", **settings: Any) -> Path:
        folder = tmp_path / case
        tiny(case, **settings).save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return save


@pytest.fixture
def edit() -> Callable[[Path, Callable[[dict[str, torch.Tensor]], object]], Path]:
    """edit(folder, change): store a single-file model again, its tensors changed in place."""

    def store(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return store
