"""What has to hold of the `unified` model before any claim is made with it.

Each gate is a share of test pictures or of drawn ones, with its standard error. Handwriting, places
and uniforms are the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlib.bench.beds import unified_model as unified
from quantlib.bench.beds.judge import read_right
from quantlib.bench.beds.scenes import (
    BACKGROUNDS,
    COLORS,
    DIGITS,
    Handwriting,
    Scenes,
    compose,
    normalised,
)
from quantlib.evaluation.judge import Judge

LIMITS = {
    "reconstruction_digit": 0.85,
    "reconstruction_color": 0.90,
    "caption_digit": 0.90,
    "generation_digit": 0.60,
    "generation_color": 0.90,
}
"""The gates; other figures are reported beside them."""
REPEATS = 4
"""Pictures drawn of each of the 80 captions."""


@dataclass(frozen=True)
class Share:
    """A share of `count` pictures."""

    value: float
    count: int

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.value * (1 - self.value) / self.count)


@torch.no_grad()
def measure(model: Any, judge: Judge, test: Handwriting) -> dict[str, Share]:
    """Every figure of the model by name."""
    scenes = test_scenes(test)
    whole = [
        ("real", judged(judge, scenes.pixels, scenes)),
        ("reconstruction", judged(judge, reconstructed(model, scenes), scenes)),
        ("caption", described(model, scenes)),
        ("answer", answered(model, scenes)),
    ]
    asked = all_scenes(REPEATS)
    drawn = drawn_pictures(model, asked, unified.GUIDANCE, torch.Generator().manual_seed(0))
    whole.append(("generation", judged(judge, drawn, asked)))
    return {f"{name}_{part}": share for name, parts in whole for part, share in parts.items()}


def passed(shares: dict[str, Share]) -> bool:
    """Whether every gate holds."""
    return all(shares[name].value >= limit for name, limit in LIMITS.items())


def as_json(shares: dict[str, Share]) -> dict[str, Any]:
    """Figures with their limits, for a file."""
    return {
        "passed": passed(shares),
        "shares": {
            name: {
                "value": round(share.value, 4),
                "standard_error": round(share.standard_error, 4),
                "pictures": share.count,
                **({"at_least": LIMITS[name]} if name in LIMITS else {}),
            }
            for name, share in shares.items()
        },
    }


def test_scenes(test: Handwriting) -> Scenes:
    """One scene of every digit of the test fold, always the same."""
    return compose(
        test, torch.arange(len(test.labels)), torch.Generator().manual_seed(1), vary=False
    )


def all_scenes(repeats: int) -> Scenes:
    """What can be asked for, `repeats` times each, without pictures."""
    sizes = (len(DIGITS), len(COLORS), len(BACKGROUNDS))
    every = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).repeat(repeats, 1)
    return Scenes(torch.empty(len(every), 0), *every.unbind(1))


def judged(judge: Judge, pixels: Tensor, scenes: Scenes) -> dict[str, Share]:
    """What the judge reads right in pictures [n, 3, rows, columns] in 0..1."""
    right = read_right(judge, pixels, scenes)
    return {part: Share(value, len(scenes)) for part, value in right.items()}


def reconstructed(model: Any, scenes: Scenes) -> Tensor:
    """The scenes' pictures through codes and back, in 0..1."""
    parts = [
        model.model.vqmodel.decode(unified.image_codes(model, pixels))
        for pixels in normalised(scenes.pixels).split(50)
    ]
    return ((torch.cat(parts) + 1) / 2).clamp(0, 1)


def described(model: Any, scenes: Scenes) -> dict[str, Share]:
    """Words of captions that are right, each in its place."""
    said = [text.split() for text in replies(model, scenes, unified.DESCRIBE)]
    truth = [text.split() for text in scenes.captions()]
    places = {"color": 1, "digit": 2, "background": 5}
    shares = {
        part: _share(
            len(words) > at and words[at] == right[at] for words, right in zip(said, truth)
        )
        for part, at in places.items()
    }
    return {**shares, "whole": _share(map(list.__eq__, said, truth))}


def answered(model: Any, scenes: Scenes) -> dict[str, Share]:
    """Questions with the right answer."""
    truth = unified.answers(scenes)
    shares = {}
    for part, question in zip(("digit", "color", "background"), unified.QUESTIONS):
        said = replies(model, scenes, question)
        shares[part] = _share(map(str.__eq__, said, [right[question] for right in truth]))
    return shares


def _share(right: Any) -> Share:
    marks = list(right)
    return Share(sum(marks) / len(marks), len(marks))


def replies(model: Any, scenes: Scenes, question: str) -> list[str]:
    """What the model says, word by the likeliest word, to a question about each scene."""
    said: list[str] = []
    for pixels in normalised(scenes.pixels).split(50):
        ids = torch.tensor([unified.question_ids(question)]).repeat(len(pixels), 1)
        written = model.generate(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=10,
        )
        said += [unified.text_of(row) for row in written[:, ids.shape[1] :].tolist()]
    return said


def drawn_pictures(
    model: Any, asked: Scenes, guidance: float, generator: torch.Generator
) -> Tensor:
    """Pictures [n, 3, SIDE, SIDE] in 0..1 of the captions of `asked`, sampled at temperature 1."""
    parts = []
    for ids in unified.prompts(asked, torch.zeros(len(asked), dtype=torch.bool)).split(80):
        codes = sampled_codes(model, ids, guidance, generator)
        parts.append(model.model.vqmodel.decode(codes))
    return ((torch.cat(parts) + 1) / 2).clamp(0, 1)


def sampled_codes(model: Any, ids: Tensor, guidance: float, generator: torch.Generator) -> Tensor:
    """Image codes [n, TOKENS] after prompts [n, T] with classifier-free guidance."""
    from transformers import DynamicCache

    words = (ids != unified.IDS[unified.BOS]) & (ids != unified.IDS[unified.BEGIN])
    rows = torch.cat([ids, ids.masked_fill(words, unified.IDS[unified.PAD])])
    entered, cache = model.get_input_embeddings()(rows), DynamicCache()
    codes: Sequence[Tensor] = ()
    for _ in range(unified.TOKENS):
        states = model.model.language_model(
            inputs_embeds=entered, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        asked, unasked = model.model.generation_head(states).float().chunk(2)
        chances = torch.softmax(unasked + guidance * (asked - unasked), -1)
        code = torch.multinomial(chances, 1, generator=generator)
        codes = (*codes, code)
        entered = model.prepare_embeddings_for_image_generation(code.repeat(2, 1))
    return torch.cat(list(codes), 1)
