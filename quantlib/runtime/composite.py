"""Modules on weights that are several matrices (`formats.composite`).

`FactoredLinear` multiplies its input with the rest and with the two factors, each on its own packed
weight: two small products more. `BlockedLinear` has one product for each block of its rows, and
puts what they give in the rows' order. `BlockedEmbedding` looks a token up in the block it is in,
and is the head's weight too, where that is tied. Nothing dense is kept, but for the place of every
row (int32 [N]).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantlib.errors import FormatError
from quantlib.formats.composite import (
    BASIS,
    BLOCK,
    DOWN,
    ROWS,
    SPAN,
    UP,
    block_layout,
    first_factor,
    parts_of,
    rows_of_blocks,
    unpack_block,
)
from quantlib.formats.scheme import Scheme
from quantlib.kernels.ops import embedding
from quantlib.models.window import Window, from_rows, to_rows
from quantlib.runtime.convolution import PackedConvolution, QuantizedConvolution
from quantlib.runtime.modules import PackedEmbedding, PackedLinear, QuantizedLinear
from quantlib.runtime.packed_module import SCHEME, PackedModule, multiply


class _WithFactors(PackedModule):
    """A module whose weight "weight" is a rest and two factors."""

    scheme: Scheme
    _size: tuple[int, int]

    def register_factors(
        self, scheme: Scheme, shape: tuple[int, int], device: torch.device | str | None
    ) -> None:
        """Add the factors of a weight whose rest is there already."""
        self.scheme, self._size = scheme, shape
        for name, part in parts_of(scheme, shape).items():
            if name:
                self.register_packed("weight" + name, part.shape, part.segments, device)

    def beside(self, x: Tensor, mode: str, rounding: str) -> Tensor:
        """What the factors add: x [..., K], in the order of the packed columns, times both."""
        down, up = (self.handles("weight" + name)[0] for name in (DOWN, UP))
        return multiply(multiply(x, down, None, mode, rounding), up, None, "exact", "")

    def dequantize(self, name: str = "weight", dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight: of "weight", the rest and the factors together."""
        if name != "weight":
            return super().dequantize(name, dtype)
        product = self._matrix("weight" + UP) @ self._first_factor()
        if "weight" not in self.packed_weights():
            return product.to(dtype)
        order = self.order("weight")
        if order is not None:
            product = product.index_select(1, torch.argsort(order))
        return (super().dequantize() + product).to(dtype)

    def _matrix(self, name: str) -> Tensor:
        """One of the packed matrices, dense."""
        return super().dequantize(name)

    def _first_factor(self) -> Tensor:
        """float32 [rank, K], made anew."""
        names = [name for name in parts_of(self.scheme, self._size) if name not in ("", UP)]
        return first_factor({name: self._matrix("weight" + name) for name in names})

    def composites(self) -> dict[str, tuple[Scheme, tuple[int, ...]]]:
        return {"weight": (self.scheme, self._size)}


class FactoredLinear(_WithFactors, QuantizedLinear):
    """`nn.Linear` on a weight in a scheme with factors. They read the same rounded inputs as the
    rest; what is between them is not rounded."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: nn.Parameter | None = None,
        mode: str = SCHEME,
        device: torch.device | str | None = None,
    ) -> None:
        rest = scheme.rest.segments(in_features)
        super().__init__(in_features, out_features, rest, bias, mode, device)
        self.register_factors(scheme, (out_features, in_features), device)

    def forward(self, x: Tensor) -> Tensor:
        order, rounding = self.order("weight"), self.rounding("weight")
        x = x if order is None else x.index_select(-1, order)
        rest = multiply(x, self.handles("weight")[0], self.bias, self.mode, rounding)
        return rest + self.beside(x, self.mode, rounding)


class FactoredConvolution(_WithFactors, QuantizedConvolution):
    """A convolution on a weight in a scheme with factors: one dense filter made of all three
    matrices, or three products with the unfolded input, whichever needs less memory."""

    def __init__(
        self,
        filters: int,
        window: Window,
        scheme: Scheme,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(filters, window, scheme.rest.segments(window.columns), bias, dtype, device)
        self.register_factors(scheme, (filters, window.columns), device)

    def _product(self, rows: Tensor) -> Tensor:
        return super()._product(rows) + self.beside(rows, "exact", "")


class ThinConvolution(_WithFactors, PackedConvolution):
    """A convolution on two factors alone: one with `rank` filters, and the product of what they
    give with the second factor. The filters are those of the first factor, made dense where there
    are more places than filters, as in `QuantizedConvolution`."""

    def __init__(
        self,
        filters: int,
        window: Window,
        scheme: Scheme,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(filters, window, bias, dtype)
        self.register_factors(scheme, (filters, window.columns), device)

    def forward(self, x: Tensor) -> Tensor:
        window, up = self.window, self.handles("weight" + UP)[0]
        entered = window.batched(x)
        places = window.places(entered)
        inner = to_rows(self._filtered(entered, len(entered) * math.prod(places)))
        y = from_rows(multiply(inner, up, self.bias, "exact", ""), len(entered), places)
        return y if entered is x else y[0]

    def _filtered(self, x: Tensor, count: int) -> Tensor:
        """What the first factor makes of x [batch, channels, *size], at `count` places in all:
        [batch, rank, *places]."""
        window, down = self.window, self.handles("weight" + DOWN)[0]
        rank = down.shape[0]
        if rank > count:
            rows = multiply(window.rows(x), down, None, "exact", "")
            return from_rows(rows, len(x), window.places(x))
        dense = super().dequantize("weight" + DOWN).to(x.dtype)
        return window.dense(x, dense.view(rank, window.channels, *window.size), None)


class CanonicalConvolution(_WithFactors, PackedConvolution):
    """A convolution on canonical factors: the product of every place's channels with the first, the
    window's vectors over each of the `rank` results by itself, and the product with the last. Its
    filters are never made."""

    def __init__(
        self,
        filters: int,
        window: Window,
        scheme: Scheme,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(filters, window, bias, dtype)
        if scheme.low_rank is None or scheme.low_rank.window != window.size:
            raise FormatError(f"{scheme} is for another window than {list(window.size)}")
        self.register_factors(scheme, (filters, window.columns), device)

    def forward(self, x: Tensor) -> Tensor:
        window, entered = self.window, self.window.batched(x)
        down, up = (self.handles("weight" + name)[0] for name in (DOWN, UP))
        inner = multiply(to_rows(entered), down, None, "exact", "")
        inner = from_rows(inner, len(entered), tuple(entered.shape[2:]))
        inner = window.dense(inner, self._spans().to(x.dtype), None, groups=down.shape[0])
        y = multiply(to_rows(inner), up, self.bias, "exact", "")
        y = from_rows(y, len(entered), window.places(entered))
        return y if entered is x else y[0]

    def _spans(self) -> Tensor:
        """float32 [rank, 1, *window], made anew: it is small."""
        spans = {
            f"{SPAN}{i}": self._matrix(f"weight{SPAN}{i}") for i in range(len(self.kernel_size))
        }
        ones = torch.ones_like(spans[f"{SPAN}0"][:, :1])
        return first_factor({DOWN: ones, **spans}).view(-1, 1, *self.kernel_size)


class _InBlocks(PackedModule):
    """A module whose weight "weight" [N, D] is in blocks of rows."""

    scheme: Scheme
    _size: tuple[int, int]
    _places: tuple[Tensor, Tensor, Tensor] | None = None

    def register_blocks(
        self, scheme: Scheme, shape: tuple[int, int], device: torch.device | str | None
    ) -> None:
        """Add the matrices of all blocks, and which rows are in which."""
        self.scheme, self._size = scheme, shape
        for name, part in parts_of(scheme, shape).items():
            self.register_packed("weight" + name, part.shape, part.segments, device)
        layout = block_layout(scheme, shape[0])
        if layout is not None:
            stored = torch.empty(layout[1], dtype=layout[0], device=device)
            self.register_buffer("weight" + BLOCK, stored)

    def by_blocks(self, x: Tensor, bias: Tensor | None, mode: str) -> Tensor:
        """x [..., D] times the transposed weight, block by block and put in the rows' order, plus
        bias [N]."""
        parts = []
        for index in range(len(self.scheme.rows)):
            basis = self._basis(index)
            inner = x if basis is None else x @ basis.to(x.dtype)
            weight = self.handles(f"weight{ROWS}{index}")[0]
            parts.append(multiply(inner, weight, None, mode, ""))
        y = torch.cat(parts, dim=-1)
        if len(parts) > 1:
            y = y.index_select(-1, self._tables()[2])
        return y if bias is None else y + bias.to(y.dtype)

    def dequantize(self, name: str = "weight", dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, D]: of "weight", all blocks in the rows' order."""
        if name != "weight":
            return super().dequantize(name, dtype)
        with torch.no_grad():
            ids = torch.arange(self._size[0], device=self._device())
            block, row = self._block_of(ids)
            out = torch.empty(self._size, device=ids.device)
            for index in range(len(self.scheme.rows)):
                out[block == index] = self._lookup(index, row[block == index], torch.float32)
        return out.to(dtype)

    def composites(self) -> dict[str, tuple[Scheme, tuple[int, ...]]]:
        return {"weight": (self.scheme, self._size)}

    def packed_names(self) -> list[str]:
        own = ["weight" + BLOCK] if "weight" + BLOCK in self._buffers else []
        return super().packed_names() + own

    def packed_bytes(self) -> int:
        block = self._buffers.get("weight" + BLOCK)
        return super().packed_bytes() + (0 if block is None else block.nbytes)

    def _device(self) -> torch.device:
        return self.packed_device(f"weight{ROWS}0")

    def _lookup(self, index: int, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of one block, [n, D]."""
        values = embedding(rows, self.handles(f"weight{ROWS}{index}")[0], torch.float32)
        basis = self._basis(index)
        return (values if basis is None else values @ basis.T).to(dtype)

    def _basis(self, index: int) -> Tensor | None:
        """float32 [D, width], made anew: it is small beside the block's rows."""
        name = f"weight{BASIS}{index}"
        return super().dequantize(name) if self.scheme.rows[index].width else None

    def _block_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The block of each row, and its row there."""
        if len(self.scheme.rows) == 1:
            return torch.zeros_like(ids), ids
        block, row, _ = self._tables()
        return block[ids], row[ids].long()

    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every row: its block (uint8), its row there, and its place among the rows of all
        blocks one after the other (int32). Made at the first use."""
        if self._places is None:
            count, packed = self._size[0], self._buffers["weight" + BLOCK]
            assert packed is not None
            block = unpack_block(packed.cpu(), self.scheme, count)
            rows = rows_of_blocks(block, count)
            row = torch.empty(count, dtype=torch.int32)
            for own in rows:
                row[own] = torch.arange(len(own), dtype=torch.int32)
            place = torch.empty(count, dtype=torch.int32)
            place[torch.cat(rows)] = torch.arange(count, dtype=torch.int32)
            tables = block, row, place
            self._places = tuple(t.to(packed.device) for t in tables)  # type: ignore[assignment]
        assert self._places is not None
        return self._places

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        self._places = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self._places = None
        super()._load_from_state_dict(*args, **kwargs)


class BlockedLinear(_InBlocks, PackedLinear):
    """`nn.Linear` on a weight [out_features, in_features] in blocks of rows: one product for each
    block. Its inputs are not rounded."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: nn.Parameter | None = None,
        mode: str = SCHEME,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, mode)
        self.register_blocks(scheme, (out_features, in_features), device)

    def forward(self, x: Tensor) -> Tensor:
        return self.by_blocks(x, self.bias, self.mode)


class BlockedEmbedding(_InBlocks, PackedEmbedding):
    """`nn.Embedding` on a weight [num_embeddings, embedding_dim] in blocks of rows."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        embed_scale: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, embed_scale, dtype)
        self.register_blocks(scheme, (num_embeddings, embedding_dim), device)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        out = torch.empty(len(flat), self.embedding_dim, dtype=self.dtype, device=ids.device)
        block, row = self._block_of(flat)
        for index in range(len(self.scheme.rows)):
            mine = torch.nonzero(block == index)[:, 0]
            if len(mine):
                out[mine] = self._lookup(index, row[mine], self.dtype)
        return self.scaled(out).view(*ids.shape, self.embedding_dim)

    def project(self, x: Tensor, bias: Tensor | None, mode: str) -> Tensor:
        return self.by_blocks(x, bias, mode)
