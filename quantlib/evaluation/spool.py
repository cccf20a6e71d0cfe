"""Float32 matrices that wait on the disk until the other model has been run.

The log-probabilities of a few thousand positions over a vocabulary of 150,000 words are gigabytes.
A spool is one unnamed temporary file: written once, read in any order, gone when it is closed or
when the process ends, however it ends.
"""

from __future__ import annotations

import io
import math
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from quantlib.checkpoint.disk import disk_errors


class Spool:
    """Matrices by number, in the order in which they were added."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.gettempdir())
        with disk_errors("write", self._folder):
            self._file: io.BufferedRandom = tempfile.TemporaryFile()  # noqa: SIM115 - until close
        self._places: list[tuple[int, tuple[int, ...]]] = []
        self._end = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """What it takes of the disk."""
        return self._end

    def add(self, matrix: Tensor) -> None:
        """Append a matrix, of any shape. Raises CheckpointError when the disk is full."""
        stored = matrix.detach().to("cpu", torch.float32).contiguous()
        with disk_errors("write", self._folder):
            self._file.seek(self._end)
            self._file.write(stored.numpy().tobytes())
            self._file.flush()
        self._places.append((self._end, tuple(stored.shape)))
        self._end += stored.nbytes

    def __getitem__(self, index: int) -> Tensor:
        """A copy of the matrix that was added as number `index`."""
        start, shape = self._places[index]
        with disk_errors("read", self._folder):
            self._file.seek(start)
            raw = bytearray(self._file.read(4 * math.prod(shape)))
        return torch.frombuffer(raw, dtype=torch.float32).view(shape)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
