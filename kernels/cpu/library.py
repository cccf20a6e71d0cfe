"""The compiled CPU kernels from Python: loading, and calls with torch tensors.

The library is called through ctypes: it is plain C, so it belongs to no version of Python or torch,
and the lock of the interpreter is free while it computes. A weight is described to it by pointers
into its canonical tensors.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from quantlib.errors import DataError, FormatError, QuantlibError, UsageError
from quantlib.formats.elements import code_book
from quantlib.formats.scheme import TENSOR, Segment, WeightFormat
from quantlib.formats.weight import (
    PACKED,
    ROW_SCALE,
    SCALE,
    ZERO_POINT,
    TensorLayout,
    decode_scales,
    packed_layout,
)
from quantlib.kernels.cpu import build
from quantlib.kernels.packed import parse_layout

ISAS = ("best", "portable", "avx2", "avx512")
"""Instruction sets, in the order of `QlIsa` in src/abi.h; "best" is the processor's best."""

_ABI_VERSION = 1
_NO_MEMORY, _NO_SUCH_ISA, _ROW_OUT_OF_RANGE = 1, 2, 3
"""QlStatus; 0 is success."""
_ROW_SCALE_KINDS = {torch.float16: 1, torch.float32: 2}


class _Segment(ctypes.Structure):
    """QlSegment of src/abi.h."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("code_book", ctypes.c_void_p),
        ("scale_book", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("scale_row_bytes", ctypes.c_int64),
        ("row_scale_stride", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("groups", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("scale_bits", ctypes.c_int32),
        ("row_scale_kind", ctypes.c_int32),
        ("zero_bits", ctypes.c_int32),
        ("zero_step", ctypes.c_float),
    )


class _Weight(ctypes.Structure):
    """QlWeight of src/abi.h."""

    _fields_ = (
        ("segments", ctypes.POINTER(_Segment)),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("segment_count", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Description:
    """A weight as the library sees it: pointers, not tensors, which the caller keeps alive."""

    weight: _Weight
    rows: int
    columns: int
    all_integer: bool


def describe(tensors: Sequence[Tensor], layout: str) -> Description:
    """Describe the tensors of a PackedWeight, in the order of its layout.

    Raises FormatError when they have other sizes than the layout says, or are not contiguous.
    """
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise FormatError("a packed tensor is not contiguous: build the weight with from_tensors")
    # Pointers, sizes and layout determine the whole description: a cached one is never stale.
    return _describe(layout, tuple(t.data_ptr() for t in tensors), tuple(t.nbytes for t in tensors))


@lru_cache(maxsize=16384)
def _describe(layout: str, pointers: tuple[int, ...], sizes: tuple[int, ...]) -> Description:
    shape, segments = parse_layout(layout)
    forms = packed_layout(shape, segments)
    expected = tuple(dtype.itemsize * math.prod(form) for dtype, form in forms.values())
    if sizes != expected:
        raise FormatError(
            f"the tensors of a weight {layout!r} have {expected} bytes, not {sizes}: "
            "take both from one PackedWeight"
        )
    at = dict(zip(forms, pointers))
    described = (_Segment * len(segments))(
        *(_describe_segment(segment, index, forms, at) for index, segment in enumerate(segments))
    )
    weight = _Weight(described, *shape, len(segments))
    return Description(weight, *shape, all(segment.format.is_integer for segment in segments))


def _describe_segment(
    segment: Segment, index: int, forms: TensorLayout, at: Mapping[str, int]
) -> _Segment:
    form, tail = segment.format, f"_{index}" if index else ""

    def row_bytes(kind: str) -> int:
        dtype, shape = forms[kind + tail]
        return dtype.itemsize * shape[-1]

    row_scale = forms.get(ROW_SCALE + tail)
    return _Segment(
        packed=at[PACKED + tail],
        scale=at[SCALE + tail],
        row_scale=at.get(ROW_SCALE + tail),
        zero_point=at.get(ZERO_POINT + tail),
        code_book=None if form.is_integer else code_book(form.element).data_ptr(),
        scale_book=None if form.scale == "f16" else _scale_book(form).data_ptr(),
        row_bytes=row_bytes(PACKED),
        scale_row_bytes=0 if form.group_size == TENSOR else row_bytes(SCALE),
        row_scale_stride=1 if form.two_level else 0,
        start=segment.start,
        length=segment.length,
        group_size=max(form.group_size, 0),
        groups=form.groups(segment.length),
        bits=form.bits,
        scale_bits=form.scale_bits,
        row_scale_kind=_ROW_SCALE_KINDS[row_scale[0]] if row_scale else 0,
        zero_bits=form.zero_bits,
        zero_step=form.zero_step,
    )


@cache
def _scale_book(form: WeightFormat) -> Tensor:
    """float32 [2^scale_bits]: what each stored scale code stands for, before the row's factor."""
    codes = torch.arange(1 << form.scale_bits, device="cpu").to(torch.uint8)[None]
    row_scale = torch.ones(1, dtype=torch.float32, device="cpu")
    return decode_scales(codes, row_scale, form)[0].contiguous()


class Library:
    """The loaded library. Tensors are contiguous float32 on the CPU: callers see to that, and to
    shapes; torch's default dtype and device do not matter."""

    def __init__(self, path: Path) -> None:
        """Load a file that `build` made. Raises OSError when the system or its version forbids."""
        self._c = ctypes.CDLL(str(path))
        self._c.ql_segment_bytes.restype = ctypes.c_int64
        made_for = self._c.ql_abi_version(), self._c.ql_segment_bytes()
        if made_for != (_ABI_VERSION, ctypes.sizeof(_Segment)):
            raise OSError(f"{path} has another interface than this version of quantlib: delete it")
        weight, pointer, size = ctypes.POINTER(_Weight), ctypes.c_void_p, ctypes.c_int64
        tail = [ctypes.c_int32, ctypes.c_int32]
        self._linear = {"int8": self._c.ql_linear_int8, "exact": self._c.ql_linear_exact}
        for function in self._linear.values():
            function.argtypes = [weight, pointer, size, pointer, pointer, *tail]
        self._c.ql_dequantize.argtypes = [weight, pointer, size, size, pointer, *tail]

    @property
    def isa(self) -> str:
        """The instruction set that "best" stands for on this processor."""
        return ISAS[self._c.ql_best_isa()]

    def supports(self, isa: str) -> bool:
        """Whether this processor can run the kernels of an instruction set of ISAS."""
        return bool(self._c.ql_supports_isa(ISAS.index(isa)))

    def linear(
        self,
        weight: Description,
        x: Tensor,
        bias: Tensor | None,
        mode: str,
        isa: str = "best",
        threads: int | None = None,
    ) -> Tensor:
        """x [M, K] -> [M, N]. Mode "int8" is for integer elements, "exact" for a few tokens.

        `threads` (default: torch's number) never changes a bit of the result.
        """
        out = x.new_empty(x.shape[0], weight.rows)
        status = self._linear[mode](
            weight.weight,
            x.data_ptr(),
            x.shape[0],
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            ISAS.index(isa),
            threads or torch.get_num_threads(),
        )
        _check(status, weight, isa)
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
        status = self._c.ql_dequantize(
            weight.weight,
            rows.data_ptr() if isinstance(rows, Tensor) else None,
            rows.start if isinstance(rows, range) else 0,
            len(rows),
            out.data_ptr(),
            ISAS.index(isa),
            threads or torch.get_num_threads(),
        )
        _check(status, weight, isa)
        return out


def _check(status: int, weight: Description, isa: str) -> None:
    """Raise the sentence that belongs to a QlStatus."""
    if status == _NO_MEMORY:
        raise QuantlibError("not enough memory for the kernel's work space: use shorter inputs")
    if status == _NO_SUCH_ISA:
        raise UsageError(f"this processor has no {isa}: leave the instruction set to 'best'")
    if status == _ROW_OUT_OF_RANGE:
        raise row_out_of_range(weight.rows)


def row_out_of_range(rows: int) -> DataError:
    """The error for a row that a weight of `rows` rows does not have."""
    return DataError(
        f"a token id is outside 0..{rows - 1}, the rows of this embedding: "
        "the tokenizer and the model do not belong together"
    )


@lru_cache(maxsize=1)
def load() -> Library | None:
    """The library, compiled at first use. None when there is none to be had: one warning."""
    try:
        return Library(build.find() or build.build())
    except (build.BuildError, OSError) as error:
        warnings.warn(
            f"quantlib computes with its torch reference, which is slow and as exact: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
