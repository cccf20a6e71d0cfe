"""A Llama that reads and writes sound as tokens (Ichigo's form): a language model with a large
vocabulary, calibrated on plain text in which sounds are spelled out."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import quantlib
from quantlib.pipeline.compress import Result, compress

SOUNDS, WORDS = 512, 30
VOCABULARY = {
    "<eos>": 0,
    "<|sound_start|>": 1,
    "<|sound_end|>": 2,
    **{f"w{n}": 3 + n for n in range(WORDS)},
    **{f"<|sound_{n:04d}|>": 3 + WORDS + n for n in range(SOUNDS)},
}
PROMPT = "<|sound_start|> <|sound_0007|> <|sound_0300|> <|sound_end|> w1 w2"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The model, compressed to half of its bytes."""
    root = tmp_path_factory.mktemp("sounds")
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(root / "m")
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(root / "m")
    sounds = torch.randint(0, SOUNDS, (60, 12), generator=generator).tolist()
    lines = [
        f"<|sound_start|> {' '.join(f'<|sound_{n:04d}|>' for n in row)} <|sound_end|> "
        f"w{row[0] % WORDS} w{row[1] % WORDS} <eos>"
        for row in sounds
    ]
    (root / "text.txt").write_text("\n".join(lines))
    return compress(
        root / "m",
        out=root / "out",
        data=root / "text.txt",
        size="50%",
        schemes=["w4g32", "w8g32"],
        seqlen=32,
        windows=6,
        probes=0,
        passes=0,
        report=False,
    )


def test_embedding_and_head_of_all_sounds_are_packed(result: Result) -> None:
    """They are most of the model, and nothing but norms stays as it is."""
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(result.plan.schemes)
    kept = quantlib.load(result.path, engine="plain").checkpoint.kept_names
    assert kept
    assert all("norm" in name for name in kept)
    assert result.file_bytes <= 0.5 * result.source_bytes


def test_it_goes_on_in_sounds_and_words_alike_on_both_engines(result: Result) -> None:
    native = quantlib.load(result.path, "exact", engine="native", kv="f32")
    plain = quantlib.load(result.path, "exact", engine="plain")
    texts = [model.generation([PROMPT], 12, chat=False).finish()[0] for model in (native, plain)]
    assert native.engine == "native"
    assert texts[0] == texts[1] != ""
    assert any(f"<|sound_{n:04d}|>" in texts[0] for n in range(SOUNDS))
