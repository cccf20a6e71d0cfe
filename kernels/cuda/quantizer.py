"""The fused quantizer from outside: tokens rotated, rounded and laid out for kernel (b) at once.

`src/rotate_quantize.cu` says what it computes; `reference` computes the same in torch, where sums
of a dense part are made in another order. A `Turn` is the rotation: blocks of `order` columns with
a Sylvester matrix, with a dense matrix of up to 64 rows, or with their Kronecker product, dense
part first, as `transforms/hadamard.py` has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.activation import ActivationSegment
from quantlib.kernels.cuda import tokens
from quantlib.kernels.cuda.decode import RESERVED_SHARED, SHARED_KB
from quantlib.kernels.cuda.segmented import MOST_SEGMENTS, GemmCase, Layout, Tokens

SOURCE = Path(__file__).with_name("src") / "rotate_quantize.cu"
NAME = "rotate_quantize"
THREADS = 256
MOST_DENSE = 64
_LANES = 32


@dataclass(frozen=True, eq=False)
class Turn:
    """A rotation of blocks of `len(dense) * sylvester` columns.

    dense: float32 [m, m], m <= 64, or None: only Sylvester's matrix, a power of two. factor: what
    comes out is multiplied by it, 1 / sqrt(order) for Hadamard matrices. Without a dense part,
    blocks that do not divide the columns are followed by one over the last columns.
    """

    sylvester: int
    dense: Tensor | None
    factor: float

    @property
    def order(self) -> int:
        """Columns of a block."""
        return self.sylvester * (1 if self.dense is None else len(self.dense))


NO_TURN = Turn(1, None, 1.0)


def hadamard(dense: Tensor | None, sylvester: int) -> Turn:
    """The orthonormal Hadamard matrix whose dense part has these signs."""
    order = sylvester * (1 if dense is None else len(dense))
    matrix = None if dense is None else dense.to(torch.float32).contiguous()
    return Turn(sylvester, matrix, 1 / math.sqrt(order))


def check(turn: Turn, columns: int) -> None:
    """Raise FormatError for a rotation that the kernel does not do on so many columns."""
    rows = 1 if turn.dense is None else len(turn.dense)
    if turn.sylvester & (turn.sylvester - 1) or turn.sylvester < 1 or rows > MOST_DENSE:
        raise FormatError(
            f"the quantizer rotates by a power of two times a matrix of at most {MOST_DENSE} rows, "
            f"not {turn.sylvester} times {rows}: rotate before it"
        )
    left = columns % turn.order
    if columns < turn.order or (left and (rows > 1 or turn.order % _LANES or columns % _LANES)):
        raise FormatError(
            f"blocks of {turn.order} do not rotate {columns} columns here: choose a divisor"
        )


def macros(
    layout: Layout, dtype: torch.dtype, turn: Turn = NO_TURN, ordered: bool = False
) -> dict[str, int]:
    """What the kernel is compiled for: names and values, without the prefix -D."""
    check(turn, layout.columns)
    found = GemmCase(layout.cases, dtype, 1).macros()
    del found["QL_TOKEN_TILES"], found["QL_STAGES"]
    found |= {
        "QL_DENSE": 1 if turn.dense is None else len(turn.dense),
        "QL_SYLVESTER": turn.sylvester,
        "QL_ORDER": int(ordered),
    }
    for index in range(MOST_SEGMENTS):
        part = layout.segments[index] if index < len(layout.segments) else None
        group = (part.activation.group or part.length) if part else 1
        if part and group % _LANES and group < part.length:
            raise FormatError(f"inputs in groups of {group}: the quantizer takes multiples of 32")
        found[f"QL_START_{index}"] = part.start if part else 0
        found[f"QL_LENGTH_{index}"] = part.length if part else 0
        found[f"QL_BITS_{index}"] = part.activation.bits if part else 8
        found[f"QL_ASYMMETRIC_{index}"] = int(part is not None and not part.activation.symmetric)
        found[f"QL_GROUP_{index}"] = group
    return found


def shared_bytes(layout: Layout) -> int:
    """Of a block: a token in float32, and a scale and a zero point of each group."""
    groups = sum(
        -(-part.length // (part.activation.group or part.length)) for part in layout.segments
    )
    return -(-layout.columns // _LANES) * _LANES * 4 + groups * 8


def takes(layout: Layout, activations: Sequence[ActivationSegment], architecture: int) -> bool:
    """Whether the kernel rounds inputs like this, unrotated: in the weight's own segments, groups
    of 32 columns and their multiples, and tokens that fit a block's shared memory."""
    own = sorted((part.start, part.length, part.activation) for part in layout.segments)
    same = own == [(part.start, part.length, part.format) for part in activations]
    grouped = all(
        part.activation.group % _LANES == 0 or part.activation.group >= part.length
        for part in layout.segments
    )
    room = SHARED_KB[architecture] * 1024 - RESERVED_SHARED
    return same and grouped and shared_bytes(layout) <= room


def empty(layout: Layout, count: int, device: torch.device | None = None) -> Tokens:
    """Memory for the quantizer to fill, on the device (None: main memory)."""
    padded = -(-count // tokens.PADDING) * tokens.PADDING
    shape = layout.spans, layout.token_planes, padded
    codes = torch.empty(count, layout.token_bytes, dtype=torch.uint8, device=device)
    return Tokens(count, codes, torch.zeros(shape, dtype=torch.int32, device=device))


def arguments(
    inputs: Tensor,
    layout: Layout,
    output: Tokens,
    turn: Turn = NO_TURN,
    order: Tensor | None = None,
) -> list[Tensor | int | float | None]:
    """The kernel's arguments, in order. inputs [M, K], float16 or bfloat16, in rows with any
    stride; order int32 [K]."""
    if inputs.shape[1] != layout.columns or inputs.stride(1) != 1:
        raise FormatError(f"inputs are [M, {layout.columns}] in rows, not {list(inputs.shape)}")
    clips = [part.activation.clip for part in layout.segments]
    return [
        inputs,
        turn.dense,
        order,
        output.codes,
        output.meta,
        len(inputs),
        layout.columns,
        inputs.stride(0),
        output.meta.shape[-1],
        float(torch.tensor(turn.factor, dtype=torch.float32)),
        *clips,
        *[1.0] * (MOST_SEGMENTS - len(clips)),
    ]


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """x [M, K] rotated, float32: additions in the kernel's order, dense parts as products."""
    x = x.to(torch.float32)
    if turn.order == 1:
        return x
    whole = x.shape[1] // turn.order * turn.order
    turned = torch.cat([_blocks(x[:, :whole], turn), x[:, whole:]], 1)
    if whole == x.shape[1]:
        return turned
    before, last = turned.split([x.shape[1] - turn.order, turn.order], 1)
    return torch.cat([before, _blocks(last, turn)], 1)


def _blocks(x: Tensor, turn: Turn) -> Tensor:
    distance, shape = 1, x.shape
    while distance < turn.sylvester:
        a, b = x.reshape(len(x), -1, 2, distance).unbind(2)
        x = torch.stack([a + b, a - b], 2).reshape(shape)
        distance *= 2
    if turn.dense is not None:
        x = turn.dense.T @ x.reshape(len(x), -1, len(turn.dense), turn.sylvester)
    return (x * torch.tensor(turn.factor, dtype=torch.float32)).reshape(shape)


def reference(
    inputs: Tensor,
    layout: Layout,
    activations: Sequence[ActivationSegment],
    turn: Turn = NO_TURN,
    order: Tensor | None = None,
) -> Tokens:
    """What the kernel makes of inputs, in torch."""
    turned = rotate(inputs, turn)
    return tokens.pack(turned if order is None else turned[:, order.long()], layout, activations)
