"""Interleaved timing: everybody gets a part of every round, and wake-ups are not counted."""

import math
from collections.abc import Callable

import pytest

from quantlib.bench import timing


class Clock:
    """A clock that only candidates move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def candidate(self, name: str, seconds: float, asleep: float = 0.0) -> Callable[[int], None]:
        """Takes `seconds`, and `asleep` more when another candidate ran before it."""

        def run(index: int) -> None:
            self.now += seconds + (asleep if self.log[-1:] != [name] else 0.0)
            self.log.append(name)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(timing.time, "sleep", lambda _: None)
    return made


def test_a_fast_candidate_does_not_pay_for_waking_up(clock: Clock) -> None:
    candidates = {name: clock.candidate(name, 0.001, asleep=0.004) for name in ("a", "b")}
    found = timing.interleaved(candidates, rounds=3)
    assert found == {name: pytest.approx([1.0] * 3) for name in candidates}


def test_speeds_are_compared_round_by_round() -> None:
    """Of a machine that slows down by ten, everything is ten times slower."""
    assert timing.times_as_fast([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == 2.0
    assert timing.times_as_fast([1.0, 1.0, 1.0], [2.0, 3.0, 9.0]) == 3.0


def test_a_slow_candidate_runs_once_a_round(clock: Clock) -> None:
    candidates = {"slow": clock.candidate("slow", 1.0), "fast": clock.candidate("fast", 1e-6)}
    timing.interleaved(candidates, rounds=4)
    assert clock.log.count("slow") == 2 + 4
    assert clock.log.count("fast") == 2 + 4 * (1 + timing.MAX_BURST)


def test_every_round_has_each_once_in_an_order_of_its_own(clock: Clock) -> None:
    candidates = {name: clock.candidate(name, 1.0) for name in ("a", "b", "c")}
    timing.interleaved(candidates, rounds=20)
    rounds = ["".join(clock.log[start : start + 3]) for start in range(6, 66, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 3


def test_every_call_has_its_own_number() -> None:
    seen: list[int] = []
    timing.interleaved({"a": seen.append}, rounds=3)
    assert seen == list(range(len(seen)))
    assert len(seen) > 3


def test_what_a_candidate_raises_is_passed_on() -> None:
    def broken(_: int) -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        timing.interleaved({"broken": broken}, rounds=1)


def test_quartiles_are_those_of_the_values_and_nan_stays_visible() -> None:
    assert timing.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([7.0]).scaled(2.0) == (14.0, 14.0, 14.0)
    assert math.isnan(timing.quartiles([1.0, math.nan]).median)


def test_a_burst_waits_for_threads_that_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time that grows by a whole pause, twice, and then by nothing."""
    spent = iter([0.0, 0.003, 0.003, 0.006, 0.006, 0.006])
    slept: list[float] = []
    monkeypatch.setattr(timing.time, "process_time", lambda: next(spent))
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    timing.wait_for_sleep()
    assert slept == [timing.PAUSE_SECONDS] * 3
