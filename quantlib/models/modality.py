"""What kind of token stands where, for what is done to them by kind.

Words, images that are read, and images that are written: a unified model keeps all three in one
sequence, and the first two in one call. Ids tell which is which where the model is given ids; where
a decoder is given vectors only (an image that is written, or one that is given code by code), its
caller knows, and says so with `known_modalities`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Modality = Literal["text", "image_input", "image_output"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
TEXT, IMAGE_INPUT, IMAGE_OUTPUT = range(3)
"""Indices into MODALITIES, of which tensors of kinds are made."""
ATTRIBUTE = "quantlib_modalities"


def kinds_of_ids(ids: Tensor, image_token: int | None) -> Tensor:
    """int64 of the shape of `ids`: images that are read stand where the image token does."""
    kinds = torch.full_like(ids, TEXT, dtype=torch.int64)
    return kinds if image_token is None else kinds.masked_fill(ids == image_token, IMAGE_INPUT)


def kinds_of_written_image(rows: int, prompt: int, codes: int) -> Tensor:
    """int64 [rows, prompt + codes]: words, and an image behind them."""
    parts = (torch.full((rows, prompt), TEXT), torch.full((rows, codes), IMAGE_OUTPUT))
    return torch.cat(parts, 1)


@contextmanager
def known_modalities(decoder: nn.Module, kinds: Tensor) -> Iterator[None]:
    """Say what the tokens [B, T] of the decoder's next call are, while the context lasts."""
    setattr(decoder, ATTRIBUTE, kinds)
    try:
        yield
    finally:
        delattr(decoder, ATTRIBUTE)
