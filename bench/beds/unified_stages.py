"""The four stages in which the `unified` model is trained: judge, VQ model, picture reader, and all
of it together.

The reader (the vision transformer that understands pictures) first learns to name what it sees, as
Janus takes a pretrained SigLIP: language model and reader from scratch together need many times the
steps until the first digit is told from another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.bench.beds import unified_model as unified
from quantlib.bench.beds.judge import SCHEDULE as JUDGE
from quantlib.bench.beds.judge import train_judge
from quantlib.bench.beds.scenes import (
    BACKGROUNDS,
    COLORS,
    DIGITS,
    Handwriting,
    draw,
    handwriting,
    normalised,
)
from quantlib.bench.beds.training import Schedule, Stage, initialise
from quantlib.bench.beds.vq import SCHEDULE as VQ
from quantlib.bench.beds.vq import train_vq

READER = Schedule(steps=1500, rate=1e-3, warmup=100, decay=0.05)
READER_BATCH = 64
JOINT = Schedule(steps=2200, rate=1e-3, warmup=200, decay=0.05)
JOINT_BATCH = 32
DROPOUT = 0.1
"""Share of prompts without words, for classifier-free guidance."""
WORDS_WEIGHT = 0.1


def train(folder: Path, digits: Path, seed: int, steps_divided_by: int = 1) -> Any:
    """Run all stages, or go on with them, and return the model.

    folder: gets the stages' files in `training/`, and `judge.safetensors`.
    digits: the file of `scenes.fetch_digits`.
    steps_divided_by: a short run that shows that everything works, for tests.
    """
    training, source = folder / "training", handwriting(digits, "train")
    train_judge(
        handwriting(digits, "judge"),
        training,
        folder / "judge.safetensors",
        seed,
        shorter(JUDGE, steps_divided_by),
    )
    model = unified.build()
    initialise(model, torch.Generator().manual_seed(seed))
    train_vq(
        model.model.vqmodel,
        lambda count, generator: normalised(draw(source, count, generator, vary=True).pixels),
        training / "vq.safetensors",
        seed,
        shorter(VQ, steps_divided_by),
    )
    reader = Reader(model.model.vision_model)
    initialise(reader.heads, torch.Generator().manual_seed(seed))
    train_reader(reader, source, training, seed, shorter(READER, steps_divided_by))
    train_jointly(model, source, training, seed, shorter(JOINT, steps_divided_by))
    return model


def shorter(schedule: Schedule, divisor: int) -> Schedule:
    """The schedule with a fraction of its steps."""
    warmup = schedule.warmup // divisor
    return Schedule(schedule.steps // divisor, schedule.rate, warmup, schedule.decay)


class Reader(nn.Module):
    """The vision model under heads that name digit, colour and background of pictures in -1..1."""

    def __init__(self, vision_model: Any) -> None:
        super().__init__()
        self.vision_model = vision_model
        width = vision_model.config.hidden_size
        self.heads = nn.ModuleList(
            nn.Linear(width, len(names)) for names in (DIGITS, COLORS, BACKGROUNDS)
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        states = self.vision_model(pixels).last_hidden_state.mean(1)
        return [head(states) for head in self.heads]


def train_reader(
    reader: Reader, source: Handwriting, training: Path, seed: int, schedule: Schedule
) -> None:
    """Teach the vision model to name what it sees."""

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        scenes = draw(source, READER_BATCH, generator, vary=True)
        named = reader(normalised(scenes.pixels))
        right = (scenes.digit, scenes.color, scenes.background)
        names = ("digit", "color", "background")
        weights = (1.0, 0.2, 0.2)
        return {
            name: weight * F.cross_entropy(logits.float(), labels)
            for name, weight, logits, labels in zip(names, weights, named, right)
        }

    Stage(training / "reader.safetensors", reader, schedule, seed).run(loss)


def train_jointly(
    model: Any, source: Handwriting, training: Path, seed: int, schedule: Schedule
) -> None:
    """Captions, questions and pictures together; the VQ model is frozen."""
    model.model.vqmodel.requires_grad_(False)
    start_from_codebook(model)

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        seen = draw(source, JOINT_BATCH, generator, vary=True)
        batch = unified.questions_batch(seen, generator)
        answer = unified.answer_loss(model, normalised(seen.pixels), batch)
        asked = draw(source, JOINT_BATCH, generator, vary=True)
        dropped = torch.rand(JOINT_BATCH, generator=generator) < DROPOUT
        image, words = unified.image_losses(
            model,
            unified.prompts(asked, dropped),
            unified.image_codes(model, normalised(asked.pixels)),
            dropped,
        )
        return {"answer": answer, "image": image, "words": WORDS_WEIGHT * words}

    Stage(training / "joint.safetensors", model, schedule, seed).run(loss)
    model.model.vqmodel.requires_grad_(True)


@torch.no_grad()
def start_from_codebook(model: Any) -> None:
    """Let codes enter the language model as what the VQ model makes of them: near codes then start
    as near inputs. The first linear behind is drawn wider, as codes have eight dimensions."""
    body = model.model
    body.generation_embeddings.weight.copy_(body.vqmodel.quantize.embedding.weight)
    body.generation_aligner.fc1.weight.mul_(10)
