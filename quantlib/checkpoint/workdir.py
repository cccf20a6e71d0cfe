"""The work directory: units of work that are done once, whatever interrupts them.

A unit is a key (a hash of everything its result depends on), a kind, and the files it made. Its
files are written first, each complete or absent; one journal line then makes the unit exist. A
process killed anywhere leaves units that exist, units that do not, and files nobody refers to: the
same command, run again, finds the first with `has` and does the rest. Content hashes are written
with the line and compared when a file is first used, so a damaged file is found before it is
trusted; its unit is then forgotten, and the next run computes it again.

    with WorkDir.open("work") as work:
        key = work.key("statistics", source=source.fingerprint, data=data_hash, layer=3)
        if not work.has(key):
            work.commit(key, "statistics", {"layer3.safetensors": tensor_content(tensors)})
        tensors = read_tensors(work.file(key))

One process owns the directory at a time (`lock.py`), and within it one thread uses this object.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from quantlib.checkpoint.disk import (
    Content,
    PendingFile,
    disk_errors,
    remove_temporaries,
    sync_folder,
)
from quantlib.checkpoint.journal import Journal, ReadJournal
from quantlib.checkpoint.lock import FolderLock
from quantlib.checkpoint.provenance import canonical_json, digest, file_sha256
from quantlib.errors import CheckpointError

JOURNAL_NAME = "journal.jsonl"
LOCK_NAME = "lock"


@dataclass(frozen=True)
class FileRecord:
    """A finished file, as the journal remembers it."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Unit:
    """A finished unit of work: a line of the journal.

    files:   path relative to the work directory, with "/" -> record.
    values:  small results that are wanted without opening a file (JSON).
    seconds: how long it took; for estimates, no part of any result.
    """

    key: str
    kind: str
    files: dict[str, FileRecord]
    values: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class WorkDir:
    """An open, locked work directory, or a reader's view of one. Make one with `WorkDir.open` or
    `WorkDir.view`."""

    def __init__(self, path: Path, lock: FolderLock | None) -> None:
        """Read the journal of `path`, whose `lock` is held, or which is only read. Use `open`."""
        self.path = path
        self._lock = lock
        self._units: dict[str, Unit] = {}
        self._owners: dict[str, str] = {}
        self._verified: set[str] = set()
        self._journal: Journal | ReadJournal
        if lock is None:
            self._journal = ReadJournal(path / JOURNAL_NAME)
        else:
            remove_temporaries(path)
            self._journal = Journal(path / JOURNAL_NAME)
        for number, record in self._journal.lines:
            try:
                self._replay(record)
            except (KeyError, TypeError, AttributeError) as error:
                self._journal.close()
                raise self._journal.corrupt(number, f"{type(error).__name__}: {error}") from error

    @staticmethod
    def open(path: str | os.PathLike[str], command: str | None = None) -> WorkDir:
        """Open a work directory or create it, and lock it until `close` or the process ends.

        command: what other processes are told that this one is doing; by default its command line.

        Raises CheckpointError when another process has it, when it cannot be written, when the
        folder holds something else, or when a line of its journal other than the last is corrupt.
        """
        folder = Path(path)
        with disk_errors("open the work directory", folder):
            folder.mkdir(parents=True, exist_ok=True)
            names = {entry.name for entry in folder.iterdir()}
            if names and not names & {JOURNAL_NAME, LOCK_NAME}:
                raise CheckpointError(
                    f"{folder} is not a work directory and is not empty: choose a new or an empty "
                    "folder"
                )
            lock = FolderLock(folder / LOCK_NAME, command)
            try:
                return WorkDir(folder, lock)
            except BaseException:
                lock.release()
                raise

    @staticmethod
    def view(path: str | os.PathLike[str]) -> WorkDir:
        """What is finished in a work directory now, to be read beside the process that has it open.

        Committing raises CheckpointError; so does a folder that is no work directory.
        """
        return WorkDir(Path(path), None)

    def close(self) -> None:
        """Unlock the directory. Everything committed is on the disk already."""
        self._journal.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @staticmethod
    def key(kind: str, **inputs: Any) -> str:
        """The key of a unit: SHA-256 of its kind and of all its result depends on (JSON values)."""
        return digest({"kind": kind, "inputs": inputs})

    def has(self, key: str) -> bool:
        """Whether the unit is finished: journalled, and its files there with the right sizes."""
        unit = self._units.get(key)
        return unit is not None and all(
            self._present(name, unit.files[name]) for name in unit.files
        )

    def _present(self, name: str, record: FileRecord) -> bool:
        try:
            return os.stat(self.path / name).st_size == record.nbytes
        except OSError:
            return False

    def unit(self, key: str) -> Unit:
        """The journal's record of a unit. Raises CheckpointError when there is none."""
        if key not in self._units:
            raise CheckpointError(
                f"{self.path} has no result under the key {key[:12]}: run the stage that makes it"
            )
        return self._units[key]

    def units(self, kind: str | None = None) -> Iterator[Unit]:
        """The units in the journal (of one kind), in the order in which they were finished."""
        return iter([unit for unit in self._units.values() if kind in (None, unit.kind)])

    def file(self, key: str, name: str | None = None) -> Path:
        """The path of a unit's file (its only one, without a name). Its hash is checked once.

        Raises CheckpointError when there is no such unit, or when the file is missing or damaged;
        the unit is then forgotten, so that running the same command again makes it anew.
        """
        unit = self.unit(key)
        if name is None:
            (name,) = unit.files
        if not self.intact(key):
            raise CheckpointError(
                f"{self.path / name} or a file made with it is missing or damaged (it differs from "
                "what the journal recorded): it has been dropped; run the same command again and "
                "it is computed anew"
            )
        return self.path / name

    def intact(self, key: str) -> bool:
        """Whether the unit is finished and its files hash as recorded; if not, it is forgotten."""
        if key in self._verified and self.has(key):
            return True
        unit = self._units.get(key)
        if unit is None:
            return False
        files = unit.files.items()
        if self.has(key) and all(
            file_sha256(self.path / name) == record.sha256 for name, record in files
        ):
            self._verified.add(key)
            return True
        self.forget(key)
        return False

    def forget(self, *keys: str) -> None:
        """Take units back: `has` is False from now on. Their files stay until written again."""
        self._record([{"forget": key} for key in keys if key in self._units])

    def commit(
        self,
        key: str,
        kind: str,
        files: Mapping[str, Content],
        values: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
    ) -> Unit:
        """Write a unit's files and record it. A unit that had a file of the same name is forgotten.

        files:  path relative to the work directory, with "/" -> content.
        values: finite JSON values that are wanted without opening a file.
        Raises CheckpointError, with nothing half-written, when the disk is full or not writable.
        """
        with self.batch() as batch:
            return batch.add(key, kind, files, values, seconds)

    @contextmanager
    def batch(self, durable: bool = True) -> Iterator[Batch]:
        """Several units that are recorded together when the block ends, or not at all.

        durable: False leaves the files to the kernel's write-back, which is several times faster
                 for many small files. A kill loses nothing then either; after a power cut their
                 hashes show which ones have to be made again.
        """
        if self._lock is None:
            raise CheckpointError(f"the work directory {self.path} was opened for reading only")
        if not self._lock.held:
            raise CheckpointError(f"the work directory {self.path} has been closed")
        batch = Batch(self.path, durable)
        try:
            yield batch
            self._publish(batch)
        finally:
            for pending in batch.pending:
                pending.discard()

    def _publish(self, batch: Batch) -> None:
        """Forget, rename, record: at no moment does a line describe what a file no longer holds."""
        names = [name for unit in batch.units for name in unit.files]
        outdated = {self._owners[name] for name in names if name in self._owners}
        self.forget(*sorted(outdated | {unit.key for unit in batch.units}))
        for pending in batch.pending:
            pending.publish()
        if batch.durable:
            for folder in sorted({pending.path.parent for pending in batch.pending}):
                sync_folder(folder)
        self._record([asdict(unit) for unit in batch.units])

    def _record(self, records: list[dict[str, Any]]) -> None:
        if not records:
            return
        self._journal.append(records)
        for record in records:
            self._replay(record)

    def _replay(self, record: dict[str, Any]) -> None:
        """Bring the state in memory up to date with one journal line."""
        if "forget" in record:
            unit = self._units.pop(record["forget"], None)
            for name in unit.files if unit else ():
                self._owners.pop(name, None)
            self._verified.discard(record["forget"])
            return
        files = {name: FileRecord(**described) for name, described in record["files"].items()}
        unit = Unit(**{**record, "files": files})
        self._units[unit.key] = unit
        self._owners.update(dict.fromkeys(files, unit.key))


class Batch:
    """Units on their way into the journal: each one's files are on the disk when it is added."""

    def __init__(self, folder: Path, durable: bool) -> None:
        self.durable = durable
        self.units: list[Unit] = []
        self.pending: list[PendingFile] = []
        self._folder = folder

    def add(
        self,
        key: str,
        kind: str,
        files: Mapping[str, Content],
        values: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
    ) -> Unit:
        """Write a unit's files under temporary names; see `WorkDir.commit`."""
        try:
            canonical_json(values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the values of a {kind} result cannot be recorded: {error}"
            ) from error
        records = {}
        for name, content in files.items():
            pending = PendingFile.write(self._folder / name, content, self.durable)
            self.pending.append(pending)
            records[name] = FileRecord(pending.sha256, pending.nbytes)
        unit = Unit(key, kind, records, dict(values or {}), seconds)
        self.units.append(unit)
        return unit
