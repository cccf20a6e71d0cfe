"""Keys or values of one layer, whose tokens are kept in several formats, in torch.

The cache of the compiled kernels (`kv_cache.py`) has one format for all positions. Here every token
goes to the pool of its kind (words, images read, images written), each with a format of its own,
and which token lies where is kept once for all layers (`TokenIndex`). Tokens are packed one by
one: codes, then a meta word per group, as many bytes as `SideFormat.bytes_per_position` says;
or codes alone, where scales are known beforehand (`kv_static.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlib.errors import DataError
from quantlib.kernels.kv_format import SideFormat, padded_columns
from quantlib.kernels.kv_reference import numbers, rotate, round_to_codes
from quantlib.kernels.kv_static import check_meta, static_codes

_ROOM = 64
"""Tokens that a pool has room for at least; it doubles when it is full."""


class TokenPool:
    """Tokens of one format.

    meta: int32 [places, kv_heads, groups], scales known beforehand; None: each token has its own.
          Raises FormatError when they do not fit.
    """

    def __init__(
        self, form: SideFormat, kv_heads: int, head_dim: int, meta: Tensor | None = None
    ) -> None:
        self.form, self.head_dim, self.meta = form, head_dim, meta
        self.count = 0
        self.bytes_per_token = kv_heads * form.bytes_per_position(head_dim)
        if meta is not None:
            check_meta(meta, form, head_dim, kv_heads)
            self.bytes_per_token -= 4 * kv_heads * len(form.groups(head_dim))
        self._stored = torch.empty(0, kv_heads, self.bytes_per_token // kv_heads, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Of the tokens that are there."""
        return self.count * self.bytes_per_token

    def append(self, x: Tensor, places: Tensor) -> None:
        """Store tokens [n, kv_heads, head_dim]; places int64 [n] are theirs in an image."""
        packed = self._packed(x.detach().float(), places)
        room = len(self._stored)
        if self.count + len(x) > room:
            more = max(self.count + len(x), 2 * room, _ROOM) - room
            empty = packed.new_empty(more, *packed.shape[1:])
            self._stored = torch.cat((self._stored.to(packed.device), empty))
        self._stored[self.count : self.count + len(x)] = packed
        self.count += len(x)

    def read(self, places: Tensor) -> Tensor:
        """All tokens, float32 [count, kv_heads, head_dim]; places int64 [count]."""
        stored = self._stored[: self.count]
        if self.form.bits == 32:
            return stored.contiguous().view(torch.float32)[..., : self.head_dim]
        codes, end = [], 0
        for group in self.form.groups(self.head_dim):
            start, end = end, end + group.columns * group.bits // 8
            part = stored[..., start:end]
            codes.append(part if group.bits == 8 else torch.cat((part & 15, part >> 4), -1))
        if self.meta is None:
            meta = stored[..., end:].contiguous().view(torch.int32)
        else:
            meta = self._static(places)
        found = numbers(torch.cat(codes, -1), meta, self.form, self.head_dim)
        return rotate(found) if self.form.rotate else found

    def clear(self) -> None:
        """Forget all tokens."""
        self.count = 0

    def _packed(self, x: Tensor, places: Tensor) -> Tensor:
        """uint8 [n, kv_heads, bytes]."""
        if self.form.bits == 32:
            pad = padded_columns(self.head_dim) - self.head_dim
            return torch.nn.functional.pad(x, (0, pad)).contiguous().view(torch.uint8)
        if self.meta is None:
            codes, meta = round_to_codes(x, self.form)
        else:
            codes = static_codes(x, self._static(places), self.form)
        parts = []
        for group in self.form.groups(self.head_dim):
            part = codes[..., group.columns_slice]
            low, high = part.chunk(2, -1)
            parts.append(part if group.bits == 8 else low | high << 4)
        if self.meta is None:
            parts.append(meta.contiguous().view(torch.uint8))
        return torch.cat(parts, -1)

    def _static(self, places: Tensor) -> Tensor:
        """The meta words of places; an image behind an image begins anew."""
        assert self.meta is not None
        self.meta = self.meta.to(places.device)
        return self.meta[places % len(self.meta)]


class TokenIndex:
    """Which pool, and which slot of it, every token of every sequence is in; for all layers.

    Tokens of a kind go to the pool of that kind, but for the first `exact[kind]` positions of a
    sequence, which go to one more pool, the last.
    pool, slot: int64 [batch, length].
    places:     by pool, int64 [count]: of each of its tokens, how many of its kind stand right
                before it.
    """

    def __init__(self, exact: Sequence[int]) -> None:
        self.exact = tuple(exact)
        self.clear()

    @property
    def length(self) -> int:
        """Positions of every sequence."""
        return self.pool.shape[1]

    def clear(self) -> None:
        """Forget all tokens."""
        empty = torch.empty(0, 0, dtype=torch.int64)
        self.pool, self.slot, self._kind, self._begin = empty, empty, empty, empty
        self.places = [empty.flatten() for _ in range(len(self.exact) + 1)]

    def extend(self, kinds: Tensor) -> None:
        """Tokens of these kinds [batch, T] come next. Raises DataError for another batch."""
        if self.length and len(kinds) != len(self.pool):
            raise DataError(
                f"a KV cache of {len(self.pool)} sequences is given tokens of {len(kinds)}"
            )
        rows, count = kinds.shape
        at = torch.arange(self.length, self.length + count, device=kinds.device).expand(rows, -1)
        before = torch.cat((self._last(kinds)[0], kinds[:, :-1]), 1)
        begins = torch.where(kinds != before, at, -1)
        begin = torch.cat((self._last(kinds)[1], begins), 1).cummax(1).values[:, 1:]
        limits = torch.tensor(self.exact, device=kinds.device)[kinds]
        pool = torch.where(at < limits, len(self.exact), kinds)
        slot = torch.zeros_like(pool)
        for number, known in enumerate(self.places):
            mine = pool == number
            new = (at - begin)[mine]
            slot[mine] = len(known) + torch.arange(len(new), device=kinds.device)
            self.places[number] = torch.cat((known.to(new.device), new))
        self._kind, self._begin = kinds[:, -1:], begin[:, -1:]
        first = not self.length
        self.pool = pool if first else torch.cat((self.pool, pool), 1)
        self.slot = slot if first else torch.cat((self.slot, slot), 1)

    def select(self, rows: Tensor) -> None:
        """Give each sequence i what sequence rows[i] has. Tokens stay where they are: what comes
        next is stored anew for each."""
        chosen = rows.to(self.pool.device)
        self.pool, self.slot = self.pool[chosen], self.slot[chosen]
        self._kind, self._begin = self._kind[chosen], self._begin[chosen]

    def _last(self, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """Kind of the last token of each sequence, and where its run begins; [batch, 1]."""
        if self.length:
            return self._kind, self._begin
        return torch.full_like(kinds[:, :1], -1), torch.full_like(kinds[:, :1], -1)


class SideSpans:
    """Keys, or values, of one layer."""

    def __init__(
        self,
        forms: Sequence[SideFormat],
        kv_heads: int,
        head_dim: int,
        metas: Sequence[Tensor | None],
    ) -> None:
        """forms, metas: by kind. Raises FormatError when heads cannot be kept so."""
        for form in forms:
            form.check(head_dim)
        self._head = (kv_heads, head_dim)
        pools = zip((*forms, SideFormat(32)), (*metas, None), strict=True)
        self.pools = [TokenPool(form, kv_heads, head_dim, meta) for form, meta in pools]

    def append(self, x: Tensor, index: TokenIndex) -> None:
        """Store the last T tokens of an index: x [batch, kv_heads, T, head_dim]."""
        tokens = x.transpose(1, 2)
        pool = index.pool[:, index.length - x.shape[2] :]
        for number, kept in enumerate(self.pools):
            mine = tokens[pool == number]
            if len(mine):
                kept.append(mine, index.places[number][kept.count : kept.count + len(mine)])

    def read(self, index: TokenIndex, dtype: torch.dtype) -> Tensor:
        """All tokens [batch, kv_heads, length, head_dim], as the formats give them back."""
        shape = (*index.pool.shape, *self._head)
        found = torch.empty(shape, dtype=dtype, device=index.pool.device)
        for number, kept in enumerate(self.pools):
            mine = index.pool == number
            if bool(mine.any()):
                places = index.places[number][: kept.count]
                found[mine] = kept.read(places)[index.slot[mine]].to(dtype)
        return found.transpose(1, 2)
