"""Tiny random models of several stacks, of the real transformers classes, saved by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

TEXT: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {**TEXT, "model_type": "mixtral", "num_local_experts": 4}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT_TOWER = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
VQ = {
    "embed_dim": 8,
    "num_embeddings": 20,
    "latent_channels": 32,
    "base_channels": 32,
    "num_res_blocks": 1,
}
IMAGE = 95
"""The token that an image's vectors replace."""
IMAGE_WORDS = {f"IMGIMG{chr(65 + code)}Z": 50 + code for code in range(20)}
VISUAL_TOKENS = {f"<|visual token {code:06d}|>": 50 + code for code in range(20)}


def _janus(text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text_config": dict(text),
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 2,
            "projection_dim": 32,
            "mlp_ratio": 2.0,
            "depth": 2,
            "num_image_tokens": 16,
        },
        "vq_config": {
            **VQ,
            "double_latent": False,
            "in_channels": 3,
            "channel_multiplier": [1, 1],
            "projection_dim": 32,
            "num_patches": 4,
            "image_token_embed_dim": 32,
            "num_hidden_layers": 2,
        },
        "image_token_id": IMAGE,
    }


def _omni() -> dict[str, Any]:
    text = {key: value for key, value in TEXT.items() if key != "model_type"}
    text["rope_parameters"] = MROPE
    return {
        "thinker_config": {
            "text_config": text,
            "vision_config": QWEN_VISION,
            "audio_config": {
                "d_model": 16,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "num_mel_bins": 8,
                "max_source_positions": 32,
                "n_window": 4,
                "output_dim": 32,
            },
            "audio_token_index": 94,
            "image_token_index": IMAGE,
            "video_token_index": 93,
        },
        "talker_config": {**text, "hidden_size": 24, "head_dim": 8, "embedding_size": 32},
        "token2wav_config": {
            "dit_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "head_dim": 16,
                "ff_mult": 2,
                "emb_dim": 16,
                "num_embeds": 20,
                "mel_dim": 8,
                "enc_emb_dim": 12,
                "enc_dim": 8,
                "enc_channels": [16, 16, 16, 16, 24],
                "enc_kernel_sizes": [5, 3, 3, 3, 1],
                "enc_dilations": [1, 2, 3, 4, 1],
                "enc_attention_channels": 8,
                "enc_res2net_scale": 2,
                "enc_se_channels": 8,
            },
            "bigvgan_config": {
                "mel_dim": 8,
                "upsample_initial_channel": 32,
                "resblock_kernel_sizes": [3, 7],
                "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
                "upsample_rates": [2, 2],
                "upsample_kernel_sizes": [4, 4],
            },
        },
    }


def _llava(tower: str) -> dict[str, Any]:
    """SigLIP has no class token that the connector would have to leave out."""
    return {
        "vision_feature_select_strategy": "full" if "siglip" in tower else "default",
        "vision_config": {"model_type": tower, **TOWER},
        "text_config": TEXT,
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    }


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "model_type"}


SPEECH = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
BY_PARTS = {"vision_config": TOWER, "text_config": TEXT, "scale_factor": 2, "image_token_id": IMAGE}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SPEECH),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", _llava("clip_vision_model")),
    "llava_dinov2": ("LlavaForConditionalGeneration", "LlavaConfig", _llava("dinov2")),
    "llava_siglip": ("LlavaForConditionalGeneration", "LlavaConfig", _llava("siglip_vision_model")),
    "janus": ("JanusForConditionalGeneration", "JanusConfig", _janus(TEXT)),
    "janus_mixture": ("JanusForConditionalGeneration", "JanusConfig", _janus(MIXTURE)),
    "chameleon": (
        "ChameleonForConditionalGeneration",
        "ChameleonConfig",
        {
            **_flat(TEXT),
            "vq_config": {**VQ, "resolution": 8, "channel_multiplier": [1, 2]}
            | {"attn_resolutions": [4]},
            "vocabulary_map": {"<image>": IMAGE, **IMAGE_WORDS},
        },
    ),
    "emu3": (
        "Emu3ForConditionalGeneration",
        "Emu3Config",
        {
            "text_config": _flat(TEXT),
            "vq_config": {
                "codebook_size": 20,
                "embed_dim": 4,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [1],
                "hidden_size": 64,
                "num_attention_heads": 1,
                "temporal_downsample_factor": 4,
            },
            "vocabulary_map": {"<image>": IMAGE, **VISUAL_TOKENS},
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_flat(TEXT), "rope_parameters": MROPE},
            "vision_config": QWEN_VISION,
            "image_token_id": IMAGE,
            "video_token_id": 94,
        },
    ),
    "qwen2_5_omni": ("Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniConfig", _omni()),
    "idefics3": ("Idefics3ForConditionalGeneration", "Idefics3Config", BY_PARTS),
    "smolvlm": ("SmolVLMForConditionalGeneration", "SmolVLMConfig", BY_PARTS),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**_flat(TEXT), "head_dim": 8},
            "vision_config": TOWER,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
        },
    ),
    "clip": ("CLIPModel", "CLIPConfig", {"vision_config": TOWER, "text_config": TEXT_TOWER}),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"vision_config": TOWER, "text_config": {**TEXT_TOWER, "projection_size": 16}},
    ),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", TOWER),
    "siglip_vision": ("SiglipVisionModel", "SiglipVisionConfig", TOWER),
    "dinov2": ("Dinov2Model", "Dinov2Config", TOWER),
    "bert": ("BertModel", "BertConfig", _flat(TEXT)),
}


def build(case: str) -> PreTrainedModel:
    """The model in float32 and eval mode, every parameter random, norms and biases too."""
    architecture, config, settings = MODELS[case]
    parsed = getattr(transformers, config)(**settings)
    model: PreTrainedModel = getattr(transformers, architecture)(parsed).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """As `save_pretrained` writes it: for many of these under other names than the module's."""
    model.save_pretrained(folder)
    return folder
