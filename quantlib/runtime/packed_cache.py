"""A KV cache of transformers whose keys and values are packed, and attended to as they lie.

It stands where transformers' `DynamicCache` would, for models whose attention goes through
`transforms.attention`: that hands queries, and the keys and values of the new tokens alone, to the
layer of this cache, which packs them and attends (`kernels.kv_cache`). So memory is that of the
packed tokens, and on a GPU one new token costs reading them once, by CUDA's kernel. What attention
sees is what transformers' cache with rounding shows it (`AttentionState.kv`), up to the rounding of
its sums.

Sequences of a batch are of one length: there is no padding in such a cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from quantlib.errors import UsageError
from quantlib.kernels import dispatch
from quantlib.kernels.kv_cache import KVCache
from quantlib.kernels.kv_format import KvFormat
from quantlib.transforms.attention import ATTRIBUTE, PACKED, AttentionState, transform

_FIRST_CAPACITY = 256
"""Positions that a layer begins with; it doubles when they are full."""


class PackedLayer(CacheLayerMixin):
    """One layer's keys and values in one format."""

    is_sliding = False
    is_croppable = False

    def __init__(self, form: KvFormat) -> None:
        super().__init__()
        self.form = form
        self.cache: KVCache | None = None
        self._given = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for heads of this size. Raises FormatError when the format does not fit."""
        batch, kv_heads, _, head_dim = key_states.shape
        sizes = kv_heads, head_dim, _FIRST_CAPACITY, batch, str(self.form)
        self.cache = KVCache(1, *sizes, device=key_states.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, kv_heads, T, head_dim] of the next tokens, as they came, this
        layer as the keys' attribute: attention gives them back to `attend`.

        Raises UsageError when it did not do so the last time.
        """
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        if self._given != self.get_seq_length():
            raise UsageError(
                "keys were given to a packed KV cache and not attended to: this model computes "
                "attention itself, and needs a cache of transformers"
            )
        self._given += key_states.shape[2]
        setattr(key_states, PACKED, self)
        return key_states, value_states

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """Pack the new tokens' keys and values [batch, kv_heads, T, head_dim] and attend to all:
        [batch, T, heads, head_dim] in the type of query [batch, heads, T, head_dim].

        options: what transformers gives to attention functions.
        """
        assert self.cache is not None  # `update` made it
        state = module.__dict__.get(ATTRIBUTE) or AttentionState()
        query, key, value = transform(query, key, value, replace(state, kv=None))
        length = self.get_seq_length() + key.shape[2]
        if length > self.cache.capacity:
            self.cache.reserve(max(length, 2 * self.cache.capacity))
        self.cache.append(0, key.transpose(1, 2), value.transpose(1, 2))
        found = self.cache.attend(
            0,
            query.transpose(1, 2),
            scale=options.get("scaling"),
            window=options.get("sliding_window") or 0,
            softcap=options.get("softcap") or 0.0,
        )
        return found.to(device=query.device, dtype=query.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask covers, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Positions that are there."""
        return 0 if self.cache is None else int(self.cache.lengths[0, 0])

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self._given = 0
        if self.cache is not None:
            self.cache.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each sequence what another has, as beam search does."""
        if self.cache is not None:
            self.cache.reorder(beam_idx.tolist())


class PackedCache(Cache):
    """Keys and values of all layers, each in a format of its own; kind: of its layers."""

    def __init__(self, forms: list[KvFormat], kind: type[PackedLayer] = PackedLayer) -> None:
        self.packed = [kind(form) for form in forms]
        super().__init__(layers=list(self.packed))

    @property
    def nbytes(self) -> int:
        """Of the memory that is set aside."""
        return sum(layer.cache.nbytes for layer in self.packed if layer.cache is not None)


def packed_cache(model: Any) -> PackedCache | None:
    """A new cache for a model on a GPU (or where QUANTLIB_KERNELS has CUDA's kernels) whose
    attentions all round keys and values as a packed cache keeps them; None for another model."""
    if model.device.type != "cuda" and dispatch.forced() not in ("cuda", "emulator"):
        return None
    states = {
        getattr(module, "layer_idx", None): module.__dict__[ATTRIBUTE]
        for module in model.modules()
        if ATTRIBUTE in module.__dict__
    }
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    if set(states) != set(range(layers)):
        return None
    forms = []
    for number in range(layers):
        state: AttentionState = states[number]
        if state.kv is None or state.softmax is not None:
            return None
        kept = max(state.sinks, state.kv.sinks)
        forms.append(state.kv.with_sinks(kept) if kept else state.kv)
    return PackedCache(forms) if forms else None
