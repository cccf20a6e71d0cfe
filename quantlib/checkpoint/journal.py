"""An append-only list of JSON lines that survives SIGKILL.

A line counts once its newline is on the disk. A process killed while it appends leaves at most one
torn line at the end, which is cut off when the journal is opened again; a bad line anywhere else
was not written by a kill, and is reported by its number instead of being guessed at.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from quantlib.checkpoint.disk import disk_errors
from quantlib.checkpoint.provenance import canonical_json
from quantlib.errors import CheckpointError

HEADER = {"journal": "quantlib", "version": 1}
"""First line of the file."""


class Journal:
    """The journal at `path`, created when missing; `lines` are its (line number, record) pairs.

    Raises CheckpointError for a file that is not a journal, or with a corrupt line before its last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors("open", path):
            self._descriptor = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
        try:
            self.lines = self._recover()
        except BaseException:
            self.close()
            raise

    def _recover(self) -> list[tuple[int, dict[str, Any]]]:
        with disk_errors("read", self.path):
            data = self.path.read_bytes()
        records, self._end = parsed(self.path, data)
        self._truncate()
        if not records:
            self.append([HEADER])
        return records[1:]

    def corrupt(self, number: int, why: str) -> CheckpointError:
        """The error for a bad line."""
        return corrupt(self.path, number, why)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Append records and flush them to the disk: all of them or, when it is full, none."""
        text = b"".join(canonical_json(record) + b"\n" for record in records)
        with disk_errors("write", self.path):
            try:
                rest = memoryview(text)
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                os.fsync(self._descriptor)
            except BaseException:
                self._truncate()
                raise
        self._end += len(text)

    def _truncate(self) -> None:
        with disk_errors("write", self.path):
            os.ftruncate(self._descriptor, self._end)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class ReadJournal:
    """The journal at `path` as it is now, for a reader beside the process that appends to it: a
    line that is being written does not count, and nothing can be appended.

    Raises CheckpointError as `Journal`, and when there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors("read", path):
            data = path.read_bytes()
        self.lines = parsed(path, data)[0][1:]

    def corrupt(self, number: int, why: str) -> CheckpointError:
        """The error for a bad line."""
        return corrupt(self.path, number, why)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Refused for results; what was found damaged is forgotten by this reader alone."""
        if any("forget" not in record for record in records):
            raise CheckpointError(
                f"{self.path.parent} was opened for reading only, and results cannot be recorded"
            )

    def close(self) -> None:
        """Nothing is open."""


def parsed(path: Path, data: bytes) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """((line number, record) pairs, header included, and the bytes up to the last whole line) of a
    journal's content. Raises CheckpointError as `Journal`."""
    *complete, torn = data.split(b"\n")
    records: list[tuple[int, dict[str, Any]]] = []
    end = len(data) - len(torn)
    for number, line in enumerate(complete, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number < len(complete):
                raise corrupt(path, number, "it is not JSON") from error
            end -= len(line) + 1
            break
        if not isinstance(record, dict):
            raise corrupt(path, number, "it is not a record")
        records.append((number, record))
    if records and records[0][1] != HEADER:
        raise CheckpointError(
            f"{path} is not a journal of this version of quantlib (its first line should "
            f"be {json.dumps(HEADER)}): choose another work directory, or delete this one to "
            "start again"
        )
    return records, end


def corrupt(path: Path, number: int, why: str) -> CheckpointError:
    """The error for a bad line."""
    return CheckpointError(
        f"line {number} of {path} is corrupt ({why}): delete that line and what it recorded is "
        "computed again"
    )
