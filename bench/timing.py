"""Timing candidates against each other in one process, in turn, so that a noisy machine disturbs
all of them alike.

A candidate runs in bursts of a few calls. Before each burst the process is left alone until it uses
no processor time: threads of the one before spin for a while after their work, some for longer than
a burst lasts. The first call of a burst, which wakes the candidate's own, is not counted. Every
round has an order of its own, so that nobody always follows the same one.

A round's figure is the median of its burst. Over rounds come quartiles; two candidates are compared
round by round, because a machine that others use is faster in one second than in the next.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Candidate = Callable[[int], object]
"""Runs once. The number grows with every call: it chooses among copies of the weights."""

BURST_SECONDS = 0.006
"""What a burst should last: long beside a wake-up (50 us), short beside a disturbance."""
MAX_BURST = 60
PAUSE_SECONDS = 0.003
MAX_PAUSES = 100
"""Whoever spins for longer is part of the machine."""
ASLEEP = 0.1
"""Share of a pause: who uses less processor time than this sleeps."""
SLOW_SECONDS = 0.02
"""From here on the first call counts as well: a wake-up is nothing beside it."""


class Quartiles(NamedTuple):
    """A median and its spread."""

    low: float
    median: float
    high: float

    def scaled(self, factor: float) -> Quartiles:
        return Quartiles(self.low * factor, self.median * factor, self.high * factor)


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles of at least one value; nan when one of them is."""
    low, median, high = np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75)).tolist()
    return Quartiles(low, median, high)


def times_as_fast(one: Sequence[float], other: Sequence[float]) -> float:
    """How many times as fast `one` is: the median over rounds of the times of `other` over its."""
    return quartiles([theirs / mine for mine, theirs in zip(one, other, strict=True)]).median


def interleaved(candidates: Mapping[str, Candidate], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each candidate in every round, after one round of warm-up.

    What a candidate raises is passed on.
    """
    order = random.Random(0)
    bursts = {name: _Burst(run) for name, run in candidates.items()}
    for burst in bursts.values():
        burst.warm_up()
    for _ in range(rounds):
        for burst in order.sample(list(bursts.values()), len(bursts)):
            wait_for_sleep()
            burst.measure()
    return {name: [1e3 * seconds for seconds in burst.medians] for name, burst in bursts.items()}


def wait_for_sleep() -> None:
    """Return once the process's threads use no processor time."""
    for _ in range(MAX_PAUSES):
        before = time.process_time()
        time.sleep(PAUSE_SECONDS)
        if time.process_time() - before < ASLEEP * PAUSE_SECONDS:
            return


class _Burst:
    """One candidate, how often it has been called, and the medians of its bursts in seconds."""

    def __init__(self, run: Candidate) -> None:
        self.run = run
        self.calls = 0
        self.expected = 0.0
        self.medians: list[float] = []

    def warm_up(self) -> None:
        """The first call pays for page faults and compiling; the second tells what to expect."""
        self._call()
        self.expected = self._call()

    def measure(self) -> None:
        """Run a burst and keep its median."""
        slow = self.expected >= SLOW_SECONDS
        if not slow:
            self._call()
        count = min(MAX_BURST, max(1, math.ceil(BURST_SECONDS / max(self.expected, 1e-9))))
        self.medians.append(float(np.median([self._call() for _ in range(count)])))

    def _call(self) -> float:
        index, self.calls = self.calls, self.calls + 1
        started = time.perf_counter()
        self.run(index)
        return time.perf_counter() - started
