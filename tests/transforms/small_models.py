"""A tiny random Llama with grouped heads, in memory and on disk, and its wiring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.transforms.binding import wire
from quantlib.transforms.wiring import Wiring

WIDTH, HEADS, KV_HEADS, HEAD_DIM, BLOCKS = 32, 4, 2, 16, 2
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


@dataclass
class Small:
    """The model whole and in memory; its source, map and wiring."""

    model: PreTrainedModel
    source: Source
    model_map: ModelMap
    wiring: Wiring


def small_llama(folder: Path) -> Small:
    """Every parameter random, the norms' gains among them."""
    config = CONFIG_MAPPING["llama"](**SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(folder)
    source = Source.open(folder)
    return Small(model, source, ModelMap.from_source(source), wire(model))


def small_mixtral(folder: Path) -> Small:
    """As `small_llama`, with 4 experts of which 2 see a token."""
    shape = {**SHAPE, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = CONFIG_MAPPING["mixtral"](**shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    source = Source.open(folder)
    return Small(model, source, ModelMap.from_source(source), wire(model))
