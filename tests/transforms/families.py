"""Tiny random models of every family that has a wiring, and random rotations of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    WhisperForConditionalGeneration,
)

from quantlib.transforms.binding import wire
from quantlib.transforms.hadamard import block_size
from quantlib.transforms.rotation import Rotation

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}
MOE = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WHISPER = {
    "vocab_size": 96,
    "num_mel_bins": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "d_model": 32,
    "max_source_positions": 12,
    "max_target_positions": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
QWEN2_VL = {
    "text_config": {
        **BASE,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    },
    "vision_config": {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "mlp_ratio": 2,
    },
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
QWEN2_5_VL = {
    **QWEN2_VL,
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
        "window_size": 16,
    },
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", BASE),
    "llama_tied": ("llama", {**BASE, **TIED}),
    "llama_biased": ("llama", {**BASE, "attention_bias": True, "mlp_bias": True}),
    "llama_one_head_each": ("llama", {**BASE, "num_key_value_heads": 4}),
    "mistral": ("mistral", BASE),
    "smollm3": ("smollm3", BASE),
    "qwen2": ("qwen2", BASE),
    "qwen2_tied": ("qwen2", {**BASE, **TIED}),
    "qwen3": ("qwen3", {**BASE, "head_dim": 16}),
    "phi3": ("phi3", BASE),
    "gemma": ("gemma", {**BASE, "head_dim": 16}),
    "gemma_tied": ("gemma", {**BASE, **TIED, "head_dim": 8}),
    "gemma2": ("gemma2", {**BASE, "head_dim": 8}),
    "gemma3_text": ("gemma3_text", {**BASE, **TIED, "head_dim": 8}),
    "gemma3": (
        "gemma3",
        {
            "text_config": {**BASE, "head_dim": 8},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 95,
        },
    ),
    "mixtral": ("mixtral", {**BASE, "num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {**BASE, **MOE}),
    "qwen3_moe_some_dense": ("qwen3_moe", {**BASE, **MOE, "mlp_only_layers": [0]}),
    "qwen2_vl": ("qwen2_vl", QWEN2_VL),
    "qwen2_vl_tied": ("qwen2_vl", {**QWEN2_VL, **TIED}),
    "qwen2_5_vl": ("qwen2_5_vl", QWEN2_5_VL),
    "whisper": ("whisper", WHISPER),
    "whisper_untied": ("whisper", {**WHISPER, "tie_word_embeddings": False}),
}
CLASSES = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "whisper": WhisperForConditionalGeneration,
}
FIXED_RESIDUAL = ("gemma2", "gemma3", "gemma3_text")
HIGH = 8
"""Hidden channels that Hadamard matrices leave alone."""
IDS = torch.tensor([[3, 17, 40, 5, 88, 61, 7, 7, 29, 54, 12, 70, 33, 2, 81, 9]])
GRID = torch.tensor([[1, 4, 4]])  # of an image of 16 patches, merged to 4 tokens


def make(case: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model of a case, every parameter random: gains around 1, biases of the size of what
    they are added to, so that whatever is not folded shows."""
    model_type, settings = CASES[case]
    config = CONFIG_MAPPING[model_type](**settings)
    kind = CLASSES.get(model_type)
    model = kind(config) if kind else AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.25, generator=generator)
            if "norm" in name and name.endswith("weight") and not model_type.startswith("gemma"):
                parameter.add_(1.0)
    return model.to(dtype).eval().requires_grad_(False)


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """What the model is run on: text; for Whisper sound too, for Qwen2-VL an image in the text."""
    model_type = model.config.model_type
    generator = torch.Generator().manual_seed(1)
    if model_type == "whisper":
        sound = torch.randn(1, WHISPER["num_mel_bins"], 24, generator=generator)
        return {"input_features": sound.to(model.dtype), "decoder_input_ids": IDS}
    if model_type in ("qwen2_vl", "qwen2_5_vl"):
        ids = IDS.clone()
        ids[0, 3], ids[0, 4:8], ids[0, 8] = 92, 90, 93
        pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        types = (ids == 90).int()
        return {
            "input_ids": ids,
            "pixel_values": pixels.to(model.dtype),
            "image_grid_thw": GRID,
            "mm_token_type_ids": types,
        }
    return {"input_ids": IDS}


def logits(model: PreTrainedModel) -> Tensor:
    """Logits [T, V] of the model on `inputs`."""
    with torch.no_grad():
        result: Tensor = model(**inputs(model), use_cache=False).logits[0]
    return result


def orthogonal(*shape: int, seed: int = 0) -> Tensor:
    """Random orthogonal matrices [..., d, d], float64."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64))
    return basis


def random_rotation(model: PreTrainedModel, *parts: str) -> Rotation:
    """Random bases of these parts: "residual" (of all streams), "value", "key", "hidden", "order",
    "norms". "hidden" is Hadamard matrices along all columns, with "order" along the first ones.

    Residual bases that the family cannot have are left out.
    """
    wiring = wire(model)
    streams = {
        stream.name: orthogonal(stream.width, stream.width, seed=len(stream.name))
        for stream in wiring.streams
        if "residual" in parts and not stream.obstacle
    }
    value, key, hidden = {}, {}, {}
    for seed, attention in enumerate(wiring.attentions):
        shape = attention.kv_heads, attention.head_dim, attention.head_dim
        if "value" in parts:
            value[attention.name] = orthogonal(*shape, seed=seed)
        if "key" in parts:  # both forms: one basis for all heads, one for each
            key[attention.name] = orthogonal(*shape[seed % 2 :], seed=100 + seed)
    order, high = {}, {}
    if "order" in parts:
        draw = torch.Generator().manual_seed(3)
        order = {h.name: torch.randperm(h.width, generator=draw) for h in wiring.hiddens}
        high = dict.fromkeys(order, HIGH)
    if "hidden" in parts:
        hidden = {h.name: block_size(h.width - high.get(h.name, 0)) for h in wiring.hiddens}
    return Rotation(
        residual=streams.get("decoder"),
        value=value,
        key=key,
        hidden=hidden,
        encoder=streams.get("encoder"),
        fold_norms="norms" in parts,
        hidden_order=order,
        hidden_high=high,
    )
