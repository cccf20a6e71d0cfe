"""Plans measured on a Ray cluster (extra `ray`), recorded in the same journal (`trials.py`).

Every worker is an actor that opens the model once and then measures plan after plan. Ray starts an
actor again where it died, and gives it the plan that was lost; should the driver die, the journal
has what was finished. Workers open the work directory and the model under the paths that the driver
has: on several machines these must lie on a shared file system.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

from quantlib.errors import SearchError, UsageError
from quantlib.search.trials import (
    ATTEMPTS,
    POLL,
    Claim,
    Losses,
    Measure,
    OpenPool,
    Schemes,
    TrialJournal,
    collected,
    new_name,
)

AUTO, LOCAL = "auto", "local"
"""Addresses: of the cluster that runs (RAY_ADDRESS, or this machine's); of one that is started here
and ends with the search."""


class RayPool(OpenPool):
    """Actors measure; they end with the context, and so does the cluster if it was started here.

    address: AUTO, LOCAL, or what `ray.init` takes. workers: how many actors, of one processor each.
    make: builds what measures, in the actor's own process.
    Raises UsageError without Ray and where no cluster answers.
    """

    def __init__(
        self, journal: TrialJournal, address: str, workers: int, make: Callable[[], Measure]
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UsageError("--ray needs Ray: pip install 'quantlib-torch[ray]'")
        if workers < 1:
            raise UsageError(f"{workers} workers cannot measure anything: give 1 or more")
        import ray

        self._ray, self._journal = ray, journal
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(ray, address, workers)
        actor = ray.remote(num_cpus=1, max_restarts=ATTEMPTS * workers, max_task_retries=ATTEMPTS)(
            _Measurer
        )
        self._actors = [actor.remote(make) for _ in range(workers)]

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()

    def pids(self) -> list[int]:
        """Of the actors' processes."""
        return [int(pid) for pid in self._ray.get([actor.pid.remote() for actor in self._actors])]

    def measure(self, plans: Sequence[Schemes]) -> list[Losses]:
        """The losses of plans, in their order. Raises SearchError when one cannot be measured."""
        name = new_name()
        digests = [self._journal.add(plan) for plan in plans]
        self._journal.release(())
        idle, running = list(self._actors), {}
        while any(self._journal.result(digest) is None for digest in digests):
            while idle and (claim := self._journal.claim(name)) is not None:
                actor = idle.pop()
                running[actor.measure.remote(claim.schemes)] = actor, claim
            if not running:  # somebody died a moment ago with a plan that waits to be released
                self._journal.release(())
                time.sleep(POLL)
                continue
            done, _ = self._ray.wait(list(running), num_returns=1)
            for one in done:
                actor, claim = running.pop(one)
                self._record(one, claim)
                idle.append(actor)
        return collected(self._journal, digests)

    def _record(self, reference: Any, claim: Claim) -> None:
        try:
            losses = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise SearchError(f"a worker could not measure a plan: {error.cause}") from error
        except self._ray.exceptions.RayError as error:
            raise SearchError(
                f"workers of the Ray cluster keep ending over a plan ({type(error).__name__}): "
                "there may be too little memory for so many of them; use fewer --workers"
            ) from error
        self._journal.finish(claim, losses)


class _Measurer:
    """What runs in an actor."""

    def __init__(self, make: Callable[[], Measure]) -> None:
        self._measure = make()

    def measure(self, schemes: Schemes) -> Losses:
        return [float(loss) for loss in self._measure(schemes)]

    def pid(self) -> int:
        import os

        return os.getpid()


def _connect(ray: Any, address: str, workers: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    try:
        if address == LOCAL:
            ray.init(num_cpus=workers, **quiet)
        else:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"no Ray cluster answers at {address!r} ({error}): start one with ray start --head, or "
            f"use --ray {LOCAL} for one on this machine"
        ) from error
