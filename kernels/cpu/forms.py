"""What is done to a token before it meets a tiled weight: rotation, order of its columns, rounding.

`form` checks these against the weight's segments once and lays them out as the library wants them
(TileForm of `src/tiles.h`, which defines the arithmetic); `Library.linear` takes the result, and so
does the decoder engine, by its address.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.activation import ActivationFormat, ActivationSegment, check_activations
from quantlib.formats.weight_format import Segment

LEAST_POWER = 16
"""Sylvester's part of a rotation has at least this order, or 1."""
SHORT_GROUPS, LONG_GROUP = (16, 32, 64), 128
"""Activation groups have one of these numbers of columns, or a multiple of the last one."""


class TileRounding(ctypes.Structure):
    """ql::TileRounding of src/tiles.h."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("clip", ctypes.c_float),
        ("joined", ctypes.c_int32),
        ("group", ctypes.c_int64),
    )


class TileForm(ctypes.Structure):
    """ql::TileForm of src/tiles.h."""

    _fields_ = (
        ("dense", ctypes.c_void_p),
        ("dense_order", ctypes.c_int64),
        ("power", ctypes.c_int64),
        ("order", ctypes.c_void_p),
        ("rounding", ctypes.POINTER(TileRounding)),
        ("norm", ctypes.c_float),
        ("still", ctypes.c_int32),
    )


@dataclass(frozen=True, eq=False)
class BlockRotation:
    """Every `size` columns of a token times the matrix `dense (x) S / sqrt(size)`, S being
    Sylvester's Hadamard matrix of order size / m: what `transforms.hadamard.rotate` computes.

    dense: [m, m] of +1 and -1; None when m is 1. m divides `size`, the quotient is a power of two.
    still: how many columns, the last ones, stay as they are.
    """

    size: int
    dense: Tensor | None = field(default=None, repr=False)
    still: int = 0

    def __post_init__(self) -> None:
        rows = 1 if self.dense is None else len(self.dense)
        if self.dense is not None and (self.dense.shape != (rows, rows) or rows % 4):
            raise FormatError(
                f"the dense part of a rotation is {list(self.dense.shape)}: give a square matrix "
                "of an order that is a multiple of 4"
            )
        power = self.size // rows
        if self.size < 1 or self.size % rows or power & (power - 1):
            raise FormatError(
                f"a rotation of {self.size} columns is not {rows} times a power of two: give the "
                "parts that transforms.hadamard.split finds"
            )

    @property
    def overlaps(self) -> bool:
        """Whether blocks need not divide the columns: one more then follows those that fit, over
        the last `size` columns, as in `transforms.hadamard.rotate`."""
        return self.dense is None and self.size >= LEAST_POWER

    def covers(self, columns: int) -> bool:
        """Whether blocks of this size rotate so many columns."""
        return columns % self.size == 0 or (self.overlaps and columns > self.size)

    def parts(self) -> tuple[Tensor | None, int]:
        """The dense part, float32 and contiguous, and Sylvester's order as the kernels want them:
        an order below LEAST_POWER goes into the dense part."""
        rows = 1 if self.dense is None else len(self.dense)
        dense, power = self.dense, self.size // rows
        if 1 < power < LEAST_POWER:
            dense = torch.ones(1, 1, device="cpu") if dense is None else dense
            dense, power = torch.kron(dense.cpu().float(), sylvester(power)), 1
        if dense is not None:
            dense = dense.detach().to("cpu", torch.float32).contiguous()
        return dense, power


def sylvester(order: int) -> Tensor:
    """Sylvester's Hadamard matrix of +1 and -1, float32 [order, order]; order is a power of two."""
    matrix = torch.ones(1, 1, device="cpu")
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu"), matrix)
    return matrix


@dataclass(frozen=True, eq=False)
class Form:
    """A form for weights of certain segments. Make it with `form`.

    rounds: whether tokens become integers; if not, they are multiplied as float32.
    """

    columns: int
    spans: tuple[tuple[int, int], ...]
    rounds: bool
    described: TileForm = field(repr=False)
    held: tuple[object, ...] = field(repr=False)

    @property
    def address(self) -> int:
        """Of the ql::TileForm, for C structures. It lives as long as this object."""
        return ctypes.addressof(self.described)


def form(
    segments: Sequence[Segment],
    activations: Sequence[ActivationSegment] = (),
    rotation: BlockRotation | None = None,
    order: Tensor | None = None,
) -> Form:
    """What is done, in this order, to a token [K] of weights that have these segments.

    rotation:    blocks of columns are rotated.
    order:       int [K], a permutation: column k of the weight meets input order[k].
    activations: how the columns, in the weight's order, are rounded to integers; none: not at all.
                 Each covers whole segments of the weight.

    Raises FormatError with what is wrong when the kernels cannot do that.
    """
    spans = tuple((part.start, part.length) for part in segments)
    columns = sum(length for _, length in spans)
    described = TileForm(norm=1.0, power=1)
    held: list[object] = []
    if rotation is not None and rotation.size > 1:
        rotated = columns - rotation.still
        if rotation.still < 0 or rotated < 0 or not rotation.covers(rotated):
            raise FormatError(
                f"blocks of {rotation.size} do not divide {rotated} columns: rotate blocks of a "
                f"divisor of {rotated}"
            )
        described.still = rotation.still
        dense, described.power = rotation.parts()
        described.dense_order = 1 if dense is None else len(dense)
        described.dense = None if dense is None else dense.data_ptr()
        described.norm = 1 / math.sqrt(rotation.size)
        held.append(dense)
    if order is not None:
        places = order.detach().to("cpu", torch.int32).contiguous()
        if not torch.equal(places.sort().values, torch.arange(columns, dtype=torch.int32)):
            raise FormatError(
                f"an input order of {len(places)} entries is not a permutation of {columns} "
                "columns: give the order that belongs to this weight"
            )
        described.order = places.data_ptr()
        held.append(places)
    if activations:
        rounding = _rounding(spans, columns, activations)
        described.rounding = rounding
        held.append(rounding)
    return Form(columns, spans, bool(activations), described, tuple(held))


def why_not(segments: Sequence[Segment], activations: Sequence[ActivationSegment]) -> str:
    """Why the kernels cannot round the inputs of such a weight to integers; "" when they can."""
    try:
        form(segments, activations)
    except FormatError as error:
        return str(error)
    return ""


def _rounding(
    spans: Sequence[tuple[int, int]], columns: int, activations: Sequence[ActivationSegment]
) -> ctypes.Array[TileRounding]:
    """One entry per segment of the weight."""
    check_activations(columns, activations)
    found: list[TileRounding] = []
    for part in activations:
        own = [span for span in spans if part.start <= span[0] < part.start + part.length]
        if not own or own[0][0] != part.start or sum(own[-1]) != part.start + part.length:
            raise FormatError(
                f"columns {part.start} to {part.start + part.length} of the inputs are rounded "
                f"together, but the weight's segments begin at {[span[0] for span in spans]}: "
                "round whole segments"
            )
        _check_format(part.format)
        if part.format.group and any((start - part.start) % part.format.group for start, _ in own):
            raise FormatError(
                f"activation groups of {part.format.group} columns would reach over the weight's "
                "segments: give each segment activations of its own"
            )
        found += [_described(part.format, joined=index > 0) for index in range(len(own))]
    return (TileRounding * len(found))(*found)


def _described(how: ActivationFormat, joined: bool) -> TileRounding:
    return TileRounding(
        bits=how.bits, symmetric=how.symmetric, clip=how.clip, joined=joined, group=how.group
    )


def _check_format(how: ActivationFormat) -> None:
    if not how.is_integer:
        raise FormatError(
            f"inputs in {how} are not integers: the integer kernels take a2 to a8, for all columns"
        )
    group = how.group
    if group and group not in SHORT_GROUPS and group % LONG_GROUP:
        raise FormatError(
            f"the kernels have no activation groups of {group} columns: use one of {SHORT_GROUPS} "
            f"or a multiple of {LONG_GROUP}"
        )
