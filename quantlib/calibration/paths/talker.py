"""Qwen2.5-Omni's talker: what it is given of a thinker's answer, and how it runs on given codes.

In the model's `generate` the talker speaks while the thinker is long done: every code it wrote is
read beside the next word of the answer, as the thinker left it. With the codes given that is one
pass, whose gradients reach the thinker too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIKELIEST, TEMPERATURE = 40, 0.9
"""Codes are drawn as the model's `generate` does."""


@dataclass(frozen=True)
class _Said:
    """What the talker is given of a thinker's answer.

    first: embeddings [1, prompt + 2, size] that it begins with. rest: [1, tokens, size], one of
    which is added to every code; the last stands for silence. places: of all, as `position_ids`.
    """

    first: Tensor
    rest: Tensor
    places: Tensor

    def with_codes(self, codes: Tensor) -> Tensor:
        """`first`, and the embeddings [1, n, size] of codes with what is said behind it."""
        last = self.rest.shape[1] - 1
        behind = self.rest[:, torch.arange(codes.shape[1]).clamp(max=last)]
        return torch.cat([self.first, codes + behind], 1)


def _said(model: Any, length: int, start: int, codes: int, inputs: Mapping[str, Any]) -> _Said:
    """What the thinker says after the first `length` of its tokens, with places for so many codes.

    start: the token that the voice begins with.
    """
    thinker, talker = model.thinker, model.talker
    ids = inputs["input_ids"]
    found = thinker(**inputs, output_hidden_states=True).hidden_states
    table = thinker.get_input_embeddings()
    heard = torch.zeros_like(ids[0, :length], dtype=torch.bool)
    reader = model.config.thinker_config
    for token in (reader.audio_token_id, reader.image_token_id):
        heard |= ids[0, :length] == token
    # of pictures and sounds the talker gets what was thought, not what was put in
    entered = found[0][:, :length].masked_fill(heard[None, :, None], 0.0)
    reply = (found[0] + found[-1])[:, length:-1]  # the end of an answer is never thought about
    ending = table(torch.tensor([[talker.text_eos_token, talker.text_pad_token]]))
    first = torch.cat([entered + found[-1][:, :length], table(torch.tensor([[start]]))], 1)
    first = torch.cat([first, reply[:, :1]], 1)
    begin = talker.get_input_embeddings()(
        torch.tensor([[talker.codec_pad_token, talker.codec_bos_token]])
    )
    first = torch.cat([first[:, :-2], first[:, -2:] + begin], 1)
    words = torch.full_like(ids[:, :1], talker.text_pad_token).repeat(1, codes + 2)
    text = torch.cat([ids[:, :length], words], 1)
    lengths = inputs.get("feature_attention_mask")
    places, _ = talker.get_rope_index(
        text,
        inputs.get("image_grid_thw"),
        None,
        torch.ones_like(text),
        False,
        None if lengths is None else lengths.sum(1),
        None,
    )
    return _Said(first, torch.cat([reply[:, 1:], ending], 1), places)


def code_logits(
    model: Any, codes: Tensor, prompt: int, start: int, thinking: Mapping[str, Any]
) -> Tensor:
    """What the talker says of given codes [1, n] after an answer: [1, n, codebook].

    prompt: tokens before the answer. start: the token that the voice begins with. thinking: the
    thinker's inputs, answer included.
    """
    talker = model.talker
    said = _said(model, prompt, start, codes.shape[1] - 1, thinking)
    entered = said.with_codes(talker.get_input_embeddings()(codes[:, :-1]))
    states = talker.model(
        inputs_embeds=talker.thinker_to_talker_proj(entered),
        position_ids=said.places,
        use_cache=False,
    ).last_hidden_state
    logits: Tensor = talker.codec_head(states[:, said.first.shape[1] - 1 :])
    return logits.float()


@torch.no_grad()
def drawn_codes(
    model: Any, count: int, prompt: int, start: int, thinking: Mapping[str, Any], seed: int
) -> Tensor:
    """int64 [1, count] codes that the talker draws after an answer; arguments of `code_logits`.

    Only codes that can be heard: its pauses and ends are none.
    """
    from transformers import DynamicCache

    talker = model.talker
    said = _said(model, prompt, start, count, thinking)
    heard = model.config.token2wav_config.dit_config.num_embeds
    generator, cache = torch.Generator().manual_seed(seed), DynamicCache(config=talker.config)
    entered, seen = said.first, 0
    codes: list[Tensor] = []
    for step in range(count):
        places = said.places[..., seen : seen + entered.shape[1]]
        seen += entered.shape[1]
        states = talker.model(
            inputs_embeds=talker.thinker_to_talker_proj(entered),
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = talker.codec_head(states[0, -1]).float()[:heard]
        best = logits.topk(min(LIKELIEST, len(logits)))
        drawn = torch.multinomial((best.values / TEMPERATURE).softmax(0), 1, generator=generator)
        codes.append(best.indices[drawn].view(1, 1))
        following = said.rest[:, min(step, said.rest.shape[1] - 1)][:, None]
        entered = talker.get_input_embeddings()(codes[-1]) + following
    return torch.cat(codes, 1)
