"""Folders of tiny random models with tokenizer and processors: all that a user's folder has."""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    JanusImageProcessorPil,
    JanusProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
)

from quantlib.checkpoint.writer import source_files, write_checkpoint
from quantlib.formats import Scheme, pack, quantize_rtn
from quantlib.models.skeleton import model_class

from ..models import stacked_models

WORDS = (
    *(
        "<pad>",
        "<bos>",
        "<eos>",
        "<start>",
        "<begin>",
        "<end>",
        "<unk>",
        "a",
        "on",
        "what",
        "digit",
    ),
    *("color", "?", "red", "blue", "black", "one", "two", "three", "yes", "picture", "here", "is"),
)
VOCABULARY = 96
RATE = 16_000
SCALING = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words apart by spaces; <bos> in front; the picture's token is the last of the vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    spare = (f"<spare_{n}>" for n in range(VOCABULARY - len(WORDS) - 1))
    ids = {word: n for n, word in enumerate((*WORDS, *spare, "<image>"))}
    made = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<begin>",
            "eoi_token": "<end>",
        },
    )


def generation(model: Any, **settings: Any) -> None:
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings
    )


def janus(folder: Path, model: Any = None) -> Path:
    """Pictures of 8 x 8 pixels, 16 codes."""
    model = model or stacked_models.build("janus")
    generation(model, generation_kwargs={"boi_token_id": WORDS.index("<begin>")})
    model.save_pretrained(folder)
    pictures = JanusImageProcessorPil(size={"height": 8, "width": 8}, min_size=1, **SCALING)
    JanusProcessor(pictures, tokenizer(), num_image_tokens=16).save_pretrained(folder)
    return folder


def pisces(folder: Path, model: Any = None) -> Path:
    """Pictures of 16 x 16 pixels, four vectors."""
    if model is None:
        model = random_pisces()
    generation(
        model, guidance_scale=2.0, generation_kwargs={"boi_token_id": WORDS.index("<begin>")}
    )
    model.save_pretrained(folder)
    pictures = JanusImageProcessorPil(size={"height": 16, "width": 16}, min_size=1, **SCALING)
    JanusProcessor(pictures, tokenizer(), num_image_tokens=16).save_pretrained(folder)
    return folder


def random_pisces() -> Any:
    """The continuous form, with random weights."""
    from transformers import JanusVisionConfig, LlamaConfig

    from quantlib.models.pisces import PiscesConfig, PiscesForConditionalGeneration

    def tower() -> JanusVisionConfig:
        return JanusVisionConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            mlp_ratio=2.0,
            projection_dim=32,
            num_image_tokens=16,
        )

    config = PiscesConfig(
        text_config=LlamaConfig(**stacked_models.TEXT),
        vision_config=tower(),
        image_encoder_config=tower(),
        decoder_config=tower(),
        pooling=2,
        vector_size=8,
        image_token_id=stacked_models.IMAGE,
        begin_image_token_id=WORDS.index("<begin>"),
    )
    model = PiscesForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model


def llava(folder: Path, model: Any = None) -> Path:
    """Pictures of 28 x 28 pixels, 4 vectors."""
    model = model or stacked_models.build("llava")
    generation(model)
    model.save_pretrained(folder)
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **SCALING
    )
    LlavaProcessor(
        pictures,
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def whisper(folder: Path, model: Any = None) -> Path:
    """Sounds of one second, 32 frames of 8 bins."""
    model = model or stacked_models.build("whisper")
    generation(model, decoder_start_token_id=3, max_length=24)
    model.save_pretrained(folder)
    ears = WhisperFeatureExtractor(feature_size=8, hop_length=500, chunk_length=1, n_fft=400)
    ears.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def picture(path: Path, seed: int, side: int = 10) -> Path:
    """A file of random pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def sound(path: Path, seed: int, seconds: float = 0.5, rate: int = RATE) -> Path:
    """A WAV file of noise."""
    values = np.random.default_rng(seed).integers(-8000, 8000, int(rate * seconds))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.astype("<i2").tobytes())
    return path


def records(folder: Path, kinds: Sequence[str], count: int = 3) -> Path:
    """A file of `count` records of each kind, with their media."""
    folder.mkdir(parents=True, exist_ok=True)
    digits, colors = ("one", "two", "three"), ("red", "blue")
    rows: list[dict[str, str]] = []
    for n in range(count):
        digit, color = digits[n % 3], colors[n % 2]
        caption = f"a {color} {digit} on a black picture"
        if {"question", "generation"} & set(kinds):
            picture(folder / f"{n}.png", n)
        if "text" in kinds:
            rows.append({"text": caption})
        if "question" in kinds:
            rows.append({"image": f"{n}.png", "question": "what digit ?", "answer": digit})
        if "generation" in kinds:
            rows.append({"prompt": caption, "target": f"{n}.png"})
        if "speech" in kinds:
            sound(folder / f"{n}.wav", n)
            rows.append({"audio": f"{n}.wav", "answer": f"here is {digit}"})
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@torch.no_grad()
def disturbed(model: Any, amount: float = 0.02) -> Any:
    """The same model with noise on all its parameters: a stand-in for a quantized one."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += amount * noise * parameter.std().nan_to_num(1.0)
    return model


def packed(source: Path, out: Path, scheme: str = "w4g16") -> Path:
    """A packed checkpoint of a folder: every linear rounded to `scheme`, all else as it is."""
    config = json.loads((source / "config.json").read_text())
    model = model_class(config["model_type"]).from_pretrained(source, dtype=torch.float32)
    parsed, shapes, tensors = Scheme.parse(scheme), {}, {}
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.in_features % 16 == 0
    }
    head = "lm_head.weight"  # tied to the embedding, or named otherwise: it stays
    for name, weight in model.named_parameters():
        if name not in linears - {head, "proj_out.weight"}:
            tensors[name] = weight.detach()
            continue
        shapes[name] = tuple(weight.shape)
        rounded = quantize_rtn(weight.detach(), parsed.segments(weight.shape[1]))
        tensors |= {name + suffix: tensor for suffix, tensor in pack(rounded).items()}
    schemes = dict.fromkeys(shapes, scheme)
    write_checkpoint(out, tensors, config, schemes, shapes, files=source_files(source))
    return out


@torch.no_grad()
def restless(model: Any) -> Any:
    """A Janus whose next code depends on the last: a random one says the same again and again."""
    generator = torch.Generator().manual_seed(11)
    for name in ("generation_embeddings", "generation_head.vision_head"):
        weight = model.model.get_submodule(name).weight
        weight.copy_(3 * torch.randn(weight.shape, generator=generator))
    return model
