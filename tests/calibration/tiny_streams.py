"""Streams of random samples for tiny models of several stacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantlib.calibration.losses import LossSum, sampled_tokens
from quantlib.calibration.streams import Sample, Stream, StreamStatistics
from quantlib.models.modelmap import ModelMap

from ..models.stacked_models import IMAGE

Mapped = Callable[[str], tuple[PreTrainedModel, ModelMap]]
PROMPT, IMAGE_TOKENS, ANSWER = 3, 4, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 50, (1, count), generator=torch.Generator().manual_seed(seed))


def next_word(output: Any, generator: torch.Generator) -> LossSum:
    """Every position predicts the next one."""
    return sampled_tokens(output.logits, generator)


def answer(output: Any, generator: torch.Generator) -> LossSum:
    """Only the last positions are an answer."""
    where = torch.zeros(output.logits.shape[:2], dtype=torch.bool)
    where[:, -ANSWER:] = True
    return sampled_tokens(output.logits, generator, where)


def text(count: int = 2) -> Stream:
    samples = [
        Sample({"input_ids": words(12, n), "use_cache": False}, next_word) for n in range(count)
    ]
    return Stream("text", samples)


def questions(image: Callable[[int], Tensor], tokens: int, count: int = 2) -> Stream:
    """An image, a question about it, and the answer."""
    samples = []
    for n in range(count):
        ids = torch.cat([words(PROMPT, n), torch.full((1, tokens), IMAGE), words(ANSWER + 2, n)], 1)
        inputs = {"input_ids": ids, "pixel_values": image(n), "use_cache": False}
        samples.append(Sample(inputs, answer))
    return Stream("questions", samples)


def seen_in(statistics: StreamStatistics, model_map: ModelMap) -> set[str]:
    """Components that a stream left statistics of."""
    unseen = {name.partition(" (")[0] for name in statistics.unseen()}
    return {group.component for group in model_map.groups if group.name not in unseen}


def unseen_in(statistics: StreamStatistics, model_map: ModelMap) -> set[str]:
    unseen = {name.partition(" (")[0] for name in statistics.unseen()}
    return {group.component for group in model_map.groups if group.name in unseen}


def speech_sample(seed: int, loss: Any = next_word) -> Sample:
    features, ids = random(1, 8, 32, seed=seed), words(6, seed)
    return Sample({"input_features": features, "decoder_input_ids": ids, "use_cache": False}, loss)


def text_of(length: int, seed: int = 0) -> Sample:
    return Sample({"input_ids": words(length, seed), "use_cache": False}, next_word)
