"""Plans measured by several processes: a queue and a record in one file, which is Optuna's journal.

A trial is a plan (weight -> scheme) and, once measured, its losses. Whoever wants plans measured
adds them; workers claim those that wait, one at a time, and write down what they found. The file
is appended to under a lock and never rewritten, so a process may be killed anywhere: what is
finished stays, and what a dead worker had claimed is given to another. What a plan loses depends on
the plan alone, so results are the same with any number of workers, in any order.

Optuna (extra `trials`) brings the file format, its lock, which works on network file systems too,
and the states of a trial; the plans to try come from the search, which knows the problem.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, Self

from quantlib.errors import SearchError, UsageError
from quantlib.search import jsonfile

Schemes = Mapping[str, str]
"""Weight -> scheme."""
Losses = list[float]
"""Of one plan, what a search asks for: the KL of every window."""
Measure = Callable[[Schemes], Sequence[float]]

STUDY = "quantlib trials"
PLAN, LOSSES, WORKER, SETTINGS, DIGEST = "plan", "losses", "worker", "settings", "digest"
ATTEMPTS = 3
"""Workers that may die over the same plan before the plan is at fault."""
POLL = 0.1
"""Seconds between looks at the journal. A trial takes seconds."""
FAILED = 3
"""Exit code of a worker that has said what went wrong: another would fail alike."""
GRACE = 10
"""Seconds after which the lock of the journal's file is taken from a process that died with it."""


class Pool(Protocol):
    """Who measures plans."""

    def measure(self, plans: Sequence[Schemes]) -> list[Losses]:
        """The losses of plans, in their order. Raises SearchError when one cannot be measured."""
        ...


class OpenPool(ABC):
    """A pool that holds processes: a context, which ends them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """End the processes."""


@dataclass(frozen=True)
class Claim:
    """A trial that a worker has taken."""

    trial: int
    schemes: dict[str, str]


class TrialJournal:
    """The journal at `path`, created when missing.

    settings: everything that losses depend on besides the plan: model, bank, windows. Raises
    UsageError without Optuna, and SearchError for a file that is no journal or has other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise UsageError(
                "measuring trials in several processes needs Optuna: pip install "
                "'quantlib-torch[trials]'"
            )
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.path, self._optuna = Path(path), optuna
        self._states = optuna.trial.TrialState
        lock = _MendingLock(JournalFileSymlinkLock(str(path), grace_period=GRACE), self.path)
        try:
            backend = JournalFileBackend(str(path), lock_obj=lock)
            self._storage = optuna.storages.JournalStorage(backend)
            study = optuna.create_study(
                storage=self._storage, study_name=STUDY, load_if_exists=True
            )
        except (ValueError, KeyError, TypeError, AssertionError, OSError) as error:
            # of what is no JSON on one line, Optuna says with an assertion that it cannot be
            raise SearchError(
                f"{path} cannot be used as a journal of trials ({error}): delete it, or name "
                "another file"
            ) from error
        self._study = study
        self._check(settings)

    def _check(self, settings: Mapping[str, Any]) -> None:
        mine = jsonfile.dump(dict(settings))
        known = self._study.user_attrs.get(SETTINGS)
        if known is None:
            self._study.set_user_attr(SETTINGS, mine)
        elif known != mine:
            raise SearchError(
                f"the trials in {self.path} were measured with other settings (another model, "
                "calibration or number of threads): delete the file, or restore the settings"
            )

    def add(self, schemes: Schemes) -> str:
        """Queue a plan, unless it is there already; returns its digest."""
        digest = digest_of(schemes)
        known = {self._states.COMPLETE, self._states.RUNNING, self._states.WAITING}
        if not any(trial.state in known for trial in self._trials(digest)):
            self._study.enqueue_trial({}, {DIGEST: digest, PLAN: jsonfile.dump(dict(schemes))})
        return digest

    def claim(self, worker: str) -> Claim | None:
        """Take the first plan that waits; None when none does."""
        for trial in self._study.get_trials(deepcopy=False, states=(self._states.WAITING,)):
            if self._taken(trial._trial_id):
                self._storage.set_trial_user_attr(trial._trial_id, WORKER, worker)
                plan = jsonfile.parse_object(trial.user_attrs[PLAN], str(self.path))
                return Claim(trial._trial_id, {str(name): str(s) for name, s in plan.items()})
        return None

    def _taken(self, trial: int) -> bool:
        """Whether this process is now the one that measures a trial."""
        try:
            return bool(self._storage.set_trial_state_values(trial, self._states.RUNNING))
        except self._optuna.exceptions.UpdateFinishedTrialError:
            return False

    def finish(self, claim: Claim, losses: Sequence[float]) -> None:
        """Record what a plan loses; nothing where somebody else was given the trial meanwhile."""
        values = [float(loss) for loss in losses]
        try:
            self._storage.set_trial_user_attr(claim.trial, LOSSES, values)
            mean = sum(values) / len(values)
            self._storage.set_trial_state_values(claim.trial, self._states.COMPLETE, [mean])
        except self._optuna.exceptions.UpdateFinishedTrialError:
            return

    def result(self, digest: str) -> Losses | None:
        """What a plan loses; None where it is not measured yet."""
        for trial in self._trials(digest):
            if trial.state == self._states.COMPLETE:
                return [float(value) for value in trial.user_attrs[LOSSES]]
        return None

    def release(self, alive: Sequence[str]) -> int:
        """Queue again what nobody of `alive` is measuring; returns how many plans that were.

        Raises SearchError for a plan over which ATTEMPTS workers have died.
        """
        running = self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,))
        lost = [trial for trial in running if _owner(trial) not in (*alive, UNSIGNED)]
        for trial in lost:
            self._storage.set_trial_state_values(trial._trial_id, self._states.FAIL)
            digest = trial.user_attrs[DIGEST]
            failed = [t for t in self._trials(digest) if t.state == self._states.FAIL]
            if len(failed) >= ATTEMPTS:
                raise SearchError(
                    f"{len(failed)} workers ended while they measured the same plan: there may be "
                    "too little memory for so many of them; use fewer --workers"
                )
            self.add(jsonfile.parse_object(trial.user_attrs[PLAN], str(self.path)))
        return len(lost)

    def _trials(self, digest: str) -> list[Any]:
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.user_attrs.get(DIGEST) == digest]


class _MendingLock:
    """Optuna's lock of the journal's file. Who takes it finds whole lines: what a writer that died
    left of its last one is cut off, or the next line would be glued to it."""

    def __init__(self, lock: Any, path: Path) -> None:
        self._lock, self._path = lock, path

    def acquire(self) -> bool:
        taken = bool(self._lock.acquire())
        cut_torn_line(self._path)
        return taken

    def release(self) -> None:
        self._lock.release()


def cut_torn_line(path: Path) -> None:
    """Cut the last line of a journal when it has no end; files of another kind stay as they are."""
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read(1) in (b"", b"\n"):
            return
        file.seek(0)
        text = file.read()
        whole, _, _ = text.rpartition(b"\n")
        try:
            is_journal = isinstance(json.loads(whole.partition(b"\n")[0]), dict)
        except ValueError:
            is_journal = False
        if is_journal:
            file.truncate(len(whole) + 1)


UNSIGNED = "unsigned"
"""Owner of a trial whose worker has taken it a moment ago and not signed it yet."""


def _owner(trial: Any) -> str | None:
    """Who measures a running trial; None where it died before it could sign."""
    owner = trial.user_attrs.get(WORKER)
    if owner is None and trial.datetime_start is not None:
        since = datetime.now(trial.datetime_start.tzinfo) - trial.datetime_start
        return UNSIGNED if since.total_seconds() < GRACE else None
    return owner


def new_name() -> str:
    """Of a worker: no two have the same, whoever starts them."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def digest_of(schemes: Schemes) -> str:
    """What tells plans apart."""
    return hashlib.sha256(jsonfile.dump(dict(schemes)).encode()).hexdigest()


def serve(journal: TrialJournal, measure: Measure, worker: str, ended: Callable[[], bool]) -> int:
    """Measure plans that wait until `ended()`; returns how many."""
    count = 0
    while not ended():
        claim = journal.claim(worker)
        if claim is None:
            time.sleep(POLL)
            continue
        journal.finish(claim, measure(claim.schemes))
        count += 1
    return count


def parent_left() -> bool:
    """Whether the process that started this worker has closed its end of our stdin, or died."""
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)


class LocalPool:
    """This process measures, one plan after the other."""

    def __init__(self, journal: TrialJournal, measure: Measure) -> None:
        self._journal, self._measure = journal, measure

    def measure(self, plans: Sequence[Schemes]) -> list[Losses]:
        digests = [self._journal.add(plan) for plan in plans]
        while any(self._journal.result(digest) is None for digest in digests):
            self._journal.release(())
            claim = self._journal.claim(new_name())
            if claim is None:
                time.sleep(POLL)
            else:
                self._journal.finish(claim, self._measure(claim.schemes))
        return collected(self._journal, digests)


def collected(journal: TrialJournal, digests: Sequence[str]) -> list[Losses]:
    """The losses of plans that are all measured. Raises SearchError for one that is not."""
    found = []
    for digest in digests:
        losses = journal.result(digest)
        if losses is None:
            raise SearchError(f"plan {digest[:12]} was queued in {journal.path} and not measured")
        found.append(losses)
    return found


class ProcessPool(OpenPool):
    """Processes of this machine measure.

    command: of a worker that calls `serve` with the name it is given, until `parent_left`.
    """

    def __init__(
        self, journal: TrialJournal, workers: int, command: Callable[[str], Sequence[str]]
    ) -> None:
        if workers < 1:
            raise UsageError(f"{workers} workers cannot measure anything: give 1 or more")
        self._journal, self._count, self._command = journal, workers, command
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._started = 0

    def close(self) -> None:
        for process in self._running.values():
            if process.stdin is not None:
                process.stdin.close()
        for process in self._running.values():
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [process.pid for process in self._running.values() if process.poll() is None]

    def measure(self, plans: Sequence[Schemes]) -> list[Losses]:
        digests = [self._journal.add(plan) for plan in plans]
        waiting = set(digests)
        while True:
            waiting = {digest for digest in waiting if self._journal.result(digest) is None}
            if not waiting:
                return collected(self._journal, digests)
            self._mind(min(self._count, len(waiting)))
            time.sleep(POLL)

    def _mind(self, wanted: int) -> None:
        """Let go of workers that ended, queue what they had, and start others in their place.

        Raises SearchError when workers end before they measured anything at all.
        """
        ended = [name for name, process in self._running.items() if process.poll() is not None]
        codes = [self._running.pop(name).returncode for name in ended]
        self._journal.release(list(self._running))
        if any(code == FAILED for code in codes):
            raise SearchError("a worker could not measure a plan; what it said is above")
        while len(self._running) < wanted:
            name = new_name()
            self._started += 1
            if self._started > self._count + ATTEMPTS * max(1, self._count):
                raise SearchError(
                    "workers keep ending before they are done: there may be too little memory for "
                    "so many of them; use fewer --workers"
                )
            self._running[name] = subprocess.Popen(self._command(name), stdin=subprocess.PIPE)
