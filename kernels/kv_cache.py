"""The KV cache: past keys and values of every layer, packed, and attention that reads them so.

The cache is static: room for `capacity` positions of `batch` sequences is set aside once, and the
system gives memory to what is written. Every sequence of every layer has a length of its own. In
main memory the compiled kernels compute where there are any; on a GPU (or in the emulator, with
QUANTLIB_KERNELS) CUDA's kernel attends for one new token of 16 bits; else the torch reference, with
the same codes and the same results within the rounding of float32 (on a GPU, of the queries' type).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantlib.errors import DataError, FormatError, UsageError
from quantlib.kernels import dispatch, kv_reference
from quantlib.kernels.cpu import attention_library
from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda import attend as cuda
from quantlib.kernels.cuda import launch
from quantlib.kernels.kv_format import BLOCK, KvFormat, SideFormat, padded_columns

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
        device: torch.device | str = "cpu",
    ) -> None:
        """`isa` and `threads` (default: torch's) are for the kernels; threads never change a bit.
        `device` is where keys and values are kept.

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
        self.device = torch.empty(0, device=device).device
        self._keys = self._allocate(self.form.key)
        self._values = self._allocate(self.form.value)
        self._sink_keys = self._allocate_sinks(self.form.key)
        self._sink_values = self._allocate_sinks(self.form.value)
        self._isa, self._threads = isa, threads
        self._library = attention_library.load() if self.device.type == "cpu" else None
        self._layers = self._described()

    def _described(self) -> list[attention_library.Layer]:
        return [
            attention_library.describe_layer(self.form, self.head_dim, *tensors)
            for tensors in zip(self._keys, self._values, self._sink_keys, self._sink_values)
        ]

    def _allocate(self, side: SideFormat) -> Tensor:
        block = BLOCK * side.bytes_per_position(self.head_dim)
        shape = (len(self.lengths), self.batch, self.kv_heads, self.capacity // BLOCK, block)
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def _allocate_sinks(self, side: SideFormat) -> Tensor:
        """float32 [layers, batch, kv_heads, floats]: padded columns x positions in whole vectors,
        keys column by column, values position by position."""
        floats = padded_columns(self.head_dim) * padded_columns(self.form.sinks)
        shape = (len(self.lengths), self.batch, self.kv_heads, 0 if side.bits == 32 else floats)
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """The packed keys and values: uint8 [layers, batch, kv_heads, blocks, bytes of a block]."""
        return self._keys, self._values

    @property
    def nbytes(self) -> int:
        """Bytes of the cache when every sequence is full."""
        sinks = self._sink_keys.nbytes + self._sink_values.nbytes
        return self._keys.nbytes + self._values.nbytes + sinks

    @property
    def bytes_per_token(self) -> int:
        """Exact bytes that one position takes in all layers, unless it is kept in float32."""
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
        keys, values = self._floats(keys), self._floats(values)
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
        integer: bool = False,
    ) -> Tensor:
        """Causal attention for the last T positions of n sequences (default: all).

        query [n, T, heads, head_dim] -> float32 of the same shape; query heads share KV heads in
        order. `scale` is 1 / sqrt(head_dim) by default; `window` is how many positions a token
        sees, itself included (0: all); scores are softcap * tanh(score / softcap) unless softcap
        is 0. With `integer`, queries and weights are rounded to 16 bits and multiplied with packed
        keys and values in integers (cpu/src/attention.h): faster, and as exact as any 16 bits; the
        reference, where there are no compiled kernels, computes in float32 all the same.
        The same bits for any number of threads, and for a token alone or among others.
        """
        rows = self._rows(layer, sequences)
        self._check_query(layer, rows, query)
        if scale is None:
            scale = 1 / math.sqrt(self.head_dim)
        if window < 0 or softcap < 0:
            raise UsageError(f"window and softcap are 0 or more, not {window} and {softcap}")
        if query.shape[1] == 1 and not softcap and self._by_cuda(query):
            try:
                return self._attend_by_cuda(layer, rows, query, scale, window)
            except BuildError as error:
                dispatch.say_once(f"the CUDA kernel cannot be loaded ({error}); torch attends")
        query = self._floats(query)
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
            integer,
            self._isa,
            self._threads,
        )

    def _by_cuda(self, query: Tensor) -> bool:
        group = query.shape[2] // self.kv_heads
        taken = cuda.takes(self.form, self.head_dim, group, query.dtype)
        machine = dispatch.machine(self.device)
        return dispatch.choose_attention(taken, machine) == dispatch.ATTENTION

    def _attend_by_cuda(
        self, layer: int, rows: Tensor, query: Tensor, scale: float, window: int
    ) -> Tensor:
        """Of one token of each sequence: all of them at once, or one after the other some of them,
        so that no cache is copied. Raises BuildError when the kernel cannot be had."""
        runner = launch.runner(self.device, emulated=dispatch.forced() == "emulator")
        numbers = rows.tolist()
        together = numbers == list(range(self.batch))
        pieces = [(0, numbers)] if together else [(at, [row]) for at, row in enumerate(numbers)]
        outputs = []
        for at, piece in pieces:
            own = slice(piece[0], piece[-1] + 1)
            outputs.append(
                cuda.attend(
                    runner,
                    query[at : at + len(piece), 0].to(self.device),
                    self._keys[layer, own],
                    self._values[layer, own],
                    self.form,
                    self.lengths[layer, own].tolist(),
                    scale,
                    window,
                )
            )
        return torch.cat(outputs)[:, None]

    def _floats(self, x: Tensor) -> Tensor:
        return x.detach().to(device=self.device, dtype=torch.float32).contiguous()

    def dequantize(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence as attention sees them: float32 [length, kv_heads, d]."""
        self._rows(layer, [sequence])
        length = int(self.lengths[layer, sequence])
        if self._library is not None:
            return self._library.dequantize(self._layers[layer], sequence, length, self._isa)
        blocks = -(-length // BLOCK)
        sides = (
            (self.form.key, self._keys, self._sink_keys, True),
            (self.form.value, self._values, self._sink_values, False),
        )
        keys, values = (
            kv_reference.dequantize(
                stored[layer, sequence, :, :blocks], side, is_key, self.head_dim
            )[:length]
            for side, stored, _, is_key in sides
        )
        for x, (side, _, sinks, is_key) in zip((keys, values), sides):
            kept = self._sinks_of(sinks[layer, sequence], side, is_key)[:length, :, : self.head_dim]
            if len(kept):
                x[: len(kept)] = _in_basis(kept, side)
        return keys, values

    def _sinks_of(self, stored: Tensor, side: SideFormat, is_key: bool) -> Tensor:
        """A view [sinks, kv_heads, padded columns] of sinks [kv_heads, floats] of a sequence; empty
        for a side of float32."""
        if side.bits == 32:
            return stored.new_empty(0, self.kv_heads, padded_columns(self.head_dim))
        shape = (padded_columns(self.head_dim), padded_columns(self.form.sinks))
        if is_key:
            return stored.unflatten(1, shape).permute(2, 0, 1)[: self.form.sinks]
        return stored.unflatten(1, shape[::-1]).transpose(0, 1)[: self.form.sinks]

    def reset(self) -> None:
        """Forget all sequences."""
        self.lengths.zero_()

    def reserve(self, capacity: int) -> None:
        """Have room for so many positions of each sequence; what is there stays."""
        if capacity <= self.capacity:
            return
        before, blocks = (self._keys, self._values), self.capacity // BLOCK
        self.capacity = -(-capacity // BLOCK) * BLOCK
        self._keys, self._values = map(self._allocate, (self.form.key, self.form.value))
        for stored, old in zip((self._keys, self._values), before, strict=True):
            stored[:, :, :, :blocks] = old
        self._layers = self._described()

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
        there = order.to(self.device)
        for stored in (self._keys, self._values):
            for layer in stored:
                layer[:, :, :blocks] = layer[there, :, :blocks]
        for sinks in (self._sink_keys, self._sink_values):
            sinks.copy_(sinks[:, there])
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
            (self.form.key, self._keys[layer], self._sink_keys[layer], keys, True),
            (self.form.value, self._values[layer], self._sink_values[layer], values, False),
        )
        for side, stored, sinks, new, is_key in sides:
            for row, first, tokens in zip(rows.tolist(), firsts.tolist(), new):
                kept = self._sinks_of(sinks[row], side, is_key)[first : first + len(tokens)]
                exact, others = tokens[: len(kept)], tokens[len(kept) :]
                if len(kept):
                    kept[..., : self.head_dim] = _in_basis(exact, side)
                if len(others):
                    first += len(kept)
                    kv_reference.store(stored[row], side, is_key, first, others)


def _in_basis(x: Tensor, side: SideFormat) -> Tensor:
    """Into the basis that a side is kept in, and out of it."""
    return kv_reference.rotate(x) if side.rotate else x
