"""Seconds of one product in the engine's inner loop: the Python side of `src/timing.cpp`.

The weight is random, of the wanted shape and format: what its numbers are changes nothing about how
long they take.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantlib.errors import QuantlibError, UsageError
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import PACKED, PLACES, ROW_SCALE, SCALE, packed_layout
from quantlib.kernels.cpu import library
from quantlib.kernels.layouts import TiledWeight, tile
from quantlib.kernels.packed import PackedWeight

if TYPE_CHECKING:
    from quantlib.kernels.timing import Op

_CACHES = 4
"""Weights that are timed fill so many of the largest cache. With two of them, a cache that does not
forget strictly in order still had a fifth of the bytes, and products came out as much too fast
(Zen 4, two threads)."""
_LEAST_FOOTPRINT = 64 << 20
_MOST_FOOTPRINT = 1 << 30
_TRIALS = 4
"""Passes over one copy, whose best says how many copies there is time for."""
_PASS_SECONDS = 0.02
"""A pass that takes longer makes do with fewer copies: it is not reading that takes the time."""
_TURN_SECONDS = 0.15
"""Likewise, all passes together with fewer of them."""
_FIRST_TWO = 0x44444444
"""Places of sparse weights: the first two of every four columns."""


def seconds(op: Op, threads: int, passes: int) -> list[float]:
    """What the product takes in each of up to `passes` passes, of which there is one at least.

    Raises QuantlibError when there is no memory for it.
    """
    weight = _tiled(op.rows, op.columns, op.scheme)
    alone = min(_passes(weight, op, 1, threads, _TRIALS))
    count = max(1, min(math.ceil(footprint() / weight.nbytes), int(_PASS_SECONDS / alone)))
    affordable = int(_TURN_SECONDS / (count * alone))
    return _passes(weight, op, count, threads, max(1, min(passes, affordable)))


def _passes(weight: TiledWeight, op: Op, copies: int, threads: int, passes: int) -> list[float]:
    kernels = library.load()
    assert kernels is not None  # it has tiled the weight
    found = (ctypes.c_double * passes)()
    status = _function(kernels)(
        weight.address,
        weight.memory.data_ptr(),
        weight.nbytes,
        copies,
        op.tokens,
        op.act_group,
        int(op.mode == "exact" or not weight.all_integer),
        library.ISAS.index("best"),
        threads,
        passes,
        found,
    )
    if status:
        raise QuantlibError(
            f"a weight of {op.rows} x {op.columns} in {op.scheme} cannot be timed: there is not "
            "enough memory; close other programs"
        )
    return list(found)


@cache
def footprint() -> int:
    """Bytes of which no cache of this machine holds a part worth speaking of, within limits."""
    sizes = [_LEAST_FOOTPRINT // _CACHES]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * unit)
    return min(_CACHES * max(sizes), _MOST_FOOTPRINT)


def random_weight(rows: int, columns: int, scheme: str, seed: int = 0) -> PackedWeight:
    """A weight of random codes, with scales that are numbers.

    Raises UsageError for a scheme that does not quantize.
    """
    parsed = Scheme.parse(scheme)
    if parsed.weight is None:
        raise UsageError(f"{scheme} leaves a weight as it is: there is nothing to time")
    segments = parsed.segments(columns)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for suffix, (dtype, shape) in packed_layout((rows, columns), segments).items():
        if suffix.startswith(PACKED):
            made = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator)
            tensors[suffix] = made.to(torch.uint8).view(dtype).view(shape)
        elif suffix.startswith((SCALE, ROW_SCALE)):
            tensors[suffix] = _scales(dtype, shape)
        elif suffix.startswith(PLACES):
            tensors[suffix] = torch.full(shape, _FIRST_TWO, dtype=dtype)
        else:
            tensors[suffix] = torch.zeros(shape, dtype=dtype)
    return PackedWeight.from_tensors(tensors, (rows, columns), segments)


def _scales(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Small numbers: halves and floats near 0.01; bytes that are NaN in none of their meanings."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.full(tuple(shape), 0.01, dtype=dtype)
    return (
        torch.full((math.prod(shape) * dtype.itemsize,), 7, dtype=torch.uint8)
        .view(dtype)
        .view(tuple(shape))
    )


@lru_cache(maxsize=4)
def _tiled(rows: int, columns: int, scheme: str) -> TiledWeight:
    return tile(random_weight(rows, columns, scheme))


def _function(kernels: library.Library) -> Any:
    function = kernels.functions.ql_time_strips
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    sizes, flags = [size] * 4, [flag] * 3
    function.argtypes = [pointer, pointer, *sizes, *flags, size, pointer]
    return function
