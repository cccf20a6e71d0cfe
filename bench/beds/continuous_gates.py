"""What has to hold of the `unified-continuous` model before any claim is made with it: the gates of
`unified`, with vectors in place of codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib.bench.beds import continuous_model as continuous
from quantlib.bench.beds import unified_gates
from quantlib.bench.beds import unified_model as unified
from quantlib.bench.beds.scenes import SIDE, Handwriting, Scenes, normalised
from quantlib.bench.beds.unified_gates import Share
from quantlib.evaluation.judge import Judge

AT_ONCE = 80


@torch.no_grad()
def measure(model: Any, judge: Judge, test: Handwriting) -> dict[str, Share]:
    """Every figure of the model by name (`unified_gates.LIMITS` says which are gates)."""
    scenes = unified_gates.test_scenes(test)
    asked = unified_gates.all_scenes(unified_gates.REPEATS)
    whole = {
        "real": unified_gates.judged(judge, scenes.pixels, scenes),
        "reconstruction": unified_gates.judged(judge, reconstructed(model, scenes), scenes),
        "caption": unified_gates.described(model, scenes),
        "answer": unified_gates.answered(model, scenes),
        "generation": unified_gates.judged(judge, drawn_pictures(model, asked), asked),
    }
    return {
        f"{name}_{part}": share for name, parts in whole.items() for part, share in parts.items()
    }


def reconstructed(model: Any, scenes: Scenes) -> Tensor:
    """The scenes' pictures as vectors and back, in 0..1."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        decoded(model, model.encode_image(pixels), generator)
        for pixels in normalised(scenes.pixels).split(AT_ONCE)
    ]
    return torch.cat(parts)


def drawn_pictures(model: Any, asked: Scenes, guidance: float = continuous.GUIDANCE) -> Tensor:
    """Pictures [n, 3, SIDE, SIDE] in 0..1 of the captions of `asked`."""
    generator, count = torch.Generator().manual_seed(0), len(asked)
    with_words = unified.prompts(asked, torch.zeros(count, dtype=torch.bool))
    without = unified.prompts(asked, torch.ones(count, dtype=torch.bool))
    parts = [
        decoded(model, model.generate_vectors(ids, wordless, guidance), generator)
        for ids, wordless in zip(with_words.split(AT_ONCE), without.split(AT_ONCE))
    ]
    return torch.cat(parts)


def decoded(model: Any, vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures in 0..1 of vectors."""
    noise = torch.randn(len(vectors), 3, SIDE, SIDE, generator=generator)
    pixels: Tensor = model.decode_vectors(vectors, noise)
    return ((pixels + 1) / 2).clamp(0, 1)
