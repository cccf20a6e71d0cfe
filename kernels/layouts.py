"""How a weight lies in memory for the CPU kernels: `TiledWeight`, and where each number is in it.

A checkpoint's tensors are the canonical form (`quantlib.kernels.packed`): rows, bit-contiguous
along K, the same for every machine. The kernels multiply 16 output rows at a time and want them
side by side, so a weight is rearranged once, at memory speed, into tiles (`cpu/src/tiles.h`
describes them; `places` says the same in Python, and the tests compare the two). The canonical
tensors can then be dropped: `to_packed` gives them back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from quantlib.errors import UsageError
from quantlib.formats.packing import packed_bytes
from quantlib.formats.weight_format import Segment
from quantlib.kernels import dispatch
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.packed import PackedWeight, parse_layout, suffixes_of

TILES = "tiles|"
"""What the layout of a TiledWeight begins with; the canonical layout follows."""

BLOCK_ROWS, STRIP_ROWS = 16, 32
MAX_PIECE, COLUMN_PAD, LINE = 128, 32, 64


@dataclass(frozen=True, eq=False)
class TiledWeight:
    """A weight [N, K] in tiles, in memory of its own. Make it with `tile`.

    memory: uint8 [nbytes]: codes, scales, zero points and row factors of all segments.
    layout: shape and segments as text, after the prefix TILES.
    """

    shape: tuple[int, int]
    segments: tuple[Segment, ...]
    memory: Tensor = field(repr=False)
    layout: str = field(repr=False)
    description: cpu.Description = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the tiles: what this weight keeps resident."""
        return self.memory.nbytes

    @property
    def device(self) -> torch.device:
        """Main memory."""
        return self.memory.device

    @property
    def address(self) -> int:
        """Of the ql::TiledWeight that C functions take; it lives as long as this object."""
        return self.description.address

    @property
    def all_integer(self) -> bool:
        """Whether mode "int8" multiplies it in integers (integer elements, e2m1 to
        e2m4)."""
        return self.description.all_integer

    def to_packed(self) -> PackedWeight:
        """The canonical tensors, made anew: exactly those that were tiled."""
        layout = self.layout.removeprefix(TILES)
        tensors = _library().unpack(self.memory, layout)
        return PackedWeight.from_tensors(
            dict(zip(suffixes_of(layout), tensors)), self.shape, self.segments
        )


def tile(weight: PackedWeight, threads: int | None = None) -> TiledWeight:
    """Rearrange a weight for the CPU kernels. Its tensors are only read, and not kept.

    Raises UsageError when the kernels are not to be had on this machine, and QuantlibError when
    there is no memory for the tiles.
    """
    memory = _library().pack(list(weight.tensors.values()), weight.layout, threads=threads)
    return from_memory(memory, TILES + weight.layout)


def can_tile(tensors: Sequence[Tensor]) -> bool:
    """Whether `tile` can be called with these tensors here and now: they lie in main memory, there
    are kernels that may be used, and nobody is tracing the call."""
    if is_traced() or not dispatch.tiles_allowed():
        return False
    in_memory = all(type(tensor) in (Tensor, Parameter) and tensor.is_cpu for tensor in tensors)
    return in_memory and cpu.load() is not None


def is_traced() -> bool:
    """Whether a compiler or a dispatch mode (fake tensors, a profiler of operators) looks on."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def from_memory(memory: Tensor, layout: str) -> TiledWeight:
    """The TiledWeight of a TiledWeight's memory and layout."""
    canonical = layout.removeprefix(TILES)
    description = _library().describe(memory, canonical)
    return TiledWeight(*parse_layout(canonical), memory, layout, description)


def _library() -> cpu.Library:
    library = cpu.load()
    if library is None:
        raise UsageError(
            "weights are tiled for the compiled CPU kernels, which this machine does not have: "
            "keep the packed weight, or install a C++ compiler"
        )
    return library


@dataclass(frozen=True)
class Places:
    """Where the numbers of one segment are in the memory of a TiledWeight of `rows` rows.

    Offsets are in bytes, from the beginning of the memory. `k` counts within the segment and may
    lie in its padding. A piece is `piece` columns that share a scale per row (the last of a segment
    may be shorter), a block 16 rows, a strip two blocks (the last may have one).
    """

    rows: int
    segment: Segment
    codes: int

    @property
    def padded(self) -> int:
        """Columns, with padding."""
        return -(-self.segment.length // COLUMN_PAD) * COLUMN_PAD

    @property
    def piece(self) -> int:
        group = self.segment.format.group_size
        return group if 0 < group < MAX_PIECE else MAX_PIECE

    @property
    def pieces(self) -> int:
        return -(-self.padded // self.piece)

    @property
    def zero_in_scale(self) -> bool:
        """Whether a zero point shares the byte of its scale code, in the bits above it."""
        form = self.segment.format
        return not form.symmetric and form.two_level and form.scale_bits + form.zero_bits <= 8

    @property
    def scale_bytes(self) -> int:
        """Of one stored scale."""
        return 2 if self.segment.format.scale == "f16" else 1

    @property
    def meta_bytes(self) -> int:
        """Scales and zero points of a block of a piece."""
        has_zeros = not self.segment.format.symmetric and not self.zero_in_scale
        return BLOCK_ROWS * (self.scale_bytes + has_zeros)

    @property
    def blocks(self) -> int:
        return -(-self.rows // BLOCK_ROWS)

    @property
    def meta(self) -> int:
        """Where scales and zero points begin."""
        return self.codes + _lines(self.blocks * self._code_bytes(self.padded))

    @property
    def factors(self) -> int:
        """Where the rows' factors begin: a float32 each, padded to whole strips."""
        return self.meta + _lines(self.blocks * self.pieces * self.meta_bytes)

    @property
    def end(self) -> int:
        return self.factors + 4 * -(-self.rows // STRIP_ROWS) * STRIP_ROWS

    def code(self, n: int, k: int) -> tuple[int, int]:
        """Of the code of row n and column k: the offset of its first byte, and the bit in it."""
        bits, piece = self.segment.format.bits, k // self.piece
        strip, block, row = n // STRIP_ROWS, n % STRIP_ROWS // BLOCK_ROWS, n % BLOCK_ROWS
        columns = min(self.piece, self.padded - piece * self.piece)
        at = self.codes + 2 * strip * self._code_bytes(self.padded)
        at += self._blocks_of(strip) * self._code_bytes(piece * self.piece)
        at += block * self._code_bytes(columns)
        chunk, column = divmod(k % self.piece, 4)
        if bits in (2, 4, 8):  # chunks share a line, each with bits of its own
            line, part = divmod(chunk, 8 // bits)
            return at + LINE * line + 4 * row + column, bits * part
        first = bits * (LINE * chunk + 4 * row + column)
        return at + first // 8, first % 8

    def scale(self, n: int, k: int) -> int:
        """Offset of the stored scale of row n and column k."""
        return self._meta(n, k) + n % BLOCK_ROWS * self.scale_bytes

    def zero(self, n: int, k: int) -> tuple[int, int]:
        """Of a stored zero point: the offset of its byte, and its first bit in it."""
        if self.zero_in_scale:
            return self.scale(n, k), self.segment.format.scale_bits
        return self._meta(n, k) + BLOCK_ROWS * self.scale_bytes + n % BLOCK_ROWS, 0

    def factor(self, n: int) -> int:
        """Offset of the factor of row n."""
        return self.factors + 4 * n

    def _meta(self, n: int, k: int) -> int:
        strip, block = n // STRIP_ROWS, n % STRIP_ROWS // BLOCK_ROWS
        before = 2 * strip * self.pieces + self._blocks_of(strip) * (k // self.piece) + block
        return self.meta + before * self.meta_bytes

    def _blocks_of(self, strip: int) -> int:
        return min(2, self.blocks - 2 * strip)

    def _code_bytes(self, columns: int) -> int:
        return packed_bytes(BLOCK_ROWS * columns, self.segment.format.bits)


def places(shape: Sequence[int], segments: Sequence[Segment]) -> list[Places]:
    """Where the numbers of each segment of a weight [N, K] are."""
    found: list[Places] = []
    for segment in segments:
        found.append(Places(shape[0], segment, found[-1].end if found else 0))
    return found


def tiled_bytes(shape: Sequence[int], segments: Sequence[Segment]) -> int:
    """Bytes of the memory of a TiledWeight: a line past the end may be read as well."""
    return places(shape, segments)[-1].end + LINE


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE
