"""Attention on keys and values as a baseline's KV cache keeps them.

An attention function of transformers, like `quantlib.transforms.attention`, but with the papers'
min-max grids: slices of any width, symmetric or not. A module without a `HeadPlan` is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantlib.bench.w4a4.grids import Grids, round_tokens

NAME = "quantlib_bench"
_ATTRIBUTE = "quantlib_bench_heads"


@dataclass(frozen=True)
class HeadPlan:
    """basis: float32 [d, d] that queries and keys are multiplied by behind the rotary embedding.
    keys, values: how one head of one token is rounded.
    key_order, value_order: int64 [H_kv, d], columns in the order of those slices; None: as they
    are. Numbers go back to where they were."""

    keys: Grids
    values: Grids
    basis: Tensor | None = None
    key_order: Tensor | None = None
    value_order: Tensor | None = None


def attach(model: PreTrainedModel, plans: Mapping[str, HeadPlan]) -> None:
    """Give attention modules, by name, their plans. The model's attention becomes sdpa."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._attn_implementation = NAME
    for name, plan in plans.items():
        setattr(model.get_submodule(name), _ATTRIBUTE, plan)


def rounded(
    query: Tensor, key: Tensor, value: Tensor, plan: HeadPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, T, d], keys and values [B, H_kv, L, d] as attention sees them."""
    if plan.basis is not None:
        query, key = query @ plan.basis, key @ plan.basis
    key = _round(key, plan.keys, plan.key_order)
    return query, key, _round(value, plan.values, plan.value_order)


def _round(x: Tensor, grids: Grids, order: Tensor | None) -> Tensor:
    """x [B, H, L, d], rounded with the columns of each head in its order [H, d]."""
    if order is None:
        return round_tokens(x, grids)
    index = order[None, :, None, :].expand(x.shape)
    return torch.empty_like(x).scatter_(-1, index, round_tokens(x.gather(-1, index), grids))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    plan = module.__dict__.get(_ATTRIBUTE)
    if plan is not None:
        query, key, value = rounded(query, key, value, plan)
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    result: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
