"""Pictures from a prompt: the loops that draw them, and what turns their output into pixels.

A loop of our own instead of `model.generate(generation_mode="image")`: that one draws from torch's
global generator and always runs the unconditional row. Here every draw is the inverse of the
distribution's cumulative sum at a given number in 0..1, one per picture and place; a decoder that
begins with noise is given it. Two models that are given the same numbers share their randomness
(common random numbers): where they predict the same they draw the same, and what differs between
their pictures is what differs between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from quantlib.calibration import forwards
from quantlib.calibration.paths.one_vocabulary import emu3_prompt, emu3_size
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.paths.unified import janus_prompt
from quantlib.errors import UsageError


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length that are drawn together.

    ids:      int64 [n, T], ending with the token that begins a picture.
    wordless: int64 [n, U], the same without their words, what guidance compares with: words are
              padding (U = T), or are left out (U < T), as the model is used to.
    numbers:  of the pictures in their list: each has random numbers of its own.
    """

    ids: Tensor
    wordless: Tensor
    numbers: Sequence[int]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: `guidance` 1 is none; `temperature` 0 takes the likeliest code."""

    seed: int = 0
    guidance: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.guidance >= 1:
            raise UsageError(f"guidance is {self.guidance}: use 1 (none) or more")
        if not self.temperature >= 0:
            raise UsageError(
                f"temperature is {self.temperature}: use 0 (the likeliest code) or more"
            )


def uniforms(pictures: Sequence[int], places: int, seed: int) -> Tensor:
    """float64 [pictures, places] in 0..1; a row depends on the picture's number and the seed alone,
    not on which pictures are drawn beside it."""
    rows = [
        torch.rand(places, dtype=torch.float64, generator=_of(number, seed)) for number in pictures
    ]
    return torch.stack(rows)


def noise(pictures: Sequence[int], shape: Sequence[int], seed: int) -> Tensor:
    """float32 [pictures, *shape] of a normal distribution, by the same rule."""
    return torch.stack([torch.randn(*shape, generator=_of(number, seed)) for number in pictures])


def _of(number: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def drawn(logits: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """int64 [rows]: of each row of logits [rows, V] the code at which the cumulative probability
    passes the row's number in 0..1; at temperature 0 the likeliest code."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    # by the whole sum, which rounding leaves a little off 1: no code of probability 0 is found
    places = numbers.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, places.contiguous(), right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def draw_janus(tools: Tools, model: Any, prompts: Prompts, drawing: Drawing) -> Tensor:
    """Janus: one code after the other, then its decoder's output [n, 3, rows, columns]."""
    numbers = uniforms(prompts.numbers, _janus_places(tools, model), drawing.seed)
    codes = janus_codes(model, prompts, drawing, numbers)
    pixels: Tensor = model.decode_image_tokens(codes).movedim(-1, 1)
    return pixels


@torch.no_grad()
def janus_codes(model: Any, prompts: Prompts, drawing: Drawing, numbers: Tensor) -> Tensor:
    """Codes int64 [n, places]. With guidance, logits are u + guidance (c - u).

    numbers: [n, places] in 0..1, the loop's only randomness.
    """
    guided = drawing.guidance != 1
    ids = torch.cat([prompts.ids, prompts.wordless]) if guided else prompts.ids
    states, cache, codes = model.get_input_embeddings()(ids), None, []
    for place in range(numbers.shape[1]):
        output = model.model.language_model(
            inputs_embeds=states, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        logits = model.model.generation_head(output.last_hidden_state[:, -1]).float()
        if guided:
            logits = forwards.guided(logits, drawing.guidance)
        codes.append(drawn(logits, numbers[:, place], drawing.temperature))
        again = torch.cat([codes[-1], codes[-1]]) if guided else codes[-1]
        states = model.prepare_embeddings_for_image_generation(again.unsqueeze(1))
    return torch.stack(codes, dim=1)


@torch.no_grad()
def draw_emu3(tools: Tools, model: Any, prompts: Prompts, drawing: Drawing) -> Tensor:
    """Emu3: one code after the other, then its decoder's output [n, 3, rows, columns]."""
    rows, columns = emu3_size(tools)
    numbers = uniforms(prompts.numbers, rows * columns, drawing.seed)
    codes = emu3_codes(model, prompts, drawing, numbers, columns)
    return forwards.decoded_image(model, codes.view(-1, rows, columns))


@torch.no_grad()
def emu3_codes(
    model: Any, prompts: Prompts, drawing: Drawing, numbers: Tensor, columns: int
) -> Tensor:
    """Codes int64 [n, places], row by row; the word that ends a row is given, not drawn, and words
    that are no codes never are.

    numbers: [n, places] in 0..1, the loop's only randomness.
    """
    guided = drawing.guidance != 1
    known = model.model.vocabulary_mapping
    word_of_code = known.img2bpe_mapping_tensor.long()
    ids, mask = forwards.one_above_the_other(prompts.ids, prompts.wordless if guided else None)
    cache, codes = None, []
    for place in range(numbers.shape[1]):
        output = model.model.text_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=forwards.positions(mask)[:, -ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits = model.lm_head(output.last_hidden_state[:, -1])[:, word_of_code].float()
        if guided:
            logits = forwards.guided(logits, drawing.guidance)
        codes.append(drawn(logits, numbers[:, place], drawing.temperature))
        ids = word_of_code[codes[-1]].unsqueeze(1)
        if (place + 1) % columns == 0:
            ids = torch.nn.functional.pad(ids, (0, 1), value=known.eol_token_id)
        ids = torch.cat([ids, ids]) if guided else ids
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return torch.stack(codes, dim=1)


@torch.no_grad()
def draw_pisces(tools: Tools, model: Any, prompts: Prompts, drawing: Drawing) -> Tensor:
    """The continuous form: vectors, for which nothing is drawn, and a decoder from noise."""
    wordless = prompts.wordless if drawing.guidance != 1 else None
    vectors = model.generate_vectors(prompts.ids, wordless, drawing.guidance)
    side = int(model.config.decoder_config.image_size)
    pixels: Tensor = model.decode_vectors(
        vectors, noise(prompts.numbers, (3, side, side), drawing.seed)
    )
    return pixels


def _janus_places(_: Tools, model: Any) -> int:
    return int(model.model.vision_model.config.num_image_tokens)


def _emu3_places(tools: Tools, _: Any) -> int:
    rows, columns = emu3_size(tools)
    return rows * (columns + 1)


def _emu3_prompt(tools: Tools, prompt: str) -> tuple[Tensor, Tensor]:
    return emu3_prompt(tools, prompt, *emu3_size(tools))


def _pisces_places(_: Tools, model: Any) -> int:
    return int(model.config.grid) ** 2


@dataclass(frozen=True)
class Drawer:
    """How models of one type draw.

    prompt: (tools, words) -> one row of `Prompts.ids`, and of `Prompts.wordless`.
    places: (tools, model) -> the tokens of a picture.
    draw:   (tools, model, prompts, how) -> its decoder's pictures, in its own units.
    """

    prompt: Callable[[Tools, str], tuple[Tensor, Tensor]]
    places: Callable[[Tools, Any], int]
    draw: Callable[[Tools, Any, Prompts, Drawing], Tensor]


DRAWERS = {
    "janus": Drawer(janus_prompt, _janus_places, draw_janus),
    "emu3": Drawer(_emu3_prompt, _emu3_places, draw_emu3),
    "quantlib_pisces": Drawer(janus_prompt, _pisces_places, draw_pisces),
}
"""By model_type."""


def shown(pixels: Tensor, processor: Any) -> Tensor:
    """A decoder's output [batch, 3, rows, columns] as pixels in 0..1, rounded to 8 bits as a file
    has them: the inverse of what the processor does to a picture that is read."""
    scaling = getattr(processor, "image_processor", processor)
    mean, std = (
        torch.tensor(list(getattr(scaling, name)), dtype=torch.float32).view(1, -1, 1, 1)
        for name in ("image_mean", "image_std")
    )
    values = (pixels.float().cpu() * std + mean).clamp(0, 1)
    return (values * 255).round() / 255


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pictures from float [batch, 3, rows, columns] in 0..1."""
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)
    return [Image.fromarray(row.numpy(), "RGB") for row in values]
