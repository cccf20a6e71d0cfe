"""A KV cache whose words, images read and images written are kept in formats of their own.

It stands where transformers' `DynamicCache` or `StaticCache` would: give it to a model as
`past_key_values`, or have `modality_hooks` put it there. What attention sees is what the packed
tokens stand for, the newest one included. Memory is that of the packed tokens; the time is that of
unpacking all of them at every step, in torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from quantlib.errors import DataError, UsageError
from quantlib.kernels.kv_format import KvFormat
from quantlib.kernels.kv_spans import SideSpans, TokenIndex
from quantlib.models.modality import MODALITIES, TEXT, Modality

Static = Mapping[tuple[int, Modality, str], Tensor]
"""(layer, modality, "key" or "value") -> meta words of every place (`kernels.kv_static`)."""


class SpanLayer(CacheLayerMixin):
    """One layer's keys and values."""

    is_sliding = False
    is_croppable = False

    def __init__(self, cache: ModalityCache, number: int) -> None:
        super().__init__()
        self._cache, self._number = cache, number
        self.length = 0
        self.sides: tuple[SideSpans, SideSpans] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set the pools up for heads of this size. Raises FormatError when they do not fit."""
        forms = self._cache.forms
        sides = []
        for side, x in (("key", key_states), ("value", value_states)):
            metas = [self._cache.static.get((self._number, m, side)) for m in MODALITIES]
            kept = [getattr(form, side) for form in forms]
            sides.append(SideSpans(kept, x.shape[1], x.shape[3], metas))
        self.sides = (sides[0], sides[1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [batch, kv_heads, T, head_dim] of the next T tokens; all of them
        come back, as they are kept."""
        if self.sides is None:
            self.lazy_initialization(key_states, value_states)
        assert self.sides is not None
        index = self._cache.index_for(self.length, key_states)
        self.length += key_states.shape[2]
        for side, x in zip(self.sides, (key_states, value_states), strict=True):
            side.append(x, index)
        keys, values = (side.read(index, key_states.dtype) for side in self.sides)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask covers, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Positions that are there."""
        return self.length

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    @property
    def nbytes(self) -> int:
        """Of the tokens that are there."""
        pools = [pool for side in self.sides or () for pool in side.pools]
        return sum(pool.nbytes for pool in pools)


class ModalityCache(Cache):
    """Keys and values of `layers` layers.

    formats: by modality; those left out are kept as text is, and text as float32 unless said.
    written: what tokens are that follow a prompt, unless `expect` says.
    static:  scales known beforehand, by layer, modality and side.
    """

    def __init__(
        self,
        layers: int,
        formats: Mapping[Modality, KvFormat],
        *,
        written: Modality = "text",
        static: Static | None = None,
    ) -> None:
        self.forms = full_formats(formats)
        self.static = dict(static or {})
        self.written = MODALITIES.index(written)
        self._index = TokenIndex([form.sinks for form in self.forms])
        self._expected: Tensor | None = None
        self._spans = [SpanLayer(self, number) for number in range(layers)]
        super().__init__(layers=list(self._spans))

    def expect(self, kinds: Tensor | None) -> None:
        """Say what the tokens of the next call are: int64 [batch, T], indices into MODALITIES.

        None: what the model is given first is text, and what follows is `written`.
        """
        self._expected = kinds

    def index_for(self, length: int, keys: Tensor) -> TokenIndex:
        """The index with the tokens of keys [batch, heads, T, d] that follow `length` others. The
        first layer of a call adds them."""
        rows, _, count, _ = keys.shape
        if self._index.length == length + count:
            return self._index
        if self._index.length != length:
            raise DataError(
                f"a layer that has cached {length} tokens is given the next, and others have "
                f"{self._index.length}: layers of this model cache different tokens, which needs "
                "transformers' own cache"
            )
        kinds = self._expected
        if kinds is None:
            kind = self.written if length else TEXT
            kinds = torch.full((rows, count), kind)
        if tuple(kinds.shape) != (rows, count):
            raise DataError(
                f"a model is given {rows} sequences of {count} tokens, and the kinds of "
                f"{list(kinds.shape)} are known: say what each of its tokens is, or nothing"
            )
        self._index.extend(kinds.to(keys.device))
        self._expected = None
        return self._index

    @property
    def kinds(self) -> Tensor:
        """Of every token, int64 [batch, length]: its pool, len(MODALITIES) for those kept exact."""
        return self._index.pool

    def tokens(self, layer: int, side: str, kind: int) -> tuple[Tensor, Tensor]:
        """What a layer keeps of the tokens of a kind, as "key" or "value": float32 [n, kv_heads,
        head_dim], and their places int64 [n]. Raises UsageError for a layer that holds nothing."""
        sides = self._spans[layer].sides
        if sides is None:
            raise UsageError(f"layer {layer} of this KV cache holds nothing yet")
        pool, places = sides[("key", "value").index(side)].pools[kind], self._index.places[kind]
        return pool.read(places), places

    @property
    def nbytes(self) -> int:
        """Of all tokens that are there. Scales that are known beforehand are not among them."""
        return sum(layer.nbytes for layer in self._spans)

    def reset(self) -> None:
        """Forget all tokens."""
        self._index.clear()
        self._spans = [SpanLayer(self, number) for number in range(len(self._spans))]
        self.layers = list(self._spans)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each sequence what another has, as beam search does."""
        self._index.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self._index.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._index.select(torch.arange(len(self._index.pool)).repeat_interleave(repeats))


def full_formats(formats: Mapping[Modality, KvFormat]) -> tuple[KvFormat, ...]:
    """The format of every modality, in their order. Raises UsageError for one that there is not."""
    unknown = [name for name in formats if name not in MODALITIES]
    if unknown:
        raise UsageError(
            f"there are no tokens of {unknown[0]!r}: a KV cache has formats for "
            f"{', '.join(MODALITIES)}"
        )
    text = formats.get("text", KvFormat.parse("f32"))
    return tuple(formats.get(name, text) for name in MODALITIES)
