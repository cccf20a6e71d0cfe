"""How a weight lies in memory for the Triton kernels: a bijection, and its inverse.

Codes [N, K] of a segment are padded to tiles of 128 columns. A code of b bits is split into planes
of 8, 4, 2 and 1 bits (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1), the lowest bits in the
widest plane, so that a plane's fields never cross a byte:

    memory: uint8, plane after plane, each [tiles, N, 16 * bits of the plane]

Within a tile's row of a plane, byte j holds the columns j, j + B, j + 2 B, ..., with B bytes to the
row: field i of the byte, counted from its low end, is column j + i B ("split halves", for four
bits). A load of consecutive bytes therefore gives, after one shift and one mask, consecutive
columns: operands of a matrix product as they are, with no shuffle and no way through shared memory.

Stored scales and zero points are [G, N], so that neighbouring rows are neighbours in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.errors import FormatError
from quantlib.formats.elements import FLOATS
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight, decode_scales
from quantlib.formats.weight_format import WeightFormat

TILE = 128
"""Columns of a tile."""
_HALF_BIAS = 15
"""Of float16's exponent."""


def planes(bits: int) -> tuple[int, ...]:
    """Bits of the planes of a code, the lowest bits first."""
    if not 2 <= bits <= 8:
        raise FormatError(f"weights have 2 to 8 bits here, not {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def parts(bits: int) -> int:
    """How many runs of columns a tile's finest plane holds side by side in a byte."""
    return 8 // planes(bits)[-1]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [N, K], each below 2^bits -> uint8 [tiles * N * 16 * bits]. Padding has code 0."""
    if codes.dim() != 2 or codes.dtype != torch.uint8 or not codes.numel():
        raise FormatError(f"codes are a uint8 matrix [N, K], not {codes.dtype} {list(codes.shape)}")
    padded = functional.pad(codes, (0, -codes.shape[1] % TILE)).unflatten(1, (-1, TILE))
    packed, first = [], 0
    for width in planes(bits):
        fields = (padded >> first & (1 << width) - 1).unflatten(2, (8 // width, -1))
        plane = fields[:, :, 0].clone()
        for index in range(1, 8 // width):
            plane |= fields[:, :, index] << index * width
        packed.append(plane.transpose(0, 1).reshape(-1))  # [tiles, N, 16 * width]
        first += width
    return torch.cat(packed)


def unpack_codes(memory: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack_codes`: uint8 [N, K]."""
    rows, columns = shape
    tiles = -(-columns // TILE)
    codes = memory.new_zeros(rows, tiles, TILE)
    begin = first = 0
    for width in planes(bits):
        size = tiles * rows * 16 * width
        plane = memory[begin : begin + size].view(tiles, rows, 16 * width).transpose(0, 1)
        fields = [plane >> index * width & (1 << width) - 1 for index in range(8 // width)]
        codes |= torch.cat(fields, dim=2) << first
        begin, first = begin + size, first + width
    return codes.flatten(1)[:, :columns].contiguous()


@dataclass(frozen=True, eq=False)
class SplitSegment:
    """One segment in the layout.

    codes:   uint8, as the module says.
    scale:   [G, N]: float16 as stored, or uint8: codes of two-level scales, e8m0 exponents, e4m3
             codes' values as float16; None where a row has one scale, which is in its factor.
    zero:    uint8 [G, N] stored zero points, or None.
    factors: float32 [N]: what the sum of a row is multiplied by at the end.
    """

    start: int
    length: int
    format: WeightFormat
    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    factors: Tensor

    @property
    def tiles(self) -> int:
        """Tiles of 128 columns, padding included."""
        return -(-self.length // TILE)

    @property
    def group(self) -> int:
        """Columns that share a scale; 0: all."""
        return max(self.format.group_size, 0)


@dataclass(frozen=True, eq=False)
class SplitWeight:
    """A weight [N, K] as the Triton kernels read it. Make it with `pack`."""

    shape: tuple[int, int]
    segments: tuple[SplitSegment, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of it."""
        tensors = (t for s in self.segments for t in (s.codes, s.scale, s.zero, s.factors))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack(weight: QuantizedWeight) -> SplitWeight:
    """A weight in the layout, on its device. Raises FormatError for what is neither integers nor
    floats of a scheme."""
    return SplitWeight(weight.shape, tuple(_segment(part) for part in weight.segments))


def _segment(part: QuantizedSegment) -> SplitSegment:
    form, rows = part.segment.format, part.codes.shape[0]
    if not form.is_integer and form.element not in FLOATS:
        raise FormatError(f"the Triton kernels do not know {form}: use another kernel for it")
    scale, factors = _scales(part, rows)
    zero = None if part.zero is None else part.zero.expand(rows, -1).t().contiguous()
    return SplitSegment(
        part.segment.start,
        part.segment.length,
        form,
        pack_codes(part.codes, form.bits),
        scale,
        zero,
        (factors * element_unit(form)).contiguous(),
    )


def element_unit(form: WeightFormat) -> float:
    """What an operand of 1 stands for. Floats are read as float16 with their own exponent bits, so
    their bias is made up for at the end: exact, a power of two."""
    return 1.0 if form.is_integer else 2.0 ** (_HALF_BIAS - FLOATS[form.element].bias)


def _scales(part: QuantizedSegment, rows: int) -> tuple[Tensor | None, Tensor]:
    """Scales of groups [G, N] that a kernel reads exactly, and factors of rows, float32 [N]."""
    form = part.segment.format
    ones = torch.ones(rows, device=part.codes.device)
    if form.two_level:
        assert part.row_scale is not None
        largest = float((1 << form.scale_bits) - 1)
        return part.scale.t().contiguous(), part.row_scale.to(torch.float32) / largest
    if form.group_size <= 0:
        scale = decode_scales(part.scale, part.row_scale, form).expand(rows, -1)
        return None, scale[:, 0].contiguous()
    if form.scale == "e4m3":
        assert part.row_scale is not None
        one = torch.ones_like(part.row_scale)
        values = decode_scales(part.scale, one, form)  # of e4m3: float16 has them all
        return values.to(torch.float16).t().contiguous(), ones * part.row_scale
    return part.scale.t().contiguous(), ones
