"""Rotation and rounding of inputs by Triton's kernels, called with torch tensors.

As in `launch.py`, the interpreter gets no bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def can_quantize(activations: Sequence[ActivationSegment]) -> bool:
    """Whether `quantize` rounds these: integers, with no scale for more columns than one program
    holds."""
    return all(
        part.format.is_integer and (part.format.group or part.length) <= _LARGEST_BLOCK
        for part in activations
    )


def rotate(x: Tensor, rotation: BlockRotation) -> Tensor:
    """x [M, K] with its columns, but the last `rotation.still`, rotated in blocks: in x's dtype,
    computed in float32. Raises FormatError when the blocks do not fit, or their dense part is
    larger than 64."""
    out, rotated = _rotated_columns(x, rotation)
    whole = rotated // rotation.size * rotation.size
    _rotate_span(x, out, rotation, 0, whole)
    if whole < rotated:  # one more block, on what the others have made
        first = rotated - rotation.size
        out[:, whole:rotated] = x[:, whole:rotated]
        _rotate_span(out.clone(), out, rotation, first, rotation.size)
    out[:, rotated:] = x[:, rotated:]
    return out.to(x.dtype)


def quantize(
    x: Tensor,
    activations: Sequence[ActivationSegment],
    rotation: BlockRotation | None = None,
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
    if rotation is not None and not all(_fuses(part, rotation, x.shape[1]) for part in activations):
        # In float32: the rotated numbers are rounded once.
        x, rotation = rotate(x.float(), rotation), None
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = x.new_empty(len(x), len(scale_columns(activations)), dtype=torch.float32)
    first = 0
    for part in activations:
        turned = rotation if rotation and part.start < x.shape[1] - rotation.still else None
        _round_span(x, codes, scales, part, first, turned)
        first += len(scale_columns([part]))
    return codes, scales


def _fuses(part: ActivationSegment, rotation: BlockRotation, columns: int) -> bool:
    """Whether a segment's scales need no more than one block of the rotation at a time."""
    end, rotated = part.start + part.length, columns - rotation.still
    if part.start >= rotated:
        return True
    group = part.format.group or part.length
    power = group & (group - 1) == 0
    block = rotation.size
    fits = block % group == 0 and power if group < block else group == part.length == block
    return end <= rotated and part.start % block == 0 and part.length % block == 0 and fits


def _rotated_columns(x: Tensor, rotation: BlockRotation) -> tuple[Tensor, int]:
    """Room for the result, and how many columns are rotated."""
    rotated = x.shape[1] - rotation.still
    dense, _ = _parts(rotation, x.device)
    if rotated < 0 or not rotation.covers(rotated):
        raise FormatError(f"blocks of {rotation.size} do not divide {rotated} columns")
    rows = 1 if dense is None else len(dense)
    if rows > _DENSE_ROWS or rotation.size > _LARGEST_BLOCK:
        raise FormatError(
            f"a rotation of {rotation.size} columns with a dense part of {rows} is too large for "
            "one program: rotate in torch"
        )
    dtype = torch.float32 if interpreted() and x.dtype == torch.bfloat16 else x.dtype
    return torch.empty(x.shape, dtype=dtype, device=x.device), rotated


def _rotate_span(x: Tensor, out: Tensor, rotation: BlockRotation, first: int, columns: int) -> None:
    x = x.float() if interpreted() and x.dtype == torch.bfloat16 else x
    _run_blocks(x.contiguous(), out, None, rotation, rotation.size, first, columns)


def _round_span(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    part: ActivationSegment,
    first_scale: int,
    rotation: BlockRotation | None,
) -> None:
    """One segment of activations, rotated or not."""
    group = part.format.group or part.length
    block = group if rotation is None else rotation.size
    if block > _LARGEST_BLOCK:
        raise FormatError(f"a scale of {block} columns is beyond one program: round in torch")
    rounding = (part.format, group, scales, first_scale)
    _run_blocks(x, codes, rounding, rotation, block, part.start, part.length)


def _run_blocks(
    x: Tensor,
    out: Tensor,
    rounding: tuple[ActivationFormat, int, Tensor, int] | None,
    rotation: BlockRotation | None,
    block: int,
    first: int,
    columns: int,
) -> None:
    from quantlib.kernels.triton import rotate as kernels

    if not len(x) or not columns:
        return
    dense, power = (None, 1) if rotation is None else _parts(rotation, x.device)
    dense_rows = 0 if dense is None else len(dense)
    rows = max(16, _power(dense_rows)) if dense is not None else 1
    wide = power if rotation is not None else _power(block)
    form, group, scales, first_scale = rounding or (ActivationFormat(8), block, x, 0)
    whole = group == block or rounding is None
    limit = (1 << form.bits - form.symmetric) - 1
    with on(x.device):
        kernels.rotate_and_round[(len(x), -(-columns // block))](
            x,
            x if dense is None else dense,
            out,
            scales,
            x.stride(0),
            out.stride(0),
            scales.stride(0),
            first,
            first_scale,
            block,
            columns,
            dense_rows,
            1 / math.sqrt(block),
            form.clip,
            DENSE=dense is not None,
            ROWS=rows,
            POWER=wide,
            LEVELS=power.bit_length() - 1,
            ROUND=0 if rounding is None else 1 if form.symmetric else 2,
            LIMIT=float(limit),
            GROUP=rows * wide if whole else group,
            num_warps=warps(rows, wide),
            enable_fp_fusion=False,
        )


def warps(rows: int, power: int) -> int:
    """Of a program of so many numbers. A dense part (more than one row) is multiplied in registers,
    which four warps have too few of."""
    return 8 if rows > 1 or rows * power > _FOUR_WARPS else 4


@lru_cache(maxsize=64)
def _parts(rotation: BlockRotation, device: torch.device) -> tuple[Tensor | None, int]:
    dense, power = rotation.parts()
    if dense is not None and len(dense) > _DENSE_ROWS and rotation.dense is not None:
        # A short Sylvester part was multiplied into it: for processors, not for this kernel.
        dense, power = rotation.dense.float().contiguous(), rotation.size // len(rotation.dense)
    return None if dense is None else dense.to(device), power


def _power(size: int) -> int:
    """The least power of two that is not below."""
    return 1 << (size - 1).bit_length()
