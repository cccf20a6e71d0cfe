"""Keep a C library from printing into our standard output.

The HiGHS that SciPy 1.15 to 1.17 ship prints a line of debugging text with `printf` when it
re-solves an integer point, whatever `disp` says. Standard output is where `--json` answers go, so
file descriptor 1 points to nowhere while HiGHS runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def no_stdout() -> Iterator[None]:
    """Discard what C code writes to standard output inside the `with`. A process without one runs
    as it is."""
    try:
        saved = os.dup(1)
    except OSError:
        yield
        return
    try:
        _flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield
    finally:
        _flush()
        os.dup2(saved, 1)
        os.close(saved)


def _flush() -> None:
    """Empty Python's and C's buffers, so that each side of the switch gets its own text."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)
