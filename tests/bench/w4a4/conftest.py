"""Small random models with data: one Llama, one Whisper; each made once."""

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from quantlib.bench.w4a4.subjects import Language, Speech


def filled(model: Any, seed: int = 0) -> Any:
    """Every parameter random, gains and biases of norms among them, in float32."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.15, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


@pytest.fixture(scope="session")
def language() -> Language:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    ids = torch.randint(0, 96, (6, 32), generator=torch.Generator().manual_seed(0))
    return Language("small", filled(LlamaForCausalLM(config)), ids[:4], ids[4:])


class Letters:
    """A tokenizer of letters, with Whisper's marks."""

    def convert_tokens_to_ids(self, mark: str) -> int:
        return ("<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>").index(mark) + 1

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(chr(ord("a") + index % 26) for index in ids if index > 3)


@pytest.fixture(scope="session")
def whisper() -> Speech:
    from transformers import WhisperFeatureExtractor

    config = WhisperConfig(
        vocab_size=48,
        num_mel_bins=8,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_source_positions=50,
        max_target_positions=128,
        pad_token_id=0,
    )
    model = filled(WhisperForConditionalGeneration(config))
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    generator = torch.Generator().manual_seed(1)
    clips = [torch.randn(16000, generator=generator) for _ in range(4)]
    said = [(clip, "a b c") for clip in clips[2:]]
    return Speech("small whisper", model, Letters(), extractor, clips[:2], said)
