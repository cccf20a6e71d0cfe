"""The KV cache: past keys and values of every layer, packed, and attention that reads them so.

The cache is static: room for `capacity` positions of `batch` sequences is set aside once, and the
system gives memory to what is written. Every sequence of every layer has a length of its own. The
compiled kernels compute where there are any, else the torch reference, with the same codes and the
same results within the rounding of float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantlib.errors import DataError, FormatError, UsageError
from quantlib.kernels import kv_reference
from quantlib.kernels.cpu import attention_library
from quantlib.kernels.kv_format import BLOCK, KvFormat, SideFormat

MAX_QUERY_GROUP = 96
"""Query heads that may share a KV head."""


class KVCache:
    """Keys and values of `layers` layers, for `batch` sequences of up to `capacity` positions.

    form:     the format (see `kv_format`).
    capacity: positions of a sequence, rounded up to a multiple of 64.
    lengths:  int64 [layers, batch], positions that each layer holds of each sequence.
    nbytes:   of the whole cache when full; memory is taken as positions are written.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        batch: int = 1,
        format: str = "f32",
        *,
        isa: str = "best",
        threads: int | None = None,
    ) -> None:
        """`isa` and `threads` (default: torch's) are for the kernels; threads never change a bit.

        Raises FormatError for a format that is unknown or does not fit the heads, UsageError for
        sizes below 1.
        """
        sizes = {"layers": layers, "kv_heads": kv_heads, "capacity": capacity, "batch": batch}
        for name, size in sizes.items():
            if size < 1:
                raise UsageError(f"a KV cache needs {name} of at least 1, not {size}")
        self.form = KvFormat.parse(format)
        self.head_dim, self.kv_heads, self.batch = head_dim, kv_heads, batch
        self.capacity = -(-capacity // BLOCK) * BLOCK
        for side in (self.form.key, self.form.value):
            side.check(head_dim)
        self.lengths = torch.zeros(layers, batch, dtype=torch.int64, device="cpu")
        self._keys = self._allocate(self.form.key)
        self._values = self._allocate(self.form.value)
        self._isa, self._threads = isa, threads
        self._library = attention_library.load()
        self._layers = [
            attention_library.describe_layer(self.form, head_dim, keys, values)
            for keys, values in zip(self._keys, self._values)
        ]

    def _allocate(self, side: SideFormat) -> Tensor:
        block = BLOCK * side.bytes_per_position(self.head_dim)
        shape = (len(self.lengths), self.batch, self.kv_heads, self.capacity // BLOCK, block)
        return torch.zeros(shape, dtype=torch.uint8, device="cpu")

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """The packed keys and values: uint8 [layers, batch, kv_heads, blocks, bytes of a block]."""
        return self._keys, self._values

    @property
    def nbytes(self) -> int:
        """Bytes of the cache when every sequence is full."""
        return self._keys.nbytes + self._values.nbytes

    @property
    def bytes_per_token(self) -> int:
        """Exact bytes that one position takes in all layers."""
        per_head = self.form.bytes_per_position(self.head_dim)
        return len(self.lengths) * self.kv_heads * per_head

    def append(
        self, layer: int, keys: Tensor, values: Tensor, sequences: Sequence[int] | None = None
    ) -> None:
        """Store keys (after the rotary embedding) and values [n, T, kv_heads, head_dim] of the next
        T positions of n different sequences (default: all) in a layer.

        Raises DataError, and stores nothing, when a sequence would not fit; FormatError for a wrong
        shape.
        """
        rows = self._rows(layer, sequences)
        expected = (
            len(rows),
            keys.shape[1] if keys.dim() == 4 else 0,
            self.kv_heads,
            self.head_dim,
        )
        if tuple(keys.shape) != expected or keys.shape != values.shape:
            raise FormatError(
                f"keys and values are {list(keys.shape)} and {list(values.shape)}, and this KV "
                f"cache takes [{len(rows)}, tokens, {self.kv_heads}, {self.head_dim}]"
            )
        firsts = self.lengths[layer, rows]
        longest = int(firsts.max()) + keys.shape[1]
        if longest > self.capacity:
            raise DataError(
                f"the KV cache holds {self.capacity} positions of a sequence, and one would have "
                f"{longest}: create it with a larger capacity, or truncate"
            )
        keys, values = _floats(keys), _floats(values)
        if self._library is None:
            self._append_reference(layer, rows, firsts, keys, values)
        else:
            self._library.append(
                self._layers[layer], rows, firsts, keys, values, self._isa, self._threads
            )
        self.lengths[layer, rows] += keys.shape[1]

    def attend(
        self,
        layer: int,
        query: Tensor,
        sequences: Sequence[int] | None = None,
        *,
        scale: float | None = None,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:
        """Causal attention for the last T positions of n sequences (default: all).

        query [n, T, heads, head_dim] -> float32 of the same shape; query heads share KV heads in
        order. `scale` is 1 / sqrt(head_dim) by default; `window` is how many positions a token
        sees, itself included (0: all); scores are softcap * tanh(score / softcap) unless softcap
        is 0. The same bits for any number of threads, and for a token alone or among others.
        """
        rows = self._rows(layer, sequences)
        self._check_query(layer, rows, query)
        if scale is None:
            scale = 1 / math.sqrt(self.head_dim)
        if window < 0 or softcap < 0:
            raise UsageError(f"window and softcap are 0 or more, not {window} and {softcap}")
        query = _floats(query)
        if self._library is None:
            outputs = [
                kv_reference.attend(one, *self.dequantize(layer, int(row)), scale, window, softcap)
                for one, row in zip(query, rows)
            ]
            return torch.stack(outputs)
        firsts = self.lengths[layer, rows] - query.shape[1]
        return self._library.attend(
            self._layers[layer],
            rows,
            firsts,
            query,
            scale,
            window,
            softcap,
            self._isa,
            self._threads,
        )

    def dequantize(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence as attention sees them: float32 [length, kv_heads, d]."""
        self._rows(layer, [sequence])
        length = int(self.lengths[layer, sequence])
        if self._library is not None:
            return self._library.dequantize(self._layers[layer], sequence, length, self._isa)
        blocks = -(-length // BLOCK)
        sides = (
            (self.form.key, self._keys, True),
            (self.form.value, self._values, False),
        )
        keys, values = (
            kv_reference.dequantize(
                stored[layer, sequence, :, :blocks], side, is_key, self.head_dim
            )
            for side, stored, is_key in sides
        )
        return keys[:length], values[:length]

    def reset(self) -> None:
        """Forget all sequences."""
        self.lengths.zero_()

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the positions of a sequence from `length` on, in all layers."""
        if not 0 <= sequence < self.batch or length < 0:
            raise UsageError(
                f"there is nothing to truncate at position {length} of sequence {sequence}: this "
                f"KV cache has sequences 0 to {self.batch - 1}"
            )
        self.lengths[:, sequence].clamp_(max=length)

    def reorder(self, origins: Sequence[int]) -> None:
        """Give each sequence i the contents of sequence origins[i], as beam search does."""
        if len(origins) != self.batch or not all(0 <= row < self.batch for row in origins):
            raise UsageError(
                f"a new order of a KV cache of {self.batch} sequences is {self.batch} of their "
                f"numbers, not {list(origins)}"
            )
        blocks = -(-int(self.lengths.max()) // BLOCK)
        order = torch.tensor(origins, device="cpu")
        for stored in (self._keys, self._values):
            for layer in stored:
                layer[:, :, :blocks] = layer[order, :, :blocks]
        self.lengths.copy_(self.lengths[:, order])

    def _rows(self, layer: int, sequences: Sequence[int] | None) -> Tensor:
        """int64 [n]: the sequences meant. Raises UsageError when there is no such thing."""
        if not 0 <= layer < len(self.lengths):
            raise UsageError(f"there is no layer {layer} in a KV cache of {len(self.lengths)}")
        rows = list(range(self.batch)) if sequences is None else list(sequences)
        if not rows or len(set(rows)) != len(rows) or not all(0 <= i < self.batch for i in rows):
            raise UsageError(
                f"sequences {rows} are not different numbers from 0 to {self.batch - 1}, which "
                "this KV cache has"
            )
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def _check_query(self, layer: int, rows: Tensor, query: Tensor) -> None:
        heads = query.shape[2] if query.dim() == 4 else 0
        fits = query.dim() == 4 and query.shape[0] == len(rows) and query.shape[1] > 0
        if not fits or query.shape[3] != self.head_dim or heads % self.kv_heads or heads == 0:
            raise FormatError(
                f"the query is {list(query.shape)}, and this KV cache takes [{len(rows)}, tokens, "
                f"a multiple of {self.kv_heads} heads, {self.head_dim}]"
            )
        if heads // self.kv_heads > MAX_QUERY_GROUP:
            raise FormatError(
                f"{heads} query heads share {self.kv_heads} KV heads, and at most "
                f"{MAX_QUERY_GROUP} can share one"
            )
        shortest = int(self.lengths[layer, rows].min())
        if shortest < query.shape[1]:
            raise DataError(
                f"queries of {query.shape[1]} tokens meet a sequence of {shortest} positions in "
                f"layer {layer}: append keys and values first"
            )

    def _append_reference(
        self, layer: int, rows: Tensor, firsts: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        sides = (
            (self.form.key, self._keys[layer], keys, True),
            (self.form.value, self._values[layer], values, False),
        )
        for side, stored, new, is_key in sides:
            for row, first, tokens in zip(rows.tolist(), firsts.tolist(), new):
                kv_reference.store(stored[row], side, is_key, first, tokens)


def _floats(x: Tensor) -> Tensor:
    return x.detach().to(device="cpu", dtype=torch.float32).contiguous()
