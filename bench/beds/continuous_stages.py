"""The stages in which the `unified-continuous` model is trained: image encoder with decoder, then
all the rest on their vectors.

It starts from the trained `unified` model (`continuous_model.start_from`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.bench.beds import continuous_model as continuous
from quantlib.bench.beds import unified_model as unified
from quantlib.bench.beds.scenes import Handwriting, draw, handwriting, normalised
from quantlib.bench.beds.training import Schedule, Stage, initialise
from quantlib.bench.beds.unified_stages import DROPOUT, WORDS_WEIGHT, shorter

DRAWING = Schedule(steps=800, rate=1.5e-3, warmup=100, decay=0.02)
DRAWING_BATCH = 32
JOINT = Schedule(steps=1000, rate=6e-4, warmup=100, decay=0.05)
READ, WRITTEN = 16, 48
"""Scenes of a joint step that are asked about, and that are asked for: reading is known already."""


def train(training: Path, janus: Any, digits: Path, seed: int, steps_divided_by: int = 1) -> Any:
    """Run both stages, or go on with them, and return the model.

    training: folder of the stages' files. janus: a trained `unified` model. digits: the file of
    `scenes.fetch_digits`. steps_divided_by: a short run, to see that everything works.
    """
    source = handwriting(digits, "train")
    model = continuous.build()
    initialise(model, torch.Generator().manual_seed(seed))
    continuous.start_from(model, janus)
    train_drawing(model, source, training, seed, shorter(DRAWING, steps_divided_by))
    train_jointly(model, source, training, seed, shorter(JOINT, steps_divided_by))
    return model


def train_drawing(
    model: Any, source: Handwriting, training: Path, seed: int, schedule: Schedule
) -> None:
    """Image encoder and decoder: vectors that pictures can be drawn from."""
    both = nn.ModuleDict(
        {"encoder": model.model.image_encoder, "decoder": model.model.image_decoder}
    )

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        scenes = draw(source, DRAWING_BATCH, generator, vary=True)
        return {"mse": continuous.drawing_loss(model, normalised(scenes.pixels), generator)}

    Stage(training / "drawing.safetensors", both, schedule, seed).run(loss)


def train_jointly(
    model: Any, source: Handwriting, training: Path, seed: int, schedule: Schedule
) -> None:
    """Captions, questions and vectors together; image encoder and decoder are frozen."""
    frozen = nn.ModuleList([model.model.image_encoder, model.model.image_decoder])
    frozen.requires_grad_(False)

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        seen = draw(source, READ, generator, vary=True)
        batch = unified.questions_batch(seen, generator)
        answer = unified.answer_loss(model, normalised(seen.pixels), batch)
        asked = draw(source, WRITTEN, generator, vary=True)
        dropped = torch.rand(WRITTEN, generator=generator) < DROPOUT
        with torch.no_grad():
            vectors = model.encode_image(normalised(asked.pixels)).float()
        ids = unified.prompts(asked, dropped)
        image, words = continuous.vector_losses(model, ids, vectors, dropped, generator)
        return {"answer": answer, "vectors": image, "words": WORDS_WEIGHT * words}

    Stage(training / "joint.safetensors", model, schedule, seed).run(loss)
    frozen.requires_grad_(True)
