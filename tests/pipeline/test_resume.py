"""Killed anywhere, the same command goes on, and its checkpoint is that of an undisturbed run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantlib.pipeline import Result

KILLS = 20
REQUEST: dict[str, Any] = {
    "size": "20%",
    "seqlen": 64,
    "windows": 4,
    "probe_windows": 2,
    "probes": 3,
    "passes": 1,
    "schemes": ["w2g32z4s4", "w4g32zs4", "w6g64zs6"],
    "report": False,
}


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Runs:
    """One request, run undisturbed once, and then again and again under fire."""

    def __init__(self, worker: Callable[..., dict[str, Any]], folder: Path, **call: Any) -> None:
        self.worker, self.call = worker, call
        self.out, self.work = folder / "out", folder / "out.work"
        undisturbed = folder / "undisturbed"
        answer = worker({**call, "out": undisturbed})
        assert answer["error"] == ""
        self.seconds, self.operations = answer["seconds"], answer["operations"]
        self.expected = contents(undisturbed)
        self.table = (folder / "undisturbed.work" / "sensitivity.json").read_bytes()

    def __call__(self, **kill: Any) -> bool:
        """Run once more in the same place. Returns whether it was killed; if not, all is right."""
        answer = self.worker({**self.call, "out": self.out}, **kill)
        assert answer["error"] == ""
        if not answer["killed"]:
            self.check()
        return bool(answer["killed"])

    def check(self) -> None:
        found = contents(self.out)
        assert found.keys() == self.expected.keys()
        assert [name for name in found if found[name] != self.expected[name]] == []
        assert (self.work / "sensitivity.json").read_bytes() == self.table
        assert list(self.work.glob("hidden/*")) == []
        leftovers = [path.name for path in self.out.parent.glob("out.*") if path != self.work]
        assert leftovers == []

    def start_again(self) -> None:
        shutil.rmtree(self.out)
        shutil.rmtree(self.work)


@pytest.fixture(scope="module")
def runs(
    worker: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
    llama: Path,
    text: str,
) -> Runs:
    folder = tmp_path_factory.mktemp("resume")
    return Runs(worker, folder, model=llama, data=text, **REQUEST)


@pytest.fixture(autouse=True)
def _clean(runs: Runs) -> None:
    for folder in (runs.out, runs.work):
        shutil.rmtree(folder, ignore_errors=True)


def under_fire(runs: Runs, draw: Callable[[], dict[str, Any]]) -> None:
    """Kill runs until KILLS have died; whenever one outlives its kill, the next starts anew."""
    kills = 0
    while kills < KILLS:
        if runs(**draw()):
            kills += 1
        else:
            runs.start_again()
    assert not runs()


def test_twenty_kills_at_random_moments(runs: Runs) -> None:
    """Up to 40 % of a whole run each time, so that about every fifth is the last one."""
    moments = random.Random(0)
    under_fire(runs, lambda: {"seconds": moments.uniform(0.02, 0.4) * runs.seconds})


def test_twenty_kills_in_place_of_changes_of_the_disk(runs: Runs) -> None:
    """Renames, unlinks, flushes and journal lines are where a crash window would be."""
    steps = random.Random(1)
    under_fire(runs, lambda: {"operation": steps.randint(1, runs.operations // 4)})


STEPS = [
    ("calibrate", 0),
    ("calibrate", 1),
    ("calibrate", 3),
    ("calibrate", 4),
    ("measure", 1),
    ("measure", 4),
    ("probe", 0),
    ("probe", 1),
    ("re-round", 1),
    ("re-round", 2),
    ("compare", 1),
    ("write", 0),
    ("write", 1),
]


def test_kills_in_every_stage(runs: Runs) -> None:
    for step in STEPS:
        assert runs(stage=step), f"the run was over before {step}"
    assert not runs()
    assert not runs(), "a finished run that is run again changes nothing"
