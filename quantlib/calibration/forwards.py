"""The ways data goes through models that do more than their `forward`: `Stream.run` functions.

A unified model generates images by other modules than it reads them with, in a loop that no
`forward` contains. With the image codes given (teacher forcing) the loop is one pass: every
position predicts the next code from the true ones before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib.models.modality import kinds_of_written_image, known_modalities


def janus_image_logits(
    model: Any,
    input_ids: Tensor,
    image_codes: Tensor,
    attention_mask: Tensor | None = None,
    unconditional_ids: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Janus writing an image: logits [batch, codes, codebook] of given codes after a prompt.

    input_ids:         [batch, T], a prompt that ends with the token that begins an image.
    image_codes:       [batch, codes], what the VQ encoder makes of the image.
    unconditional_ids: [batch, T], the prompt with its words padded away; with it, logits are those
                       of classifier-free guidance, u + guidance (c - u), and both rows are run.
    """
    rows = [input_ids] if unconditional_ids is None else [input_ids, unconditional_ids]
    ids, count = torch.cat(rows), len(rows)
    words = model.get_input_embeddings()(ids)
    codes = model.prepare_embeddings_for_image_generation(image_codes[:, :-1].repeat(count, 1))
    if attention_mask is not None:
        seen = torch.ones(codes.shape[:2], dtype=attention_mask.dtype)
        attention_mask = torch.cat([attention_mask.repeat(count, 1), seen], 1)
    kinds = kinds_of_written_image(words.shape[0], words.shape[1], codes.shape[1])
    with known_modalities(model.model.language_model, kinds):
        states = model.model.language_model(
            inputs_embeds=torch.cat([words, codes.to(words.dtype)], 1),
            attention_mask=attention_mask,
            use_cache=False,
        ).last_hidden_state
    logits: Tensor = model.model.generation_head(states[:, ids.shape[1] - 1 :])
    return logits if unconditional_ids is None else guided(logits, guidance)


def emu3_image_logits(
    model: Any,
    input_ids: Tensor,
    image_words: Tensor,
    unconditional_ids: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Emu3 writing an image: logits [batch, words, vocabulary] of given words after a prompt.

    input_ids:         [batch, T], a prompt that ends with the token that begins an image.
    image_words:       [batch, words], the image's codes as words, row by row, and behind each row
                       the word that ends it.
    unconditional_ids: [batch, U], the prompt without its words; with it, logits are those of
                       classifier-free guidance, and both rows are run.
    """
    prompts, mask = one_above_the_other(input_ids, unconditional_ids)
    written = image_words[:, :-1].repeat(len(prompts) // len(image_words), 1)
    kinds = kinds_of_written_image(len(prompts), prompts.shape[1], written.shape[1])
    mask = torch.cat([mask, torch.ones_like(written)], 1)
    with known_modalities(model.model.text_model, kinds):
        states = model.model.text_model(
            input_ids=torch.cat([prompts, written], 1),
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
        ).last_hidden_state
    logits: Tensor = model.lm_head(states[:, prompts.shape[1] - 1 :])
    return logits if unconditional_ids is None else guided(logits, guidance)


def guided(logits: Tensor, guidance: float) -> Tensor:
    """u + guidance (c - u) of logits [2 n, ...]: those of prompts c, and below them those of the
    same without words, u (Ho and Salimans 2022, classifier-free guidance)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def one_above_the_other(ids: Tensor, wordless: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts [n, T], below them [n, U] without words, U at most T, behind padding; and a mask
    int64 of that shape, 0 where there is padding. Without `wordless`, the prompts alone."""
    if wordless is None:
        return ids, torch.ones_like(ids)
    before = (ids.shape[1] - wordless.shape[1], 0)
    below, mask = (
        torch.nn.functional.pad(x, before) for x in (wordless, torch.ones_like(wordless))
    )
    return torch.cat([ids, below]), torch.cat([torch.ones_like(ids), mask])


def positions(mask: Tensor) -> Tensor:
    """Positions int64 [n, T] of tokens that count, from 0, where a mask [n, T] is 1."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def decoded_image(model: Any, image_codes: Tensor) -> Tensor:
    """An image decoder: pixels of codes, [batch, codes] for Janus, [batch, rows, columns] for
    Emu3."""
    pixels: Tensor = model.model.vqmodel.decode(image_codes)
    return pixels


def code_logits(model: Any, pixel_values: Tensor, **others: Any) -> Tensor:
    """An image encoder (Janus, Chameleon, Emu3): [places, codebook], minus squared distances.

    The nearest code is what the encoder writes; as logits, distances say which codes it is near.
    others: further arguments of the VQ model's `encode`.
    """
    vq, entered = model.model.vqmodel, []
    handle = vq.quantize.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    try:
        vq.encode(pixel_values, **others)
    finally:
        handle.remove()
    latents = entered[0].movedim(-3, -1)  # channels stand before rows and columns
    flat = latents.reshape(-1, latents.shape[-1])
    return -torch.cdist(flat, vq.quantize.embedding.weight.to(flat.dtype)).square()
