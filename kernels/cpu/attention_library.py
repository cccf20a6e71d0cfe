"""The compiled KV cache and attention from Python: src/kv_cache.h and src/kv_api.cpp by ctypes.

Tensors are contiguous and on the CPU; callers (`quantlib.kernels.kv_cache`) see to that, to shapes
and to positions.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from quantlib.errors import QuantlibError, UsageError
from quantlib.kernels.cpu import library
from quantlib.kernels.kv_format import KvFormat, SideFormat

_NO_MEMORY, _NO_SUCH_ISA = 1, 2
"""QlStatus; 0 is success."""


class _Side(ctypes.Structure):
    """ql::KvFormat."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("wide", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("rotate", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """ql::KvLayer: one layer of a cache, in memory that the caller keeps alive."""

    _fields_ = (
        ("key", _Side),
        ("value", _Side),
        ("batch", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("sinks", ctypes.c_int64),
        ("sink_keys", ctypes.c_void_p),
        ("sink_values", ctypes.c_void_p),
    )


class _Shape(ctypes.Structure):
    """ql::AttentionShape."""

    _fields_ = (
        ("heads", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("integer", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


def describe_layer(
    form: KvFormat,
    head_dim: int,
    keys: Tensor,
    values: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
) -> Layer:
    """A layer from uint8 keys and values [batch, kv_heads, blocks, bytes of a block] and float32
    sinks [batch, kv_heads, floats], as src/kv_cache.h has them."""
    batch, kv_heads, blocks, _ = keys.shape
    return Layer(
        _side(form.key),
        _side(form.value),
        batch,
        kv_heads,
        head_dim,
        blocks * 64,
        keys.data_ptr(),
        values.data_ptr(),
        form.sinks,
        sink_keys.data_ptr(),
        sink_values.data_ptr(),
    )


def _side(form: SideFormat) -> _Side:
    return _Side(form.bits, form.wide, form.group, int(form.rotate))


class AttentionLibrary:
    """The entry points of src/kv_api.cpp. `isa` is a name of `library.ISAS`; `threads` (default:
    torch's number) never changes a bit of the result."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        """Raises OSError for a library with other structs."""
        self._c = loaded
        sizes = (ctypes.c_int64 * 3)()
        self._c.ql_kv_struct_bytes(sizes)
        if tuple(sizes) != tuple(map(ctypes.sizeof, (_Side, Layer, _Shape))):
            raise OSError(
                "the compiled kernels have another KV cache than this version: delete them"
            )
        layer, pointer, size = ctypes.POINTER(Layer), ctypes.c_void_p, ctypes.c_int64
        tail = [ctypes.c_int32, ctypes.c_int32]
        self._c.ql_kv_block_bytes.argtypes = [ctypes.POINTER(_Side), size]
        self._c.ql_kv_block_bytes.restype = size
        self._c.ql_kv_append.argtypes = [layer, size, size, *[pointer] * 4, *tail]
        self._c.ql_attend.argtypes = [
            layer,
            ctypes.POINTER(_Shape),
            size,
            size,
            *[pointer] * 4,
            *tail,
        ]
        self._c.ql_kv_dequantize.argtypes = [layer, size, size, pointer, pointer, ctypes.c_int32]

    def block_bytes(self, form: SideFormat, head_dim: int) -> int:
        """Bytes of 64 positions of one head as the kernels see it; -1 for an impossible format."""
        return int(self._c.ql_kv_block_bytes(_side(form), head_dim))

    def append(
        self,
        layer: Layer,
        sequences: Tensor,
        firsts: Tensor,
        keys: Tensor,
        values: Tensor,
        isa: str = "best",
        threads: int | None = None,
    ) -> None:
        """Store keys and values [n, T, kv_heads, head_dim] at positions firsts[i] and on of
        sequences[i] (int64 [n], all different)."""
        status = self._c.ql_kv_append(
            layer,
            *keys.shape[:2],
            sequences.data_ptr(),
            firsts.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            library.ISAS.index(isa),
            threads or torch.get_num_threads(),
        )
        _check(status, isa)

    def attend(
        self,
        layer: Layer,
        sequences: Tensor,
        firsts: Tensor,
        query: Tensor,
        scale: float,
        window: int,
        softcap: float,
        integer: bool = False,
        isa: str = "best",
        threads: int | None = None,
    ) -> Tensor:
        """query [n, T, heads, head_dim] at positions firsts[i] and on -> the same shape.

        integer: multiply packed keys and values in integers (src/attention.h).
        """
        out = torch.empty_like(query)
        status = self._c.ql_attend(
            layer,
            _Shape(query.shape[2], window, scale, softcap, int(integer)),
            *query.shape[:2],
            sequences.data_ptr(),
            firsts.data_ptr(),
            query.data_ptr(),
            out.data_ptr(),
            library.ISAS.index(isa),
            threads or torch.get_num_threads(),
        )
        _check(status, isa)
        return out

    def dequantize(
        self, layer: Layer, sequence: int, length: int, isa: str = "best"
    ) -> tuple[Tensor, Tensor]:
        """Keys and values float32 [length, kv_heads, head_dim] of a sequence's first positions."""
        shape = (length, layer.kv_heads, layer.head_dim)
        keys = torch.empty(shape, dtype=torch.float32, device="cpu")
        values = torch.empty_like(keys)
        status = self._c.ql_kv_dequantize(
            layer, sequence, length, keys.data_ptr(), values.data_ptr(), library.ISAS.index(isa)
        )
        _check(status, isa)
        return keys, values


def _check(status: int, isa: str) -> None:
    """Raise the sentence that belongs to a QlStatus."""
    if status == _NO_MEMORY:
        raise QuantlibError("not enough memory for attention's work space: use shorter inputs")
    if status == _NO_SUCH_ISA:
        raise UsageError(f"this processor has no {isa}: leave the instruction set to 'best'")


@lru_cache(maxsize=1)
def load() -> AttentionLibrary | None:
    """The compiled kernels; None when there are none to be had (`library.load` warns)."""
    loaded = library.load()
    return None if loaded is None else AttentionLibrary(loaded.functions)
