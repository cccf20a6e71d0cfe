"""A folder that is complete or absent: written beside its place, then renamed.

While it is being written it is `NAME.partial-<hash>` and locked. The lock tells a living process's
folder from one that a killed process left, which the next run removes. Linux has no portable way to
swap two folders in one step, so a folder that is replaced steps aside as `NAME.replaced-<hash>` for
the moment between two renames; a run that is killed exactly then puts it back when it is run again.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantlib.checkpoint.disk import disk_errors, sync_folder
from quantlib.checkpoint.lock import FolderLock
from quantlib.errors import CheckpointError

LOCK_NAME = "lock"


def resolved(path: str | os.PathLike[str]) -> Path:
    """`path` without links: renaming onto a symbolic link would replace the link."""
    return Path(os.path.realpath(path))


@contextmanager
def staged(path: Path, mark: str) -> Iterator[Path]:
    """A locked folder that takes the place of `path` when the block ends, or vanishes."""
    partial = path.with_name(f"{path.name}.partial-{mark}")
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path, partial)
        partial.mkdir()
        lock = FolderLock(partial / LOCK_NAME)
        try:
            yield partial
            sync_folder(partial)
            _move_into_place(partial, path, mark)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.release()


def _move_into_place(partial: Path, path: Path, mark: str) -> None:
    """Rename `partial` to `path`. What was there steps aside first and is removed last."""
    replaced = path.with_name(f"{path.name}.replaced-{mark}")
    if path.exists() and any(path.iterdir()):
        path.rename(replaced)
    partial.rename(path)  # over an empty folder, too
    # Not before: while it is there, `_remove_leftovers` of another process keeps its hands off.
    (path / LOCK_NAME).unlink()
    sync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_leftovers(path: Path, own: Path) -> None:
    """Clear what killed runs left beside `path`, and what no living process has locked."""
    pattern = re.compile(re.escape(path.name) + r"\.(partial|replaced)-[0-9a-f]{12}")
    for sibling in sorted(path.parent.iterdir()):
        match = pattern.fullmatch(sibling.name)
        if match is None or not sibling.is_dir():
            continue
        if match[1] == "replaced" and not path.exists():
            sibling.rename(path)  # killed between the two renames: it is all there is
            continue
        try:
            lock = FolderLock(sibling / LOCK_NAME)
        except CheckpointError:
            if sibling == own:
                raise
            continue
        shutil.rmtree(sibling)
        lock.release()
