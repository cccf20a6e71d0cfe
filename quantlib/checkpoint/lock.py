"""One process per folder: an advisory lock that dies with its process, so that none is ever stale.

`flock` belongs to an open file, and the kernel closes the files of a process however it ends. A pid
file cannot promise that. The file's text (who holds it) is only for the other process's error
message.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import weakref
from pathlib import Path

from quantlib.errors import CheckpointError

_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """The exclusive lock of a folder, held until `release` or the end of the process.

    Raises CheckpointError, naming the process that holds it, when the lock is taken (by this
    process too). OSErrors of opening the file pass through.
    """

    def __init__(self, path: Path, command: str | None = None) -> None:
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (open as long as the lock is held)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise CheckpointError(_busy(path)) from None
        except OSError as error:
            self._file.close()
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            raise CheckpointError(
                f"the file system of {path.parent} has no file locks: choose a folder on a local "
                "disk"
            ) from error
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": command if command is not None else shlex.join(sys.argv),
        }
        self._file.truncate(0)
        self._file.write(json.dumps(holder).encode("utf-8"))
        _held.add(self)

    @property
    def held(self) -> bool:
        return not self._file.closed

    def release(self) -> None:
        """Give the lock back.

        The file stays: removing it would let two later processes lock two different files.
        """
        if self.held:
            self._file.truncate(0)
            self._file.close()

    def abandon(self) -> None:
        """Close this process's copy of an inherited lock; the process that took it keeps it."""
        self._file.close()


def _busy(path: Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        who = f"process {holder['pid']} on {holder['host']} ({holder['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"  # that has taken the lock and not signed it yet
    return (
        f"{path.parent} is in use by {who}: wait until it has ended, stop it, or choose another "
        "folder"
    )


def _forget_in_child() -> None:
    """Close the lock in a forked child, which inherits it: an orphaned worker would keep it."""
    for lock in list(_held):
        lock.abandon()


os.register_at_fork(after_in_child=_forget_in_child)
