"""Attention written out, for a softmax that is not torch's.

transformers' own functions compute scores, softmax and the sum of values in one call; here the
softmax in the middle is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.errors import ModelError

Softmax = Callable[[Tensor, Tensor | None], Tensor]
"""Scores float32 [B, H, T, L], and which of them count (bool, broadcast; None: all) -> weights."""


def attend(
    softmax: Softmax,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' attention contract: queries [B, H, T, d], keys and values [B, H_kv, L, d] ->
    outputs [B, T, H, d] and weights [B, H, T, L]; nothing is dropped out.

    mask: bool (what counts) or float (added to scores). Raises ModelError for biases of positions.
    """
    if options.get("position_bias") is not None:
        raise ModelError(
            f"{type(module).__name__} adds biases of positions to its scores, which an integer "
            "softmax does not know: leave this part of the model in floats"
        )
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scaling = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.mT).float() * scale
    softcap = options.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        seen = _causal(module, query, key, options.get("is_causal"))
    elif mask.dtype == torch.bool:
        seen = mask
    else:
        seen = mask > torch.finfo(mask.dtype).min / 2
        scores = scores + torch.where(seen, mask, 0.0)
    weights = softmax(scores, seen).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _causal(module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None) -> Tensor | None:
    """What counts where no mask says it: all, or what stands before, as sdpa takes it."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or query.shape[2] == 1:
        return None
    shape = (query.shape[2], key.shape[2])
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril()
