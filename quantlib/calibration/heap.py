"""Giving freed memory back between blocks.

A pass frees as much as it allocates, yet its process grows: glibc keeps what the activations of a
block have freed, small objects settle in between, and the next block's activations need new room.
Asking for the free pages once per block costs milliseconds and keeps the peak where it was after
the first (`tests/calibration/test_memory.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


def return_free_pages() -> None:
    """Return all free pages of the heap to the system, where the C library can."""
    _trim()(0)


@cache
def _trim() -> Callable[[int], int]:
    """glibc's `malloc_trim`; elsewhere a function that does nothing."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return lambda _: 0
    return trim
