"""Trials on a Ray cluster of this machine: a worker is killed, nothing is lost, nothing differs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from quantlib.errors import UsageError
from quantlib.search.trials import LocalPool, TrialJournal

pytest.importorskip("optuna", reason="Optuna is the extra `trials`")
ray = pytest.importorskip("ray", reason="Ray is the extra `ray`, 200 MB")

from quantlib.search.ray_trials import AUTO, RayPool  # noqa: E402 (needs the skip above)

PLANS = [{"a": f"w{bits}g64", "b": f"w{other}g64"} for bits in (2, 3, 4) for other in (4, 8)]


def maker(marks: str) -> Callable[[], Callable[[Mapping[str, str]], list[float]]]:
    """What Ray ships: functions that need nothing of this module."""

    def make() -> Callable[[Mapping[str, str]], list[float]]:
        def measure(plan: Mapping[str, str]) -> list[float]:
            import os
            import time
            from pathlib import Path

            Path(marks, str(os.getpid())).touch()
            time.sleep(0.2)
            return [sum(4.0 ** -int(scheme[1]) for scheme in plan.values())]

        return measure

    return make


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_a_worker_killed_mid_run_changes_nothing(tmp_path: Path) -> None:
    marks, alone = tmp_path / "marks", tmp_path / "alone"
    marks.mkdir()
    alone.mkdir()
    settings = {"model": "m"}
    expected = LocalPool(TrialJournal(alone / "t.log", settings), maker(str(alone))()).measure(
        PLANS
    )
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while not list(marks.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        killed.append(int(next(marks.iterdir()).name))
        os.kill(killed[0], signal.SIGKILL)

    journal = TrialJournal(tmp_path / "trials.log", settings)
    with RayPool(journal, AUTO, 2, maker(str(marks))) as pool:
        thread = threading.Thread(target=kill_one)
        thread.start()
        found = pool.measure(PLANS)
        thread.join()
        assert killed[0] not in pool.pids()
    assert found == expected
    # a driver that starts again finds everything measured and asks no worker
    again = TrialJournal(journal.path, settings)
    assert LocalPool(again, lambda plan: pytest.fail("measured again")).measure(PLANS) == expected


def test_a_cluster_that_is_not_there_is_an_error_that_says_so(tmp_path: Path) -> None:
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(UsageError, match="no Ray cluster answers"):
        RayPool(TrialJournal(tmp_path / "t.log", {}), AUTO, 1, maker(str(tmp_path)))
