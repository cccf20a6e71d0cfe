"""A packed KV cache for a decoder that hears an encoder: what it said, and what it hears.

It stands where transformers' `EncoderDecoderCache` would. Keys and values of the decoder's own
tokens grow by one with every token; those of the encoder's output are made once for each sound, and
are packed then. Both are attended to as they lie (`packed_cache.py`), on every machine: no native
engine runs such models. Numbers are those of attention with rounding (`AttentionState.kv`), which a
model without a cache computes, up to the rounding of sums.

A hook on the decoder puts it in place of an empty cache of transformers, or of none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from quantlib.kernels.kv_format import KvFormat
from quantlib.runtime.packed_cache import PackedCache, PackedLayer
from quantlib.transforms.attention import ATTRIBUTE, PACKED, AttentionState, transform
from quantlib.transforms.tables import AttentionRule, find


class HeardLayer(PackedLayer):
    """Keys and values of an encoder's output in one layer: packed once, then only read.

    keys, values: stand for them where transformers looks for what is cached: without numbers, in
                  the shape of the keys, and with this layer as their attribute.
    """

    keys: Tensor | None
    values: Tensor | None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """Attend to all that is heard: [batch, T, heads, head_dim] in the type of query
        [batch, heads, T, head_dim]. key, value: [batch, kv_heads, L, head_dim], packed at the first
        call, and not looked at again.

        options: what transformers gives to attention functions.
        """
        assert self.cache is not None  # `update` made it
        state = replace(module.__dict__.get(ATTRIBUTE) or AttentionState(), kv=None)
        if self.get_seq_length():
            nothing = key[:, :, :0]
            query, _, _ = transform(query, nothing, nothing, replace(state, observe=None))
        else:
            self.keys = self.values = self._standing_for(key)
            query, key, value = transform(query, key, value, state)
            self.cache.reserve(key.shape[2])
            self.cache.append(0, key.transpose(1, 2), value.transpose(1, 2))
        # each token as the last one of its sequence, which sees all
        tokens = query.transpose(1, 2).split(1, dim=1)
        found = [self.cache.attend(0, token, scale=options.get("scaling")) for token in tokens]
        return torch.cat(found, 1).to(device=query.device, dtype=query.dtype)

    def _standing_for(self, key: Tensor) -> Tensor:
        mark = key.new_zeros(1).expand(key.shape)
        setattr(mark, PACKED, self)
        return mark

    def reset(self) -> None:
        """Forget the sound."""
        super().reset()
        self.keys = self.values = None


class HearingCache(EncoderDecoderCache):
    """Keys and values of all layers of a decoder.

    said, heard: format of each layer, of its own tokens and of the encoder's output.
    """

    def __init__(self, said: list[KvFormat], heard: list[KvFormat]) -> None:
        super().__init__(PackedCache(said), PackedCache(heard, HeardLayer))

    @property
    def nbytes(self) -> int:
        """Of the memory that is set aside."""
        return int(self.self_attention_cache.nbytes + self.cross_attention_cache.nbytes)


def hearing_cache(model: Any) -> HearingCache | None:
    """A new cache for a model whose decoder hears an encoder and rounds all keys and values that
    are cached; None for another model."""
    rules = _rules(str(model.config.model_type))
    if rules is None:
        return None
    forms: list[list[KvFormat]] = []
    for rule in rules:
        states = [
            layer.get_submodule(rule.module).__dict__.get(ATTRIBUTE)
            for layer in model.get_decoder().layers
        ]
        if any(state is None or state.kv is None for state in states):
            return None
        kept = [max(state.sinks, state.kv.sinks) for state in states]
        forms.append(
            [
                state.kv.with_sinks(count) if count else state.kv
                for state, count in zip(states, kept, strict=True)
            ]
        )
    return HearingCache(*forms)


def attach_hearing_cache(model: Any) -> None:
    """From now on the model's decoder begins with a packed cache, where it caches at all and
    `hearing_cache` makes one."""
    if _rules(str(model.config.model_type)) is None:
        return

    def give(
        decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        asked = kwargs.get("use_cache")
        caches = model.config.use_cache if asked is None else asked
        if not caches or (cache is not None and cache.get_seq_length()):
            return args, kwargs
        if isinstance(cache, HearingCache):
            return args, kwargs
        return args, kwargs | {"past_key_values": hearing_cache(model) or cache}

    model.get_decoder().register_forward_pre_hook(give, with_kwargs=True)


def _rules(model_type: str) -> tuple[AttentionRule, AttentionRule] | None:
    """A decoder block's attention to itself and to the encoder."""
    family = find(model_type)
    for rule in family.rules if family is not None else ():
        own = [attention for attention in rule.attentions if attention.source is None]
        crossing = [attention for attention in rule.attentions if attention.source is not None]
        if own and crossing:
            return own[0], crossing[0]
    return None
