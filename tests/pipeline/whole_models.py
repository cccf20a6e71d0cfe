"""Tiny random models of several parts with tokenizers and processors, and records for them."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..models import stacked_models
from ..models.stacked_models import IMAGE

SPECIAL = {
    "<pad>": 0,
    "<bos>": 1,
    "<eos>": 2,
    "<image>": IMAGE,
    "<boi>": 94,
    "<audio>": 86,
    "<eoi>": 93,
    "<unk>": 92,
    "<fake_token_around_image>": 91,
    "<|extra_200|>": 90,
    "<eof>": 89,
    "<global-img>": 88,
    "<end_of_utterance>": 87,
}
WORDS = 40
"""Words w0, w1, ... of the vocabulary, behind the first special tokens."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Words apart by spaces, with a beginning."""
    vocabulary = {**SPECIAL, **{f"w{n}": 3 + n for n in range(WORDS)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        sep_token="<eos>",
        extra_special_tokens={
            "image_token": "<image>",
            "audio_token": "<audio>",
            "boi_token": "<boi>",
            "eoi_token": "<eoi>",
            "eof_token": "<eof>",
            "image_wrapper_token": "<fake_token_around_image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
        },
    )


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


PLAIN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def _janus(words: Any) -> Any:
    pixels = transformers.JanusImageProcessorPil(size=_square(8), min_size=1, **PLAIN)
    return transformers.JanusProcessor(pixels, words, num_image_tokens=16)


def _llava(words: Any) -> Any:
    pixels = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=_square(28), **PLAIN
    )
    return transformers.LlavaProcessor(pixels, words, 14, "default", num_additional_image_tokens=1)


def _llava_siglip(words: Any) -> Any:
    pixels = transformers.SiglipImageProcessorPil(size=_square(28), **PLAIN)
    return transformers.LlavaProcessor(pixels, words, 14, "full")


def _idefics(words: Any) -> Any:
    pixels = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False
    )
    return transformers.Idefics3Processor(pixels, words, image_seq_len=1)


def _gemma(words: Any) -> Any:
    pixels = transformers.Gemma3ImageProcessorPil(size=_square(28), do_pan_and_scan=False, **PLAIN)
    return transformers.Gemma3Processor(pixels, words, image_seq_length=4)


def _qwen(_: Any) -> Any:
    return transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 256}
    )


def _chameleon(words: Any) -> Any:
    pixels = transformers.ChameleonImageProcessorPil(
        size={"shortest_edge": 8}, crop_size=_square(8), **PLAIN
    )
    return transformers.ChameleonProcessor(pixels, words, image_seq_length=16)


def _emu3(words: Any) -> Any:
    pixels = transformers.Emu3ImageProcessor(min_pixels=256, max_pixels=256)
    return transformers.Emu3Processor(pixels, words)


def _whisper(words: Any) -> Any:
    sounds = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=500)
    return sounds


class _OmniFiles:
    """Qwen2.5-Omni's image processor and feature extractor, published as one file; its processor
    itself cannot be made without torchvision."""

    def save_pretrained(self, folder: Path) -> None:
        settings = _whisper(None).to_dict() | _qwen(None).to_dict()
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def _omni(_: Any) -> Any:
    return _OmniFiles()


def _siglip(_: Any) -> Any:
    return transformers.SiglipImageProcessorPil(size=_square(28), **PLAIN)


def _pixels(_: Any) -> Any:
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=_square(28), **PLAIN
    )


PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "janus": _janus,
    "janus_mixture": _janus,
    "llava": _llava,
    "llava_dinov2": _llava,
    "llava_siglip": _llava_siglip,
    "idefics3": _idefics,
    "gemma3": _gemma,
    "qwen2_5_vl": _qwen,
    "chameleon": _chameleon,
    "emu3": _emu3,
    "whisper": _whisper,
    "qwen2_5_omni": _omni,
    "dinov2": _pixels,
    "clip": _pixels,
    "clip_vision": _pixels,
    "siglip": _siglip,
    "siglip_vision": _siglip,
    "smolvlm": _idefics,
}
GENERATION = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "guidance_scale": 2.0}


def build(case: str) -> PreTrainedModel:
    """As `stacked_models.build`; Emu3 with the sizes that its processor expects, and codes of both
    one-vocabulary models under names that their models understand."""
    if case not in ("emu3", "chameleon", "qwen2_5_omni"):
        return stacked_models.build(case)
    architecture, config, settings = stacked_models.MODELS[case]
    if case == "qwen2_5_omni":
        return _random(architecture, config, {**settings, **_speaking(settings)})
    words = {**settings["vocabulary_map"], "<|extra_200|>": SPECIAL["<|extra_200|>"]}
    if case == "emu3":
        vq = {"channel_multiplier": [1, 1, 1, 2], "attn_resolutions": [3]}
        settings = {**settings, "vq_config": {**settings["vq_config"], **vq}}
    else:  # letters are digits
        words = {"<image>": IMAGE, **{f"IMGIMG{_letters(code)}Z": 50 + code for code in range(20)}}
    return _random(architecture, config, {**settings, "vocabulary_map": words})


def _speaking(settings: dict[str, Any]) -> dict[str, Any]:
    """Tokens of Qwen2.5-Omni's talker that are in the small vocabulary."""
    placeholders = {
        "audio_token_index": SPECIAL["<audio>"],
        "image_token_index": IMAGE,
        "video_token_index": 92,
        "vision_start_token_id": SPECIAL["<boi>"],
        "vision_end_token_id": SPECIAL["<eoi>"],
        "audio_start_token_id": 84,
        "audio_end_token_id": 85,
    }
    text = {f"tts_text_{name}_token_id": 60 + n for n, name in enumerate(("start", "end", "pad"))}
    codec = ("start", "end", "pad", "mask")
    codes = {f"tts_codec_{name}_token_id": 70 + n for n, name in enumerate(codec)}
    sound = settings["token2wav_config"]
    # what pools a voice reads the outputs of the three blocks in the middle at once
    dit = {**sound["dit_config"], "enc_channels": [16, 16, 16, 16, 48], "num_embeds": 96}
    return {
        "token2wav_config": {**sound, "dit_config": dit},
        "thinker_config": {**settings["thinker_config"], **placeholders},
        "talker_config": {**settings["talker_config"], **placeholders, **text, **codes},
    }


def write_voice(folder: Path, size: int = 12, bins: int = 8) -> Path:
    """A voice for the small Qwen2.5-Omni, as `calibration.paths.voices` reads it."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "w.cond": torch.randn(1, size, generator=generator),
        "w.ref_mel": torch.randn(1, 9, bins, generator=generator),
        "w.bos_token": torch.tensor(63),
    }
    file = folder / "voices" / "speakers.safetensors"
    file.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, file)
    return file


def _random(architecture: str, config: str, settings: dict[str, Any]) -> PreTrainedModel:
    parsed = getattr(transformers, config)(**settings)
    model: PreTrainedModel = getattr(transformers, architecture)(parsed).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model


def _letters(number: int) -> str:
    return "".join(chr(ord("A") + int(digit)) for digit in str(number))


def save(case: str, folder: Path) -> Path:
    """The folder of a model: weights, tokenizer, processor, generation config."""
    model = build(case)
    if case.startswith("janus"):
        begin = {"generation_kwargs": {"boi_token_id": SPECIAL["<boi>"]}}
        model.generation_config = transformers.GenerationConfig(**GENERATION, **begin)
    model.save_pretrained(folder)
    words = tokenizer()
    if case in PROCESSORS:
        PROCESSORS[case](words).save_pretrained(folder)
    if case == "qwen2_5_omni":
        write_voice(folder)
    words.save_pretrained(folder)
    return folder


def write_picture(path: Path, seed: int, side: int = 28) -> Path:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def write_sound(path: Path, seed: int, samples: int = 12000, rate: int = 16000) -> Path:
    values = np.random.default_rng(seed).normal(0, 3000, samples).astype("<i2")
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(values.tobytes())
    return path


def words(seed: int, count: int = 6) -> str:
    drawn = np.random.default_rng(seed).integers(0, WORDS, count)
    return " ".join(f"w{n}" for n in drawn)


KINDS = {
    "qwen2_5_omni": ("text", "question", "speech"),
    "whisper": ("speech",),
    "bert": ("text",),
    "dinov2": ("picture",),
    "clip": ("pair",),
    "siglip": ("pair",),
    "clip_vision": ("picture",),
    "siglip_vision": ("picture",),
    "janus": ("text", "question", "generation"),
    "janus_mixture": ("text", "question", "generation"),
    "emu3": ("text", "question", "generation"),
}
"""Kinds of records of a model; those of the others are of text and questions."""


def records(case: str, folder: Path, count: int = 6, kinds: tuple[str, ...] | None = None) -> Path:
    """A file of records with `count` of every kind that the model reads."""
    rows: list[dict[str, str]] = []
    for kind in kinds or KINDS.get(case, ("text", "question")):
        for n in range(count):
            picture = write_picture(folder / f"{n}.png", n).name
            if kind == "text":
                rows.append({"text": words(n, 12)})
            elif kind == "question":
                rows.append({"image": picture, "question": words(n, 3), "answer": words(n + 50, 3)})
            elif kind == "generation":
                rows.append({"prompt": words(n, 4), "target": picture})
            elif kind == "speech":
                sound = write_sound(folder / f"{n}.wav", n).name
                rows.append({"audio": sound, "answer": words(n, 5)})
            elif kind == "pair":
                rows.append({"image": picture, "text": words(n, 5)})
            else:
                rows.append({"image": picture})
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
