"""Weights stored as several packed matrices, and one set of functions for them and all others.

A weight [N, K] with factors is its rounded rest and the product of two matrices:

    X.weight_packed ...        the rest [N, K], as if it were alone
    X.weight_down_packed ...   [rank, K], what the input is multiplied by first
    X.weight_up_packed ...     [N, rank], and then

or those two alone. The first of a convolution's may itself be vectors, of the channels and of every
axis of the window, whose product its rows are:

    X.weight_down_packed ...   [rank, channels]
    X.weight_span0_packed ...  [rank, size of the window's first axis], and so on

An embedding [V, D] in blocks of rows is a matrix for each block, of the block's tokens in their own
order, and a basis for blocks with fewer dimensions:

    X.weight_rows0_packed ...  [rows of block 0, its width]
    X.weight_basis0_packed ... [D, width]; absent where the width is D
    X.weight_block             uint8 [ceil(V * bits / 8)], the block of every token, in 1 or 2 bits;
                               absent for a single block

A row of a block with a basis is (row of its matrix) times (the basis transposed). All matrices are
`QuantizedWeight`s; nothing here is rounded. For any other scheme these functions are those of
`weight.py`, so whoever measures, stores or reads a weight asks here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.packing import pack_bits, packed_bytes, unpack_bits
from quantlib.formats.scheme import Scheme
from quantlib.formats.several import FACTORS, row_counts
from quantlib.formats.weight import (
    QuantizedWeight,
    TensorLayout,
    dequantize,
    pack,
    packed_layout,
    unpack,
)
from quantlib.formats.weight_format import Segment

DOWN, UP, SPAN = "_down", "_up", "_span"
ROWS, BASIS, BLOCK = "_rows", "_basis", "_block"
"""What is added to a weight's name for its matrices (SPAN, ROWS and BASIS take a number), and for
the blocks of its rows."""

_BASIS_FORMAT = "w8"
_SPAN_FORMAT = "w8"


@dataclass(frozen=True)
class Part:
    """One matrix of a weight: its shape, and its K segments."""

    shape: tuple[int, int]
    segments: tuple[Segment, ...]

    @staticmethod
    def of(shape: tuple[int, int], scheme: str | Scheme) -> Part:
        parsed = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
        return Part(shape, parsed.segments(shape[1]))


@dataclass(frozen=True, eq=False)
class CompositeWeight:
    """A weight [N, K] as the matrices that `parts_of` names, and the block of each row.

    block: uint8 [N], for weights with several blocks of rows.
    """

    scheme: Scheme
    shape: tuple[int, int]
    parts: dict[str, QuantizedWeight]
    block: Tensor | None = None

    def __post_init__(self) -> None:
        expected = parts_of(self.scheme, self.shape)
        found = {
            name: Part(weight.shape, tuple(part.segment for part in weight.segments))
            for name, weight in self.parts.items()
        }
        if found != expected:
            named = ", ".join(f"{n or 'rest'} {list(p.shape)}" for n, p in expected.items())
            raise FormatError(
                f"a weight {list(self.shape)} in {self.scheme} has the matrices {named}, and not "
                "these"
            )
        several = len(self.scheme.rows) > 1
        if several != (self.block is not None):
            raise FormatError(f"{self.scheme}: rows in several blocks, and they alone, name theirs")
        if self.block is not None:
            _check_block(self.block, self.scheme, self.shape[0])


StoredWeight = QuantizedWeight | CompositeWeight
"""A weight in any scheme that is not kept."""


def parts_of(scheme: Scheme, shape: Sequence[int]) -> dict[str, Part]:
    """The matrices that a weight [N, K] in a scheme consists of, by what is added to its name ("":
    nothing).

    Raises FormatError where the shape has no room for so many factors, dimensions or blocks.
    """
    rows, columns = shape
    if scheme.rows:
        return _row_parts(scheme, rows, columns)
    low_rank, parts = scheme.low_rank, {}
    if low_rank is None or not low_rank.alone:
        parts[""] = Part.of((rows, columns), scheme.rest)
    if low_rank is not None:
        rank, factor = low_rank.rank, FACTORS[low_rank.bits]
        if rank >= min(rows, columns):
            raise FormatError(f"{scheme}: a weight {list(shape)} has no {rank} directions to spare")
        channels, rest = divmod(columns, math.prod(low_rank.window))
        if rest:
            raise FormatError(f"{scheme}: {columns} columns are no channels times this window")
        parts[DOWN] = Part.of((rank, channels), factor)
        for axis, size in enumerate(low_rank.window):
            parts[f"{SPAN}{axis}"] = Part.of((rank, size), _SPAN_FORMAT)
        parts[UP] = Part.of((rows, rank), factor)
    return parts


def _row_parts(scheme: Scheme, rows: int, columns: int) -> dict[str, Part]:
    parts = {}
    for index, (block, count) in enumerate(
        zip(scheme.rows, row_counts(scheme.rows, rows), strict=True)
    ):
        width = block.width or columns
        if width > columns or (block.width and width == columns):
            raise FormatError(f"{scheme}: {width} of {columns} dimensions is no smaller width")
        parts[f"{ROWS}{index}"] = Part.of((count, width), Scheme(block.format))
        if block.width:
            parts[f"{BASIS}{index}"] = Part.of((columns, width), _BASIS_FORMAT)
    return parts


def first_factor(dense: Mapping[str, Tensor]) -> Tensor:
    """[rank, K]: what the input of a weight is multiplied by first, from its matrices by what is
    added to its name."""
    found = dense[DOWN]
    for axis in range(sum(name.startswith(SPAN) for name in dense)):
        found = (found[:, :, None] * dense[f"{SPAN}{axis}"][:, None]).flatten(1)
    return found


def has_room(scheme: Scheme, shape: Sequence[int], window: Sequence[int] = ()) -> bool:
    """Whether a weight [N, K] can be stored in a scheme: any can, in one that is one matrix.
    window: of a convolution's filters; empty for others."""
    canonical = scheme.low_rank.window if scheme.low_rank is not None else ()
    if canonical and canonical != tuple(window):
        return False
    if scheme.is_composite:
        try:
            parts_of(scheme, shape)
        except FormatError:
            return False
    return True


def stored_layout(shape: Sequence[int], scheme: Scheme) -> TensorLayout:
    """Suffix -> (dtype, shape) of every tensor of a weight [N, K] in a scheme that is not kept."""
    layout: TensorLayout = {}
    for name, part in parts_of(scheme, shape).items():
        found = packed_layout(part.shape, part.segments)
        layout |= {name + suffix: form for suffix, form in found.items()}
    block = block_layout(scheme, shape[0])
    return layout if block is None else layout | {BLOCK: block}


def block_layout(scheme: Scheme, rows: int) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """dtype and shape of the tensor that says in which block each row is; None: there is none."""
    if len(scheme.rows) < 2:
        return None
    return torch.uint8, (packed_bytes(rows, _block_bits(scheme)),)


def stored_bytes(shape: Sequence[int], scheme: Scheme) -> int:
    """Bytes of all these tensors."""
    layout = stored_layout(shape, scheme).values()
    return sum(dtype.itemsize * math.prod(size) for dtype, size in layout)


def pack_stored(weight: StoredWeight) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by suffix, as `stored_layout` describes them."""
    if isinstance(weight, QuantizedWeight):
        return pack(weight)
    tensors = {
        name + suffix: tensor
        for name, part in weight.parts.items()
        for suffix, tensor in pack(part).items()
    }
    if weight.block is not None:
        tensors[BLOCK] = pack_bits(weight.block[None], _block_bits(weight.scheme))[0]
    return tensors


def unpack_stored(
    tensors: Mapping[str, Tensor], shape: Sequence[int], scheme: Scheme
) -> StoredWeight:
    """The inverse of `pack_stored`, for tensors from a file: names, dtypes, shapes and values are
    checked. Raises FormatError."""
    rows, columns = shape
    if not scheme.is_composite:
        return unpack(tensors, shape, scheme.segments(columns))
    layout = stored_layout(shape, scheme)
    if set(tensors) != set(layout):
        missing, extra = sorted(set(layout) - set(tensors)), sorted(set(tensors) - set(layout))
        raise FormatError(
            f"packed tensors do not match {scheme}: missing {missing}, unexpected {extra}"
        )
    parts = {}
    for name, part in parts_of(scheme, shape).items():
        suffixes = packed_layout(part.shape, part.segments)
        own = {suffix: tensors[name + suffix] for suffix in suffixes}
        parts[name] = unpack(own, part.shape, part.segments)
    block = unpack_block(tensors[BLOCK], scheme, rows) if BLOCK in layout else None
    return CompositeWeight(scheme, (rows, columns), parts, block)


def unpack_block(packed: Tensor, scheme: Scheme, rows: int) -> Tensor:
    """The block of each row, uint8 [rows], from its tensor in a file. Raises FormatError when that
    is of another form, or damaged."""
    layout = block_layout(scheme, rows)
    if layout is None or packed.dtype != layout[0] or tuple(packed.shape) != layout[1]:
        raise FormatError(
            f"the blocks of {rows} rows in {scheme} are {packed.dtype} {list(packed.shape)}, "
            f"expected {layout}: the checkpoint is damaged; write it again"
        )
    block = unpack_bits(packed[None], _block_bits(scheme), rows)[0]
    _check_block(block, scheme, rows)
    return block


def dequantize_stored(weight: StoredWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, K]: the numbers that the weight stands for, computed in float32."""
    if isinstance(weight, QuantizedWeight):
        return dequantize(weight, dtype)
    dense = {name: dequantize(part) for name, part in weight.parts.items()}
    if weight.scheme.low_rank is not None:
        product = dense[UP] @ first_factor(dense)
        return (product if weight.scheme.low_rank.alone else product.add_(dense[""])).to(dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    for index, rows in enumerate(rows_of_blocks(weight.block, weight.shape[0])):
        values = dense[f"{ROWS}{index}"]
        basis = dense.get(f"{BASIS}{index}")
        out[rows] = (values if basis is None else values @ basis.T).to(dtype)
    return out


def rows_of_blocks(block: Tensor | None, count: int) -> list[Tensor]:
    """The rows of each block in the order in which its matrix has them: int64, ascending."""
    if block is None:
        return [torch.arange(count)]
    return [torch.nonzero(block == index)[:, 0] for index in range(int(block.max()) + 1)]


def _block_bits(scheme: Scheme) -> int:
    return (len(scheme.rows) - 1).bit_length()


def _check_block(block: Tensor, scheme: Scheme, count: int) -> None:
    """Raise FormatError unless every block has as many rows as its share says."""
    if block.dtype != torch.uint8 or tuple(block.shape) != (count,):
        raise FormatError(
            f"the blocks of {count} rows are uint8 [{count}], not {list(block.shape)}"
        )
    found = torch.bincount(block.long(), minlength=len(scheme.rows)).tolist()
    if found != row_counts(scheme.rows, count):
        raise FormatError(
            f"the blocks of rows in {scheme} have {found} rows, expected "
            f"{row_counts(scheme.rows, count)}: the checkpoint is damaged; write it again"
        )
