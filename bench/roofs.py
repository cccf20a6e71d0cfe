"""What this machine gives at most: bytes per second of plain reads, 8-bit operations per second in
registers. No kernel can be faster than the larger of the two times its work takes there.

Both are measured by C++ (`kernels/cpu/src/roofs.cpp`), on as many threads as torch uses, the reads
in 2 MiB pages where the system gives them. `Roofs` is a candidate of `timing.interleaved`, so that
the roof is that of the very seconds in which kernels ran.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from dataclasses import dataclass

import torch

from quantlib.bench.timing import quartiles
from quantlib.errors import QuantlibError
from quantlib.kernels.cpu import build

READ_BYTES = 256 << 20
"""More than any cache holds."""
PARTS = 4
"""Read in turn: two milliseconds each, so that the roof is disturbed as often as a kernel is."""
_HUGE_PAGE = 2 << 20
_STREAMS = (1, 2, 4)
_AHEAD = (0, 512, 1024, 2048)


@dataclass(frozen=True)
class Measured:
    """Bytes and 8-bit operations per second; the latter is 0 where it is not known."""

    read_bytes_per_s: float
    operations_per_s: float

    def seconds(self, nbytes: int, operations: float) -> float:
        """The shortest time that reading `nbytes` and doing `operations` can take."""
        reading = nbytes / self.read_bytes_per_s
        return max(reading, operations / self.operations_per_s if self.operations_per_s else 0.0)

    def to_json(self) -> dict[str, float | None]:
        return {
            "read_gb_per_s": self.read_bytes_per_s / 1e9,
            "multiply_gop_per_s": self.operations_per_s / 1e9 or None,
        }


class Roofs:
    """A buffer to read, what was measured since the last `take`, and the best of all."""

    def __init__(self, threads: int | None = None) -> None:
        """Raises QuantlibError when the kernels cannot be compiled: nothing else can read as fast.

        threads: torch's number unless given.
        """
        self.threads = threads or torch.get_num_threads()
        self._c = _functions()
        unit = 256 * self.threads  # what ql_read_seconds asks for
        self._part = READ_BYTES // PARTS // unit * unit
        self._map = mmap.mmap(-1, PARTS * self._part + _HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        # Held by the map's buffer interface, so the address stays valid as long as this object.
        self._view = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        self._data = -(-ctypes.addressof(self._view) // _HUGE_PAGE) * _HUGE_PAGE
        ctypes.memset(self._data, 1, PARTS * self._part)
        self.best = Measured(0.0, 0.0)
        self._turn = 0
        self._reads: list[float] = []
        self._peaks: list[float] = []
        self._fastest = self._fastest_way()

    def __call__(self, _: int = 0) -> None:
        """Measure both once."""
        self._reads.append(self._read(*self._fastest))
        self._peaks.append(self._c.ql_multiply_peak(self.threads))

    def take(self) -> Measured:
        """The medians of all measurements since the last call, at least one."""
        if not self._reads:
            self()
        found = Measured(quartiles(self._reads).median, quartiles(self._peaks).median)
        self.best = Measured(
            max(self.best.read_bytes_per_s, *self._reads),
            max(self.best.operations_per_s, *self._peaks),
        )
        self._reads, self._peaks = [], []
        return found

    def _read(self, streams: int, ahead: int) -> float:
        self._turn = (self._turn + 1) % PARTS
        data = self._data + self._turn * self._part
        seconds = self._c.ql_read_seconds(data, self._part, self.threads, streams, ahead)
        if not seconds > 0:
            raise QuantlibError(
                f"the system gives no {self.threads} threads: set OMP_NUM_THREADS to fewer"
            )
        return self._part / seconds

    def _fastest_way(self) -> tuple[int, int]:
        """The number of parallel reads and of bytes to prefetch that this machine likes best."""
        ways = list(itertools.product(_STREAMS, _AHEAD))
        best = dict.fromkeys(ways, 0.0)
        for _, way in itertools.product(range(3), ways):
            best[way] = max(best[way], self._read(*way))
        return max(ways, key=lambda way: best[way])


def _functions() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(build.find() or build.build()))
    except (build.BuildError, OSError) as error:
        raise QuantlibError(f"nothing can be timed without the CPU kernels: {error}") from error
    library.ql_read_seconds.restype = library.ql_multiply_peak.restype = ctypes.c_double
    library.ql_read_seconds.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64
    ]  # fmt: skip
    library.ql_multiply_peak.argtypes = [ctypes.c_int32]
    return library
