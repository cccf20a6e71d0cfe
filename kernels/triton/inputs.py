"""Rotation and rounding of inputs by Triton's kernels, called with torch tensors.

As in `launch.py`, the interpreter gets no bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.activation import ActivationFormat, ActivationSegment, scale_columns
from quantlib.kernels.cpu.forms import BlockRotation
from quantlib.kernels.triton.launch import interpreted, on

_LARGEST_BLOCK = 1 << 14
"""Numbers that one program rotates or rounds at once."""
_FOUR_WARPS = 1 << 12
_DENSE_ROWS = 64
"""The largest dense part of a rotation that is multiplied in registers."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """A rotation as the kernel has it: of blocks of `len(dense) * power` columns.

    dense:  float32 [m, m] on the device of the inputs; None: 1.
    power:  the order of Sylvester's matrix.
    factor: of the result; 1 / sqrt(size) for Hadamard matrices.
    still:  how many columns, the last ones, stay as they are.

    Without a dense part, blocks that do not divide the columns are followed by one over the last.
    """

    dense: Tensor | None
    power: int
    factor: float
    still: int = 0

    @property
    def dense_rows(self) -> int:
        """Rows of the dense part; 0 without one."""
        return 0 if self.dense is None else len(self.dense)

    @property
    def size(self) -> int:
        """Columns of a block."""
        return self.power * max(1, self.dense_rows)

    @property
    def fits(self) -> bool:
        """Whether one program holds a block."""
        return self.dense_rows <= _DENSE_ROWS and self.size <= _LARGEST_BLOCK

    def covers(self, columns: int) -> bool:
        """Whether blocks of this size rotate so many columns."""
        return columns % self.size == 0 or (self.dense is None and columns > self.size)


Rotation = BlockRotation | Blocks


def can_quantize(activations: Sequence[ActivationSegment]) -> bool:
    """Whether `quantize` rounds these: integers, with no scale for more columns than one program
    holds."""
    return all(
        part.format.is_integer and (part.format.group or part.length) <= _LARGEST_BLOCK
        for part in activations
    )


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x [M, K] with its columns, but the last `rotation.still`, rotated in blocks: in x's dtype,
    computed in float32. Raises FormatError when the blocks do not fit, or their dense part is
    larger than 64."""
    blocks = _blocks(rotation, x.device)
    out, rotated = _rotated_columns(x, blocks)
    whole = rotated // blocks.size * blocks.size
    _rotate_span(x, out, blocks, 0, whole)
    if whole < rotated:  # one more block, on what the others have made
        first = rotated - blocks.size
        out[:, whole:rotated] = x[:, whole:rotated]
        _rotate_span(out.clone(), out, blocks, first, blocks.size)
    out[:, rotated:] = x[:, rotated:]
    return out.to(x.dtype)


def quantize(
    x: Tensor,
    activations: Sequence[ActivationSegment],
    rotation: Rotation | None = None,
) -> tuple[Tensor, Tensor]:
    """x [M, K], rotated and rounded: int8 codes [M, K] and float32 scales [M, G], one for each of
    `formats.activation.scale_columns`. What `formats.activation.quantize` makes of x, bit for bit
    where it is not rotated.

    Where every scale lies in one block of the rotation this is one pass over memory. Raises
    FormatError when an activation is not an integer, or the rotation does not fit.
    """
    for part in activations:
        if not part.format.is_integer:
            raise FormatError(f"activations in {part.format} have no integer codes")
    x = x.float() if interpreted() and x.dtype == torch.bfloat16 else x
    x = x.contiguous()
    blocks = None if rotation is None else _blocks(rotation, x.device)
    if blocks is not None and not all(_fuses(part, blocks, x.shape[1]) for part in activations):
        # In float32: the rotated numbers are rounded once.
        x, blocks = rotate(x.float(), blocks), None
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = x.new_empty(len(x), len(scale_columns(activations)), dtype=torch.float32)
    first = 0
    for part in activations:
        turned = blocks if blocks and part.start < x.shape[1] - blocks.still else None
        _round_span(x, codes, scales, part, first, turned)
        first += len(scale_columns([part]))
    return codes, scales


def _fuses(part: ActivationSegment, blocks: Blocks, columns: int) -> bool:
    """Whether a segment's scales need no more than one block of the rotation at a time."""
    end, rotated = part.start + part.length, columns - blocks.still
    if part.start >= rotated:
        return True
    group = part.format.group or part.length
    power = group & (group - 1) == 0
    block = blocks.size
    fits = block % group == 0 and power if group < block else group == part.length == block
    return end <= rotated and part.start % block == 0 and part.length % block == 0 and fits


def _rotated_columns(x: Tensor, blocks: Blocks) -> tuple[Tensor, int]:
    """Room for the result, and how many columns are rotated."""
    rotated = x.shape[1] - blocks.still
    if rotated < 0 or not blocks.covers(rotated):
        raise FormatError(f"blocks of {blocks.size} do not divide {rotated} columns")
    if not blocks.fits:
        raise FormatError(
            f"a rotation of {blocks.size} columns with a dense part of {blocks.dense_rows} is too "
            "large for one program: rotate in torch"
        )
    dtype = torch.float32 if interpreted() and x.dtype == torch.bfloat16 else x.dtype
    return torch.empty(x.shape, dtype=dtype, device=x.device), rotated


def _rotate_span(x: Tensor, out: Tensor, blocks: Blocks, first: int, columns: int) -> None:
    x = x.float() if interpreted() and x.dtype == torch.bfloat16 else x
    _run_blocks(x.contiguous(), out, None, blocks, blocks.size, first, columns)


def _round_span(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    part: ActivationSegment,
    first_scale: int,
    blocks: Blocks | None,
) -> None:
    """One segment of activations, rotated or not."""
    group = part.format.group or part.length
    block = group if blocks is None else blocks.size
    if block > _LARGEST_BLOCK:
        raise FormatError(f"a scale of {block} columns is beyond one program: round in torch")
    rounding = (part.format, group, scales, first_scale)
    _run_blocks(x, codes, rounding, blocks, block, part.start, part.length)


def _run_blocks(
    x: Tensor,
    out: Tensor,
    rounding: tuple[ActivationFormat, int, Tensor, int] | None,
    rotated: Blocks | None,
    block: int,
    first: int,
    columns: int,
) -> None:
    from quantlib.kernels.triton import rotate as kernels

    if not len(x) or not columns:
        return
    blocks = rotated or Blocks(None, 1, 1.0)
    rows = max(16, _power(blocks.dense_rows)) if blocks.dense is not None else 1
    wide = _power(block) if rotated is None else blocks.power
    form, group, scales, first_scale = rounding or (ActivationFormat(8), block, x, 0)
    whole = group == block or rounding is None
    limit = (1 << form.bits - form.symmetric) - 1
    with on(x.device):
        kernels.rotate_and_round[(len(x), -(-columns // block))](
            x,
            x if blocks.dense is None else blocks.dense,
            out,
            scales,
            x.stride(0),
            out.stride(0),
            scales.stride(0),
            first,
            first_scale,
            block,
            columns,
            blocks.dense_rows,
            blocks.factor,
            form.clip,
            DENSE=blocks.dense is not None,
            ROWS=rows,
            POWER=wide,
            LEVELS=blocks.power.bit_length() - 1,
            ROUND=0 if rounding is None else 1 if form.symmetric else 2,
            LIMIT=float(limit),
            GROUP=rows * wide if whole else group,
            num_warps=warps(rows, wide),
            enable_fp_fusion=False,
        )


def warps(rows: int, power: int) -> int:
    """Of a program of so many numbers. A dense part (more than one row) is multiplied in registers,
    which few warps have too few of."""
    large = rows * power > _FOUR_WARPS
    return 4 << (rows > 1) << large


def _blocks(rotation: Rotation, device: torch.device) -> Blocks:
    return rotation if isinstance(rotation, Blocks) else _made(rotation, device)


@lru_cache(maxsize=64)
def _made(rotation: BlockRotation, device: torch.device) -> Blocks:
    dense, power = rotation.parts()
    if dense is not None and len(dense) > _DENSE_ROWS and rotation.dense is not None:
        # A short Sylvester part was multiplied into it: for processors, not for this kernel.
        dense, power = rotation.dense.float().contiguous(), rotation.size // len(rotation.dense)
    there = None if dense is None else dense.to(device)
    return Blocks(there, power, 1 / math.sqrt(rotation.size), rotation.still)


def _power(size: int) -> int:
    """The least power of two that is not below."""
    return 1 << (size - 1).bit_length()
