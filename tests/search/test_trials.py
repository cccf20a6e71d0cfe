"""Trials: the same losses whoever measures them, and nothing lost when somebody dies."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from quantlib.errors import SearchError, UsageError
from quantlib.search.trials import (
    ATTEMPTS,
    FAILED,
    LocalPool,
    ProcessPool,
    TrialJournal,
    cut_torn_line,
    digest_of,
    new_name,
)

pytest.importorskip("optuna", reason="Optuna is the extra `trials`")

SETTINGS = {"model": "m", "threads": 1}
PLANS = [{"a": f"w{bits}g64", "b": f"w{other}g64"} for bits in (2, 3, 4) for other in (4, 8)]
WORKER = """
import sys, time
from pathlib import Path
from quantlib.search.trials import TrialJournal, parent_left, serve
sys.path.insert(0, {folder!r})
from test_trials import SETTINGS, loss

def measure(plan):
    Path({marks!r}, sys.argv[1]).touch()
    time.sleep({seconds})
    return loss(plan)

serve(TrialJournal({journal!r}, SETTINGS), measure, sys.argv[1], parent_left)
"""


def loss(plan: Mapping[str, str]) -> list[float]:
    """Of two windows: less with more bits."""
    bits = [int(scheme[1]) for scheme in plan.values()]
    return [sum(4.0**-b for b in bits), sum(3.0**-b for b in bits)]


EXPECTED = [loss(plan) for plan in PLANS]


def processes(journal: TrialJournal, workers: int, seconds: float = 0.0) -> ProcessPool:
    """Workers that take `seconds` for a plan, and leave a file with their name when they begin."""
    marks = journal.path.parent / "marks"
    marks.mkdir(exist_ok=True)
    code = WORKER.format(
        folder=str(Path(__file__).parent),
        marks=str(marks),
        seconds=seconds,
        journal=str(journal.path),
    )
    return ProcessPool(journal, workers, lambda name: [sys.executable, "-P", "-c", code, name])


@pytest.fixture
def journal(tmp_path: Path) -> TrialJournal:
    return TrialJournal(tmp_path / "trials.log", SETTINGS)


def test_one_process_and_several_find_the_same_losses_in_the_order_asked_for(
    journal: TrialJournal, tmp_path: Path
) -> None:
    other = TrialJournal(tmp_path / "other.log", SETTINGS)
    assert LocalPool(journal, loss).measure(PLANS) == EXPECTED
    with processes(other, 2) as pool:
        assert pool.measure(PLANS) == EXPECTED


def test_a_plan_is_measured_once_even_by_the_next_process(journal: TrialJournal) -> None:
    calls: list[str] = []

    def counted(plan: Mapping[str, str]) -> list[float]:
        calls.append(digest_of(plan))
        return loss(plan)

    assert LocalPool(journal, counted).measure([PLANS[0], PLANS[0], PLANS[1]]) == [
        EXPECTED[0],
        EXPECTED[0],
        EXPECTED[1],
    ]
    again = TrialJournal(journal.path, SETTINGS)
    assert LocalPool(again, counted).measure(PLANS[:3]) == EXPECTED[:3]
    assert len(calls) == len(set(calls)) == 3


def test_a_worker_killed_over_its_plan_loses_nothing(journal: TrialJournal) -> None:
    killed: list[int] = []

    def kill_one(pool: ProcessPool) -> None:
        deadline = time.monotonic() + 60
        while not any((journal.path.parent / "marks").iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        killed.append(pool.pids[0])
        os.kill(killed[0], signal.SIGKILL)

    with processes(journal, 1, seconds=0.3) as pool:
        thread = threading.Thread(target=kill_one, args=(pool,))
        thread.start()
        found = pool.measure(PLANS[:3])
        thread.join()
        assert killed
        assert killed[0] not in pool.pids
    assert found == EXPECTED[:3]


def test_what_a_dead_driver_had_claimed_is_measured_by_the_next(journal: TrialJournal) -> None:
    journal.add(PLANS[0])
    claim = journal.claim(new_name())  # and the process that took it dies here
    assert claim is not None
    assert claim.schemes == PLANS[0]
    again = TrialJournal(journal.path, SETTINGS)
    assert again.claim(new_name()) is None
    assert LocalPool(again, loss).measure([PLANS[0]]) == [EXPECTED[0]]


@pytest.mark.parametrize("torn", ['{"op_code": 5, "wor', '{"op_code": 5}'])
def test_a_line_that_a_writer_died_over_is_cut(
    journal: TrialJournal, tmp_path: Path, torn: str
) -> None:
    expected = LocalPool(journal, loss).measure(PLANS[:2])
    whole = journal.path.read_text()
    journal.path.write_text(whole + torn)  # beside a driver that goes on, and before the next one
    assert LocalPool(journal, loss).measure(PLANS[:3])[:2] == expected
    journal.path.write_text(journal.path.read_text() + torn)
    again = LocalPool(TrialJournal(journal.path, SETTINGS), loss)
    assert again.measure(PLANS)[:2] == expected
    assert torn not in journal.path.read_text().splitlines()
    other = tmp_path / "letter.txt"
    other.write_text("dear reader\nyours")
    cut_torn_line(other)
    assert other.read_text() == "dear reader\nyours", "no journal, and not ours to cut"


def test_a_plan_is_claimed_by_one_worker_only(journal: TrialJournal) -> None:
    other = TrialJournal(journal.path, SETTINGS)
    journal.add(PLANS[0])
    claims = [journal.claim("first"), other.claim("second")]
    assert [claim is not None for claim in claims] == [True, False]
    # the first is thought dead; what it says afterwards changes nothing
    assert other.release(["second"]) == 1
    second = other.claim("second")
    assert second is not None
    other.finish(second, [1.0, 1.0])
    assert claims[0] is not None
    journal.finish(claims[0], [2.0, 2.0])
    assert journal.result(digest_of(PLANS[0])) == [1.0, 1.0]


def test_a_plan_that_kills_every_worker_is_given_up(journal: TrialJournal) -> None:
    journal.add(PLANS[0])
    for _ in range(ATTEMPTS - 1):
        assert journal.claim(new_name()) is not None
        assert journal.release(()) == 1
    assert journal.claim(new_name()) is not None
    with pytest.raises(SearchError, match="fewer --workers"):
        journal.release(())


def test_a_worker_that_says_why_it_failed_is_not_started_again(journal: TrialJournal) -> None:
    command = [sys.executable, "-c", f"raise SystemExit({FAILED})"]
    with (
        ProcessPool(journal, 2, lambda name: command) as pool,
        pytest.raises(SearchError, match="could not measure"),
    ):
        pool.measure(PLANS[:2])


def test_workers_that_end_at_once_are_not_started_for_ever(journal: TrialJournal) -> None:
    command = [sys.executable, "-c", "pass"]
    with (
        ProcessPool(journal, 1, lambda name: command) as pool,
        pytest.raises(SearchError, match="keep ending"),
    ):
        pool.measure(PLANS[:1])


def test_other_settings_and_other_files_are_refused(journal: TrialJournal, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="other settings"):
        TrialJournal(journal.path, {**SETTINGS, "model": "another"})
    damaged = tmp_path / "damaged.log"
    for text in ("what is this\nand this\n", "garbage"):
        damaged.write_text(text)
        with pytest.raises(SearchError, match="cannot be used as a journal"):
            TrialJournal(damaged, SETTINGS)
    with pytest.raises(UsageError, match="1 or more"):
        processes(journal, 0)
