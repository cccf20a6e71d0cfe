"""Files that are either complete or absent, and disk trouble told as a sentence.

A file is written under a temporary name in the folder of its final one (a rename is atomic only
within one file system), hashed on the way so that nothing has to be read again, flushed to the
disk, and renamed. Whatever goes wrong before the rename removes the temporary file; what a SIGKILL
leaves behind is recognised by its suffix and removed by `remove_temporaries` the next time the
folder is opened.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from quantlib.errors import CheckpointError

TEMP_SUFFIX = ".tmp"
"""Ends the name, hidden by a leading dot, of every file that is still being written."""

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_CHUNK = 16 << 20
_temp_numbers = itertools.count()


class Sink:
    """A binary file being written: `write` only, counting and hashing what goes through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`, hashing each piece while it is still in the processor's cache."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            piece = view[start : start + _CHUNK]
            self._file.write(piece)
            self._hash.update(piece)
        self.nbytes += len(view)
        return len(view)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


Content = bytes | Callable[[Sink], None]
"""What to put in a file: its bytes, or a function that writes them to a sink piece by piece."""


@dataclass(frozen=True)
class PendingFile:
    """A finished file that is still under its temporary name: `publish` it or `discard` it."""

    path: Path
    temp: Path
    sha256: str
    nbytes: int

    @staticmethod
    def write(path: Path, content: Content, durable: bool = True) -> PendingFile:
        """Write `content` beside `path`.

        durable: wait until it is on the disk, so that it survives a power cut too.
        Raises CheckpointError, with nothing left behind, when the disk is full or not writable.
        """
        temp = path.with_name(f".{path.name}.{os.getpid()}-{next(_temp_numbers)}{TEMP_SUFFIX}")
        try:
            with disk_errors("write", path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(temp, "wb") as file:
                    sink = Sink(file)
                    sink.write(content) if isinstance(content, bytes) else content(sink)
                    file.flush()
                    if durable:
                        os.fsync(file.fileno())
        except BaseException:
            _unlink(temp)
            raise
        return PendingFile(path, temp, sink.sha256, sink.nbytes)

    def publish(self) -> None:
        """Give the file its final name, replacing what has it."""
        with disk_errors("write", self.path):
            os.replace(self.temp, self.path)

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        _unlink(self.temp)


def _unlink(temp: Path) -> None:
    with suppress(OSError):  # on the way out of another error, which is the one to report
        temp.unlink()


def atomic_write(
    path: str | os.PathLike[str], content: Content, durable: bool = True
) -> PendingFile:
    """Write a whole file or nothing. Returns its size and hash. Raises CheckpointError."""
    pending = PendingFile.write(Path(path), content, durable)
    try:
        pending.publish()
    except BaseException:
        pending.discard()
        raise
    if durable:
        sync_folder(pending.path.parent)
    return pending


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` as the whole of `path`, or leave what was there. Raises CheckpointError."""
    atomic_write(path, data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """`atomic_write_bytes` of `text` in UTF-8."""
    atomic_write(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`atomic_write_bytes` of `json_bytes(value)`."""
    atomic_write(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """JSON for people: two spaces, sorted keys, a final newline. ValueError for nan and inf."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises CheckpointError when it is missing or is not JSON."""
    path = Path(path)
    with disk_errors("read", path):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}): restore it or delete it"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the renames done in `folder` survive a power cut."""
    with disk_errors("write", folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove the unfinished files that killed processes left anywhere under `folder`.

    Only for a folder whose lock is held: the unfinished file of a living process would go too.
    """
    for orphan in folder.rglob(f".*{TEMP_SUFFIX}"):
        orphan.unlink(missing_ok=True)


@contextmanager
def disk_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError: what could not be done to `path`, why, what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(_explain(error, action, path)) from error


def _explain(error: OSError, action: str, path: Path) -> str:
    if error.errno in _FULL:
        folder = _existing_ancestor(path)
        free = size_text(shutil.disk_usage(folder).free)
        return (
            f"could not {action} {path}: {_FULL[error.errno]} ({free} free in {folder}). What was "
            "finished is kept: free some space and run the same command again"
        )
    if error.errno in _FORBIDDEN:
        return (
            f"could not {action} {path}: {error.strerror}. Choose a folder you may write to, or "
            "change its permissions"
        )
    return f"could not {action} {path}: {error.strerror or error}"


def require_free(path: str | os.PathLike[str], nbytes: int, purpose: str = "this") -> None:
    """Check, before work starts, that `path` can be written and has room for `nbytes` bytes.

    path: a folder that exists or will be made.
    Raises CheckpointError that says what is needed, what is free, and where.
    """
    folder = _existing_ancestor(Path(path))
    with disk_errors("write in", folder):
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=folder):
            pass  # the only sure test: permissions say nothing of a quota or a network mount
        free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(
            f"{purpose} needs {size_text(nbytes)} in {path} and {size_text(free)} is free there: "
            f"free {size_text(nbytes - free)} or choose a folder on another disk"
        )


def _existing_ancestor(path: Path) -> Path:
    """`path` itself when it exists, else the nearest folder above it that does."""
    path = path.absolute()
    while not os.path.exists(path) and path != path.parent:  # Path.exists may raise
        path = path.parent
    return path


def size_text(nbytes: int) -> str:
    """A size for people, in the decimal units that budgets are given in: 82.8 MB."""
    size = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
