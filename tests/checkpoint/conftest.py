"""Processes that are killed, and disks that fill up, on demand."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DISK_CALLS = ("replace", "rename", "unlink", "fsync", "mkdir", "rmdir", "ftruncate", "write")
"""What changes a disk, as functions of `os`: pathlib, shutil and our own code end up in these."""


def in_child(work: Callable[[], object], kill_at: int | None = None) -> int | None:
    """Run `work` in a forked process; None if SIGKILL ended it, else the number of disk calls made.

    kill_at: the process kills itself instead of making this call (from 0); a write that is killed has
    put half of its bytes on the disk. A fork costs milliseconds where an interpreter costs seconds.
    """
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            calls = _count_calls(kill_at)
            work()
            done = calls()
            _original_write(writable, str(done).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return int(answer)


_original_write = os.write


def _count_calls(kill_at: int | None) -> Callable[[], int]:
    count = 0

    def counted(name: str) -> Callable[..., object]:
        original = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            if count == kill_at:
                if name == "write":
                    descriptor, data = arguments
                    _original_write(descriptor, bytes(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return original(*arguments, **options)

        return call

    for name in DISK_CALLS:
        setattr(os, name, counted(name))
    return lambda: count


@pytest.fixture
def run_in_child() -> Callable[..., int | None]:
    return in_child


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """`with full_disk(after=n):` the (n+1)-th byte written by quantlib finds the disk full."""
    from quantlib.checkpoint.disk import Sink

    @contextmanager
    def fill(after: int) -> Iterator[None]:
        room = after
        whole_write, whole_sink = os.write, Sink.write

        def take(nbytes: int) -> int:
            nonlocal room
            taken = min(nbytes, room)
            room -= taken
            return taken

        def write(descriptor: int, data: bytes) -> int:
            taken = take(len(data))
            if taken == 0 and len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return whole_write(descriptor, bytes(data)[:taken])

        def sink_write(self: Sink, data: bytes) -> int:
            size = memoryview(data).nbytes
            if take(size) < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return whole_sink(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            patch.setattr(Sink, "write", sink_write)
            yield

    return fill


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder by relative name: two folders are equal when these are."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def folder_contents() -> Callable[[Path], dict[str, bytes]]:
    return contents
