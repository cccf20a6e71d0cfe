"""The compiled CPU kernels from Python: loading, and calls with torch tensors.

The library is called through ctypes: it is plain C, so it belongs to no version of Python or torch,
and the lock of the interpreter is free while it computes. It takes canonical tensors once, to make
tiles of them (`quantlib.kernels.layouts`), and computes from tiles alone.
"""

from __future__ import annotations

import ctypes
import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from quantlib.errors import DataError, FormatError, QuantlibError, UsageError
from quantlib.formats.elements import code_book, float_element
from quantlib.formats.weight import (
    PACKED,
    ROW_SCALE,
    SCALE,
    ZERO_POINT,
    TensorLayout,
    packed_layout,
)
from quantlib.formats.weight_format import TENSOR, Segment, WeightFormat
from quantlib.kernels.cpu import build
from quantlib.kernels.cpu.forms import Form, TileForm, TileRounding
from quantlib.kernels.packed import dense_layout, parse_layout, to_dense, to_sparse

ISAS = ("best", "portable", "avx2", "avx2vnni", "avx512vnni", "avx512")
"""Instruction sets, in the order of `QlIsa` in src/abi.h. "best" is what the environment variable
QUANTLIB_ISA names, else the best that the processor has."""

_ABI_VERSION = 3
_NO_MEMORY, _NO_SUCH_ISA, _ROW_OUT_OF_RANGE = 1, 2, 3
"""QlStatus; 0 is success."""
_SCALE_KINDS = {"f16": 0, "e8m0": 2, "e4m3": 3}
"""ql::ScaleKind; two-level scales are codes."""
_SCALE_CODE = 1
_INTEGER_UNITS = {"e2m1": 0.5, "e2m2": 0.25, "e2m3": 0.125, "e2m4": 0.0625}
"""Float elements that are multiples of a unit, with few enough of them for an unsigned byte."""


class _Segment(ctypes.Structure):
    """QlSegment of src/abi.h."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("float_values", ctypes.c_void_p),
        ("integer_values", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("scale_row_bytes", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
        ("scale_bits", ctypes.c_int32),
        ("zero_bits", ctypes.c_int32),
        ("zero_step", ctypes.c_float),
        ("zero_constant", ctypes.c_float),
        ("integer_unit", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    )


class _Weight(ctypes.Structure):
    """QlWeight of src/abi.h."""

    _fields_ = (
        ("segments", ctypes.POINTER(_Segment)),
        ("segment_count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


class TileSegment(ctypes.Structure):
    """ql::TileSegment of src/tiles.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("meta", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("float_values", ctypes.c_void_p),
        ("integer_values", ctypes.c_void_p),
        ("integer_unit", ctypes.c_float),
        ("codes_stride", ctypes.c_int64),
        ("meta_stride", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("padded", ctypes.c_int64),
        ("piece", ctypes.c_int64),
        ("pieces", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
        ("scale_bits", ctypes.c_int32),
        ("zero_kind", ctypes.c_int32),
        ("code_units", ctypes.c_int32),
        ("zero_units", ctypes.c_int32),
        ("zero_constant", ctypes.c_float),
        ("zero_step", ctypes.c_float),
    )


class _TiledWeight(ctypes.Structure):
    """ql::TiledWeight."""

    _fields_ = (
        ("segments", ctypes.POINTER(TileSegment)),
        ("segment_count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


@dataclass(frozen=True, eq=False)
class Description:
    """A tiled weight as the library sees it: pointers into memory that the caller keeps alive.

    all_integer: whether it can be multiplied in integers. Elements that cannot (floats but e2m1 to
                 e2m4) are multiplied as floats in mode "int8" too, with the rounded activations.
    """

    weight: _TiledWeight
    rows: int
    columns: int
    all_integer: bool

    @property
    def address(self) -> int:
        """Of the ql::TiledWeight: the handle that C functions take. It lives as long as this."""
        return ctypes.addressof(self.weight)


def _describe_canonical(layout: str, tensors: Sequence[Tensor] | None) -> _Weight:
    """QlWeight of a layout; with null pointers when only its sizes matter.

    Raises FormatError when the tensors are not those of the layout, or not contiguous.
    """
    shape, segments = parse_layout(layout)
    forms = packed_layout(shape, segments)
    at: dict[str, int] = {}
    if tensors is not None:
        _check_tensors(layout, tensors, forms)
        at = {suffix: tensor.data_ptr() for suffix, tensor in zip(forms, tensors)}
    described = (_Segment * len(segments))(
        *(_describe_segment(segment, index, forms, at) for index, segment in enumerate(segments))
    )
    return _Weight(described, len(segments), *shape)


def _check_tensors(layout: str, tensors: Sequence[Tensor], forms: TensorLayout) -> None:
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise FormatError("a packed tensor is not contiguous: build the weight with from_tensors")
    found = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
    if found != list(forms.values()):
        raise FormatError(
            f"these are not the tensors of a weight {layout!r}: take both from one PackedWeight"
        )


def _describe_segment(
    segment: Segment, index: int, forms: TensorLayout, at: Mapping[str, int]
) -> _Segment:
    form, tail = segment.format, f"_{index}" if index else ""

    def row_bytes(kind: str) -> int:
        dtype, shape = forms[kind + tail]
        return dtype.itemsize * shape[-1]

    described = _Segment(
        packed=at.get(PACKED + tail),
        scale=at.get(SCALE + tail),
        row_scale=at.get(ROW_SCALE + tail),
        zero_point=at.get(ZERO_POINT + tail),
        row_bytes=row_bytes(PACKED),
        scale_row_bytes=0 if form.group_size == TENSOR else row_bytes(SCALE),
        start=segment.start,
        length=segment.length,
        group_size=max(form.group_size, 0),
        groups=form.groups(segment.length),
        bits=form.bits,
        scale_kind=_SCALE_KINDS.get(form.scale, _SCALE_CODE),
        scale_bits=form.scale_bits,
        zero_bits=form.zero_bits,
        zero_step=form.zero_step,
        integer_unit=1.0,
    )
    if form.is_integer:
        described.zero_constant = 1 << (form.bits - 1) if form.symmetric else 0
        return described
    described.float_values = code_book(form.element).data_ptr()
    if form.element in _INTEGER_UNITS:
        described.integer_unit = _INTEGER_UNITS[form.element]
        described.zero_constant = _integer_zero(form)
        described.integer_values = _integer_values(form).data_ptr()
    return described


def _integer_zero(form: WeightFormat) -> float:
    """The byte of zero: the largest value in units, so that the least value is the byte 0."""
    return float_element(form.element).max_value / _INTEGER_UNITS[form.element]


@cache
def _integer_values(form: WeightFormat) -> Tensor:
    """uint8 [2^bits]: the byte of every code. Shared, and kept for the library to point to."""
    units = code_book(form.element) / _INTEGER_UNITS[form.element]
    return (units + _integer_zero(form)).to(torch.uint8)


class Library:
    """The loaded library. Tensors are contiguous float32 on the CPU: callers see to that, and to
    shapes; torch's default dtype and device do not matter."""

    def __init__(self, path: Path) -> None:
        """Load a file that `build` made. Raises OSError when the system or its version forbids."""
        self.functions = c = ctypes.CDLL(str(path))
        structures = (_Segment, TileSegment, TileForm, TileRounding)
        sizes = (ctypes.c_int64 * len(structures))()
        if c.ql_abi_version() == _ABI_VERSION:
            c.ql_struct_bytes(sizes)
        if list(sizes) != [ctypes.sizeof(structure) for structure in structures]:
            raise OSError(f"{path} has another interface than this version of quantlib: delete it")
        pointer, size, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        weight, tiled = ctypes.POINTER(_Weight), ctypes.POINTER(_TiledWeight)
        tail = [int32, int32]
        c.ql_allocate.argtypes, c.ql_allocate.restype = [size], pointer
        c.ql_free.argtypes, c.ql_free.restype = [pointer, size], None
        c.ql_tile_bytes.argtypes, c.ql_tile_bytes.restype = [weight], size
        c.ql_tile_describe.argtypes = [weight, pointer, ctypes.POINTER(TileSegment)]
        c.ql_tile_describe.restype = None
        c.ql_tile_pack.argtypes = c.ql_tile_unpack.argtypes = [weight, pointer, *tail]
        c.ql_linear_int8.argtypes = [tiled, pointer, size, size, pointer, pointer, *tail]
        c.ql_linear_exact.argtypes = [tiled, pointer, size, pointer, pointer, *tail]
        form = ctypes.POINTER(TileForm)
        c.ql_linear_as.argtypes = [tiled, form, pointer, size, pointer, pointer, *tail]
        c.ql_dequantize.argtypes = [tiled, pointer, size, size, pointer, *tail]

    @property
    def isa(self) -> str:
        """The instruction set that "best" stands for.

        Raises UsageError when QUANTLIB_ISA names one that this processor does not have.
        """
        chosen = self.functions.ql_chosen_isa()
        if not chosen:
            raise self._no_such_isa(os.environ.get("QUANTLIB_ISA", ""))
        return ISAS[chosen]

    def supports(self, isa: str) -> bool:
        """Whether this processor can run the kernels of an instruction set of ISAS."""
        return bool(self.functions.ql_supports_isa(ISAS.index(isa)))

    def allocate(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], not initialized, aligned and in huge pages where the system allows it."""
        address = self.functions.ql_allocate(nbytes)
        if not address:
            raise QuantlibError(f"no memory for {nbytes} bytes of weights: use a smaller model")
        buffer = (ctypes.c_uint8 * nbytes).from_address(address)
        # Tensors over the buffer keep it alive, and it keeps the memory. Not given back when the
        # process ends: other threads may still compute with it.
        weakref.finalize(buffer, self.functions.ql_free, address, nbytes).atexit = False
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def pack(
        self,
        tensors: Sequence[Tensor],
        layout: str,
        isa: str = "best",
        threads: int | None = None,
    ) -> Tensor:
        """The tiles of a PackedWeight, from its tensors in the order of its layout. Tiles of a
        sparse weight have all its zeros.

        Raises FormatError when they have other sizes than the layout says, or are not contiguous.
        """
        given = to_dense(tensors, layout)  # alive until it is packed
        weight = _describe_canonical(dense_layout(layout), given)
        memory = self.allocate(self.functions.ql_tile_bytes(weight))
        status = self.functions.ql_tile_pack(
            weight, memory.data_ptr(), ISAS.index(isa), threads or torch.get_num_threads()
        )
        self._check(status, isa)
        return memory

    def unpack(
        self, memory: Tensor, layout: str, isa: str = "best", threads: int | None = None
    ) -> list[Tensor]:
        """The tensors that `pack` took, in the order of the layout."""
        dense = dense_layout(layout)
        forms = packed_layout(*parse_layout(dense))
        tensors = [torch.empty(form, dtype=dtype, device="cpu") for dtype, form in forms.values()]
        status = self.functions.ql_tile_unpack(
            _describe_canonical(dense, tensors),
            memory.data_ptr(),
            ISAS.index(isa),
            threads or torch.get_num_threads(),
        )
        self._check(status, isa)
        return to_sparse(tensors, layout)

    def describe(self, memory: Tensor, layout: str) -> Description:
        """Describe tiles in `memory`, which must outlive the description.

        Raises FormatError when the memory is not of the size that the layout says.
        """
        return _describe_tiles(self, layout, memory.data_ptr(), memory.nbytes)

    def linear(
        self,
        weight: Description,
        x: Tensor,
        bias: Tensor | None,
        mode: str,
        isa: str = "best",
        threads: int | None = None,
        act_group: int = 0,
        form: Form | None = None,
    ) -> Tensor:
        """x [M, K] -> [M, N] in mode "int8" or "exact".

        act_group: in mode "int8", columns of x that share a scale (16, 32, 64 or a multiple of
                   128); 0: all.
        form:      of tokens for this weight's segments (`forms.form`); it takes the place of mode
                   and act_group.
        `threads` (default: torch's number) never changes a bit of the result.
        """
        out = x.new_empty(x.shape[0], weight.rows)
        tokens: tuple[object, ...]
        if form is not None:
            _check_form(form, weight)
            function = self.functions.ql_linear_as
            tokens = (form.described, x.data_ptr(), x.shape[0])
        elif mode == "exact":
            function, tokens = self.functions.ql_linear_exact, (x.data_ptr(), x.shape[0])
        else:
            function = self.functions.ql_linear_int8
            tokens = (x.data_ptr(), x.shape[0], act_group)
        status = function(
            weight.weight,
            *tokens,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            ISAS.index(isa),
            threads or torch.get_num_threads(),
        )
        self._check(status, isa)
        return out

    def dequantize(
        self,
        weight: Description,
        rows: Tensor | range | None = None,
        isa: str = "best",
        threads: int | None = None,
    ) -> Tensor:
        """float32 [n, K]: the rows of an int64 tensor [n], of a range (step 1), or all."""
        rows = range(weight.rows) if rows is None else rows
        out = torch.empty(len(rows), weight.columns, dtype=torch.float32, device="cpu")
        status = self.functions.ql_dequantize(
            weight.weight,
            rows.data_ptr() if isinstance(rows, Tensor) else None,
            rows.start if isinstance(rows, range) else 0,
            len(rows),
            out.data_ptr(),
            ISAS.index(isa),
            threads or torch.get_num_threads(),
        )
        if status == _ROW_OUT_OF_RANGE:
            raise row_out_of_range(weight.rows)
        self._check(status, isa)
        return out

    def _check(self, status: int, isa: str) -> None:
        """Raise the sentence that belongs to a QlStatus."""
        if status == _NO_MEMORY:
            raise QuantlibError("not enough memory for the kernel's work space: use shorter inputs")
        if status == _NO_SUCH_ISA:
            raise self._no_such_isa(os.environ.get("QUANTLIB_ISA", "") if isa == "best" else isa)

    def _no_such_isa(self, name: str) -> UsageError:
        known = ", ".join(isa for isa in ISAS[1:] if self.supports(isa))
        return UsageError(
            f"this processor has no instruction set {name!r}: unset QUANTLIB_ISA, or use one of "
            f"{known}"
        )


def _check_form(form: Form, weight: Description) -> None:
    """Raise FormatError unless the form is one of this weight's segments."""
    segments = weight.weight.segments[: weight.weight.segment_count]
    if form.spans != tuple((part.start, part.length) for part in segments):
        raise FormatError(
            "the form of the inputs belongs to a weight with other segments: make it from this "
            "weight's own"
        )


@lru_cache(maxsize=16384)
def _describe_tiles(library: Library, layout: str, address: int, nbytes: int) -> Description:
    # Address and layout determine the whole description: a cached one is never stale.
    weight = _describe_canonical(dense_layout(layout), None)
    if library.functions.ql_tile_bytes(weight) != nbytes:
        raise FormatError(f"{nbytes} bytes are not the tiles of a weight {layout!r}")
    shape, segments = parse_layout(layout)
    tiles = (TileSegment * len(segments))()
    library.functions.ql_tile_describe(weight, address, tiles)
    all_integer = all(
        segment.format.is_integer or segment.format.element in _INTEGER_UNITS
        for segment in segments
    )
    return Description(_TiledWeight(tiles, len(segments), *shape), *shape, all_integer)


def row_out_of_range(rows: int) -> DataError:
    """The error for a row that a weight of `rows` rows does not have."""
    return DataError(
        f"a token id is outside 0..{rows - 1}, the rows of this embedding: "
        "the tokenizer and the model do not belong together"
    )


@lru_cache(maxsize=1)
def load() -> Library | None:
    """The library, compiled at first use. None when there is none to be had: one warning.

    Raises UsageError when QUANTLIB_ISA names an instruction set that this processor does not have.
    """
    try:
        library = Library(build.find() or build.build())
    except (build.BuildError, OSError) as error:
        warnings.warn(
            f"quantlib computes with its torch reference, which is slow and as exact: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    _ = library.isa  # an instruction set that is forced and not there is said now
    return library
