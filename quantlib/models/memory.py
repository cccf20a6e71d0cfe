"""Memory for weights that goes back to the system the moment it is freed.

A pass over a model loads and frees one block after the other. Through malloc the process grows with
the number of blocks although nothing is kept: holes left by freed tensors are taken by small
objects, and the next block's tensors no longer fit (`tests/models/test_skeleton.py` measures it). A
private anonymous mapping per weight has no such history.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALL = 64 << 10
"""Below this many bytes a mapping of whole pages wastes more than malloc does."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, in a mapping of its own unless it is small."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _SMALL:
        return torch.empty(tuple(shape), dtype=dtype)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))
