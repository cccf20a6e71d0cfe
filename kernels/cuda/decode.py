"""Kernel (a) from outside: what it is compiled for, how a weight is packed for it, its arguments.

`src/decode_gemm.cu` says what it computes. It is compiled for one `DecodeCase` at a time; a
`DecodeWeight` is a weight in its layout, for any case of the same width; `arguments` puts the two
together with inputs and outputs, in the kernel's order. Who launches it (the emulator, CUDA's
driver) is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.sparse import AMONG, SparseCodes, kept_of
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight, decode_scales
from quantlib.formats.weight_format import WeightFormat
from quantlib.kernels.cuda import fragments
from quantlib.kernels.cuda.layout import SLAB_COLUMNS, STRIP_ROWS, pack_codes, pack_meta
from quantlib.kernels.cuda.sparse_layout import PLACE_WORDS, pack_sparse

SOURCE = Path(__file__).with_name("src") / "decode_gemm.cu"
NAME = "decode_gemm"
THREADS, WARPS, TOKEN_TILE = 256, 8, 8
TOKEN_TILES = (1, 2, 4, 8)
MOST_TOKENS = TOKEN_TILE * TOKEN_TILES[-1]
MOST_SPARSE_BITS = 4
"""Of sparse weights: a step has twice the inputs, which wider ones leave no room for."""

LEAST_STAGES, MOST_STAGES = 3, 5
SHARED_KB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
"""Shared memory of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability"), of which each block takes 1 KB more than it asks for."""
RESERVED_SHARED = 1024
_ONE_GROUP = 31
"""A `group_shift` that no slab's number survives."""
_ALIGNMENT = 8
"""Of the inputs' stride, in elements: 16 bytes."""


@dataclass(frozen=True)
class DecodeCase:
    """What the kernel is compiled for; `macros` gives it to a compiler.

    token_tiles: tokens / 8, rounded up to one of TOKEN_TILES.
    period:      scales come in after so many 16 columns (1, 2, 4), or 0: at the end only.
                 Of a sparse weight these are columns that are kept, half of all.
    stages:      of the ring; blocks_per_sm: what registers and shared memory are planned for.
    """

    bits: int
    dtype: torch.dtype
    token_tiles: int
    period: int
    zeros: bool
    stages: int = 4
    blocks_per_sm: int = 1
    sparse: bool = False

    def macros(self) -> dict[str, int]:
        """Names and values, without the prefix -D."""
        return {
            "QL_BITS": self.bits,
            "QL_BFLOAT": int(self.dtype == torch.bfloat16),
            "QL_TOKEN_TILES": self.token_tiles,
            "QL_PERIOD": self.period,
            "QL_ZEROS": int(self.zeros),
            "QL_SPARSE": int(self.sparse),
            "QL_STAGES": self.stages,
            "QL_BLOCKS_PER_SM": self.blocks_per_sm,
        }

    @property
    def warps_along_k(self) -> int:
        """Warps that share output rows."""
        return 2 if self.token_tiles <= 2 else 1

    @property
    def tile_rows(self) -> int:
        """Output rows of a block."""
        return WARPS // self.warps_along_k * STRIP_ROWS

    @property
    def step_columns(self) -> int:
        """Of the inputs, that a warp multiplies in a step."""
        return SLAB_COLUMNS * (2 if self.sparse else 1)

    @property
    def stage_bytes(self) -> int:
        """Of shared memory: weights, inputs and scales of one step."""
        bits = self.bits + (PLACE_WORDS if self.sparse else 0)
        weights = WARPS * STRIP_ROWS * SLAB_COLUMNS * bits // 8
        inputs = self.warps_along_k * self.token_tiles * TOKEN_TILE * self.step_columns * 2
        groups = 4 // self.period if self.period else 0
        meta = self.warps_along_k * groups * self.tile_rows * (4 if self.zeros else 2)
        return weights + inputs + meta

    @property
    def shared_bytes(self) -> int:
        """Of a block: the ring, and where sums change hands."""
        sums = TOKEN_TILE * (self.tile_rows + 4) * 4
        return self.stages * self.stage_bytes + sums

    @property
    def partial_floats(self) -> int:
        """Of a block: sums of a tile that another block finishes."""
        return TOKEN_TILE * self.token_tiles * self.tile_rows


@dataclass(frozen=True, eq=False)
class DecodeWeight:
    """A weight [N, K] in the kernel's layout (`kernels/cuda/layout.py`).

    codes: uint8 [slabs, strips, 2, 128 * bits], of a sparse weight (`sparse_layout.py`) 128 *
    (bits + 2). meta: float16 [groups, N padded, 1 or 2], empty
    without groups. row_factors: float32 [N padded]: what the sum of a row is multiplied by.
    """

    shape: tuple[int, int]
    bits: int
    period: int
    zeros: bool
    group_shift: int
    zero_step: float
    codes: Tensor
    meta: Tensor
    row_factors: Tensor
    sparse: bool = False

    @property
    def most_tokens(self) -> int:
        """How many tokens a launch takes. Where scales and zero points come in with every 16
        columns, the sums of 64 tokens leave no registers for them."""
        return MOST_TOKENS // 2 if self.period == 1 and self.zeros else MOST_TOKENS

    @property
    def nbytes(self) -> int:
        """Bytes that a launch reads of it."""
        return self.codes.nbytes + self.meta.nbytes + self.row_factors.nbytes

    def case(self, tokens: int, dtype: torch.dtype, architecture: int = 80) -> DecodeCase:
        """What the kernel is compiled for to multiply `tokens` inputs of `dtype` with this."""
        if dtype not in (torch.float16, torch.bfloat16):
            raise FormatError(f"inputs are float16 or bfloat16 here, not {dtype}")
        if not 1 <= tokens <= self.most_tokens:
            raise FormatError(f"1 to {self.most_tokens} tokens at a time, not {tokens}")
        tiles = next(tiles for tiles in TOKEN_TILES if tiles * TOKEN_TILE >= tokens)
        found = DecodeCase(self.bits, dtype, tiles, self.period, self.zeros, sparse=self.sparse)
        return plan(found, architecture)


def plan(case: DecodeCase, architecture: int) -> DecodeCase:
    """The case with the blocks per multiprocessor and the stages that suit an architecture (80, 86,
    ...): two blocks where the sums leave them enough registers, and as many stages as fit.

    Raises FormatError for an architecture of which nothing is known.
    """
    if architecture not in SHARED_KB:
        raise FormatError(
            f"nothing is known of the shared memory of sm_{architecture}: one of "
            f"{', '.join(f'sm_{known}' for known in SHARED_KB)}"
        )
    # 256 threads have 255 registers each where they are alone, 128 where they are two blocks.
    # Sums, of groups and in all, take 16 for each 8 tokens, and sums of inputs 4 more.
    # Scales that come in more often than once in 64 columns need registers within the loop.
    most = 1 if case.period in (1, 2) else 2 if case.zeros else 4
    few_sums = case.token_tiles <= most
    for blocks in (2, 1) if few_sums else (1,):
        for stages in range(MOST_STAGES, LEAST_STAGES - 1, -1):
            tried = replace(case, stages=stages, blocks_per_sm=blocks)
            if blocks * (tried.shared_bytes + RESERVED_SHARED) <= SHARED_KB[architecture] * 1024:
                return tried
    raise FormatError(f"{case} does not fit the shared memory of sm_{architecture}")


def can_pack(weight: QuantizedWeight) -> bool:
    """Whether `pack` takes the weight: integers, in one format along the whole of K, whose scales
    float16 holds (powers of two reach further)."""
    form = weight.segments[0].segment.format
    return len(weight.segments) == 1 and form.is_integer and not form.shares_exponent


def pack(weight: QuantizedWeight) -> DecodeWeight:
    """A weight in the kernel's layout: a sparse one without its zeros (`sparse_codes`). Raises
    FormatError unless `can_pack`."""
    if not can_pack(weight):
        formats = [str(part.segment.format) for part in weight.segments]
        raise FormatError(
            "the decode kernel takes integers in one format, with scales in float16, and not "
            f"{formats}: use another kernel"
        )
    part = weight.segments[0]
    form, (rows, columns) = part.segment.format, weight.shape
    sparse = sparse_codes(part)
    scale, factors = split_scales(part, rows)
    period, group_shift = _period(form, 1 if sparse is None else 2)
    meta = torch.empty(0, dtype=torch.float16)
    if period:
        zero = None if part.zero is None else part.zero.expand(rows, -1).to(torch.float16)
        slabs = -(-columns // (SLAB_COLUMNS * (1 if sparse is None else 2)))
        groups = slabs * 4 // period if period < 4 else scale.shape[1]
        meta = pack_meta(_widened(scale, groups), None if zero is None else _widened(zero, groups))
    padded = torch.zeros(-(-rows // STRIP_ROWS) * STRIP_ROWS)
    padded[:rows] = factors
    return DecodeWeight(
        (rows, columns),
        form.bits,
        period,
        part.zero is not None,
        group_shift,
        form.zero_step,
        pack_codes(part.codes, form.bits) if sparse is None else pack_sparse(sparse, form.bits),
        meta,
        padded,
        sparse is not None,
    )


def sparse_codes(part: QuantizedSegment) -> SparseCodes | None:
    """What is kept of a weight of 2 to 4 bits that is zero in two of every four columns, as
    SparseGPT leaves it; None for any other. Whether it was pruned, its codes say: no scheme has to
    (those that end in `:2of4` also store it so).

    Zero points are for dense weights: what is left out would have one too. Scales are for 32
    columns or more, 16 of which are kept.
    """
    form = part.segment.format
    grouped = 0 < form.group_size < 2 * fragments.DEPTH
    whole = part.codes.shape[1] % AMONG == 0
    if form.bits > MOST_SPARSE_BITS or part.zero is not None or grouped or not whole:
        return None
    return kept_of(part.codes, 1 << form.bits - 1)


def arguments(
    weight: DecodeWeight,
    inputs: Tensor,
    bias: Tensor | None,
    output: Tensor,
    partials: Tensor,
    flags: Tensor,
) -> list[Tensor | int | float | None]:
    """The kernel's arguments, in order.

    inputs [M, K] and output [M, N], of one dtype, in rows with any stride (the inputs' a multiple
    of 8, their memory aligned to 16 bytes, the output's to 8); partials float32
    [blocks, partial_floats], which need not be set; flags int32 [blocks], zero before and after.
    """
    rows, columns = weight.shape
    aligned = inputs.stride(0) % _ALIGNMENT == 0 and inputs.data_ptr() % 16 == 0
    if inputs.shape[1] != columns or inputs.stride(1) != 1 or not aligned:
        raise FormatError(
            f"inputs are [M, {columns}] in rows whose stride is a multiple of {_ALIGNMENT}, from a "
            f"multiple of 16 bytes, not {list(inputs.shape)} with strides {inputs.stride()} at "
            f"{inputs.data_ptr()}: copy them into padded rows"
        )
    if output.stride(-1) != 1 or output.data_ptr() % 8:
        raise FormatError("the output is in rows, from a multiple of 8 bytes: give it memory anew")
    return [
        inputs,
        weight.codes,
        weight.meta if weight.period else None,
        weight.row_factors,
        bias,
        output,
        partials,
        flags,
        inputs.shape[0],
        rows,
        columns,
        inputs.stride(0),
        output.stride(0),
        weight.group_shift,
        weight.zero_step,
    ]


def _period(form: WeightFormat, depth: int) -> tuple[int, int]:
    """(period, group_shift) of a format of which one in `depth` columns is kept: see the head of
    the kernel."""
    if form.group_size <= 0:
        return (0, 0) if form.symmetric else (4, _ONE_GROUP)
    kept = form.group_size // depth
    if kept < SLAB_COLUMNS:
        return kept // 16, 0
    return 4, (kept // SLAB_COLUMNS).bit_length() - 1


def split_scales(part: QuantizedSegment, rows: int) -> tuple[Tensor, Tensor]:
    """Scales that fit float16 exactly [N, G], and float32 [N] that they are multiplied by.

    Where there is one scale to a row it is the factor, and a group's scale is 1; two-level scales
    are codes times what a code of 1 is worth.
    """
    form = part.segment.format
    if form.two_level:
        assert part.row_scale is not None
        largest = float((1 << form.scale_bits) - 1)
        return part.scale.to(torch.float32), part.row_scale.to(torch.float32) / largest
    scale = decode_scales(part.scale, part.row_scale, form).expand(rows, -1)
    if form.group_size <= 0:
        return torch.ones(rows, 1), scale[:, 0]
    return scale, torch.ones(rows)


def _widened(scale: Tensor, groups: int) -> Tensor:
    """Zeros for groups in the padding of K."""
    return torch.nn.functional.pad(scale, (0, groups - scale.shape[1]))
