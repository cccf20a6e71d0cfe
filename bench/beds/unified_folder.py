"""The folder of a unified bed: model, judge, and records with their pictures.

model/                 transformers' files, float16
judge.safetensors
calibration.jsonl      scenes of the handwriting that the model was trained on
test.jsonl             one scene of each of the 500 digits that nobody saw
calibration/, test/    pictures
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from quantlib.bench.beds import unified_model as unified
from quantlib.bench.beds.scenes import SIDE, Handwriting, Scenes, draw, handwriting
from quantlib.bench.beds.unified_gates import test_scenes

CALIBRATION = 256
"""Scenes to calibrate on."""


def write_folder(weights: Path, digits: Path, target: Path) -> None:
    """Write the bed into the new folder `target`.

    weights: a folder with `model/` and `judge.safetensors`. digits: see `scenes.fetch_digits`.
    """
    shutil.copytree(weights / "model", target / "model")
    shutil.copyfile(weights / "judge.safetensors", target / "judge.safetensors")
    scenes = calibration_scenes(handwriting(digits, "train"))
    write_records(target, "calibration", scenes, one_question)
    scenes = test_scenes(handwriting(digits, "test"))
    write_records(target, "test", scenes, caption_and_question)


def calibration_scenes(train: Handwriting) -> Scenes:
    """Scenes of the training fold as they are, always the same."""
    return draw(train, CALIBRATION, torch.Generator().manual_seed(2), vary=False)


def write_records(
    folder: Path, name: str, scenes: Scenes, questions: Callable[[int], Sequence[str]]
) -> None:
    """Write pictures and `NAME.jsonl`: of every scene, by its index, these questions; of every
    second one the caption as text and as a prompt for the picture. In an order that is drawn, so
    that the first so many are a fair choice."""
    rows: list[dict[str, str]] = []
    (folder / name).mkdir()
    for index, right in enumerate(unified.answers(scenes)):
        picture = f"{name}/{index:03}.png"
        save_picture(folder / picture, scenes.pixels[index])
        rows += [{"image": picture, "question": q, "answer": right[q]} for q in questions(index)]
        if index % 2 == 0:
            sentence = right[unified.DESCRIBE]
            rows += [{"prompt": sentence, "target": picture}, {"text": sentence}]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    lines = [json.dumps(rows[index]) + "\n" for index in order]
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def one_question(index: int) -> Sequence[str]:
    """Of a calibration scene: a caption, or one thing, in turn."""
    asked = (unified.DESCRIBE, *unified.QUESTIONS)
    return (asked[index % len(asked)],)


def caption_and_question(index: int) -> Sequence[str]:
    """Of a test scene: a caption, and one thing in turn."""
    return unified.DESCRIBE, unified.QUESTIONS[index % len(unified.QUESTIONS)]


def save_processor(folder: Path) -> None:
    """Write tokenizer and image processor files: words apart by spaces, pictures in -1..1."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import JanusImageProcessorPil, JanusProcessor, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(unified.IDS, unk_token=unified.UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(
        single=f"{unified.BOS} $A",
        pair=f"{unified.BOS} $A $B",
        special_tokens=[(unified.BOS, unified.IDS[unified.BOS])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=unified.BOS,
        eos_token=unified.EOS,
        pad_token=unified.PAD,
        unk_token=unified.UNKNOWN,
        padding_side="left",
        model_max_length=256,
        extra_special_tokens={
            "image_token": unified.IMAGE,
            "boi_token": unified.BEGIN,
            "eoi_token": unified.END,
        },
    )
    pictures = JanusImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    JanusProcessor(pictures, tokenizer, num_image_tokens=unified.TOKENS).save_pretrained(folder)


def save_picture(path: Path, pixels: torch.Tensor) -> None:
    """Write a picture [3, rows, columns] in 0..1 as PNG."""
    image = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous()
    Image.fromarray(image.numpy()).save(path)
