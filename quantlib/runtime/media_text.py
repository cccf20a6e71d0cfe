"""Text that answers a picture or a sound, by transformers' own loop over packed modules.

Models that read other things than words run through `generate` of their class: it knows where
image vectors go, and how a decoder listens to an encoder. What is drawn is still drawn by a
generator of its own: the step that chooses a token is put in front of a greedy loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from quantlib.errors import UsageError
from quantlib.models.skeleton import writer
from quantlib.runtime.generate import Sampling, choose


class Drawing(LogitsProcessor):
    """Leaves of every row's scores the token that `choose` takes: a greedy loop then draws."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self._sampling = sampling
        self._generators = [torch.Generator().manual_seed(sampling.seed) for _ in range(rows)]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores [rows, V] -> -inf but for one token a row."""
        left = torch.full_like(scores, -torch.inf)
        for row, generator in enumerate(self._generators):
            left[row, choose(scores[row].float().cpu(), self._sampling, generator)] = 0.0
        return left


@dataclass(frozen=True)
class Written:
    """One text: its new tokens, end token included, and the seconds that all of it took."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    seconds: float


@torch.no_grad()
def write_text(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> Written:
    """What the model says after `inputs`, arguments of its `generate` for one sample: ids of the
    prompt and pixels, or the features of a sound."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}: use 1 or more")
    sampling = sampling or Sampling()
    heard = model.config.is_encoder_decoder
    options: dict[str, Any] = {
        # Whisper's loop adds the length of its prompt. With the other limit it warns at every call
        # that there are two: its generation config has one, too.
        "max_length" if heard else "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "guidance_scale": 1.0,  # what a generation config says of it is meant for pictures
    }
    if sampling.temperature > 0:
        options["logits_processor"] = LogitsProcessorList([Drawing(sampling, 1)])
    began = time.perf_counter()
    output = writer(model).generate(**inputs, **options)
    seconds = time.perf_counter() - began
    prompt = inputs["decoder_input_ids" if heard else "input_ids"][0].tolist()
    tokens = output[0].tolist()
    if not heard or tokens[: len(prompt)] == prompt:  # Whisper's own loop may leave it out
        tokens = tokens[len(prompt) :]
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return Written(text.strip(), tokens, len(prompt), seconds)
