"""Killed anywhere, the same command goes on, and its checkpoint is that of an undisturbed run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

KILLS = 20


Contents = Callable[[Path], dict[str, bytes]]


class Runs:
    """One request, run undisturbed once, and then again and again under fire."""

    def __init__(
        self,
        worker: Callable[..., dict[str, Any]],
        contents: Contents,
        folder: Path,
        call: dict[str, Any],
    ) -> None:
        self.worker, self.contents, self.call = worker, contents, call
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
        found = self.contents(self.out)
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
    contents: Contents,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., Path],
    text: str,
    small: dict[str, Any],
) -> Runs:
    """Of a model with three blocks, so that one has blocks on both sides."""
    folder = tmp_path_factory.mktemp("resume")
    model = tiny_llama(folder / "model", hidden_size=32, num_hidden_layers=3)
    call = {**small, "model": model, "data": text, "size": "20%", "swaps": 2}
    return Runs(worker, contents, folder, call)


@pytest.fixture(scope="module")
def rotated_runs(
    worker: Callable[..., dict[str, Any]],
    contents: Contents,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., Path],
    text: str,
    small: dict[str, Any],
) -> Runs:
    """In another basis, with rounded inputs and a packed cache."""
    folder = tmp_path_factory.mktemp("rotated")
    model = tiny_llama(folder / "model", hidden_size=32, intermediate_size=64)
    schemes = ["w4a4zh8/8", "w4a4zh8/4", "w8a8", "w8g32zs8"]
    how = {"rotation": "gradients", "schemes": schemes, "kv": "int8", "bits": 14.0}
    call = {**small, "model": model, "data": text, **how, "refine": False}
    return Runs(worker, contents, folder, call)


@pytest.fixture(autouse=True)
def _clean(runs: Runs) -> None:
    for folder in (runs.out, runs.work):
        shutil.rmtree(folder, ignore_errors=True)


def under_fire(runs: Runs, draw: Callable[[], dict[str, Any]], wanted: int = KILLS) -> bool:
    """Kill runs until so many have died; whenever one outlives its kill, the next starts anew.

    Returns whether a run that nobody kills then comes to its end.
    """
    kills = 0
    while kills < wanted:
        if runs(**draw()):
            kills += 1
        else:
            runs.start_again()
    return not runs()


def test_twenty_kills_at_random_moments(runs: Runs) -> None:
    """Up to 40 % of a whole run each time, so that about every fifth is the last one."""
    moments = random.Random(0)
    assert under_fire(runs, lambda: {"seconds": moments.uniform(0.02, 0.4) * runs.seconds})


def test_twenty_kills_in_place_of_changes_of_the_disk(runs: Runs) -> None:
    """Renames, unlinks, flushes and journal lines are where a crash window would be."""
    steps = random.Random(1)
    assert under_fire(runs, lambda: {"operation": steps.randint(1, runs.operations // 4)})


def test_six_kills_of_a_run_that_rotates(rotated_runs: Runs) -> None:
    runs, steps = rotated_runs, random.Random(2)
    assert under_fire(runs, lambda: {"operation": steps.randint(1, runs.operations // 3)}, 6)


STEPS = [
    ("calibrate", 0),  # forward through three blocks, the head, and back
    ("calibrate", 2),
    ("calibrate", 4),
    ("calibrate", 5),
    ("calibrate", 6),
    ("calibrate", 7),
    ("measure", 1),
    ("measure", 4),
    ("probe", 0),
    ("probe", 1),
    ("swap", 2),
    ("re-round", 1),
    ("re-round", 2),
    ("re-round", 3),
    ("compare", 0),
    ("compare", 1),
    ("write", 0),
    ("write", 1),
]


def test_kills_in_every_stage(runs: Runs) -> None:
    for step in STEPS:
        assert runs(stage=step), f"the run was over before {step}"
    assert not runs()
    assert not runs(), "a finished run that is run again changes nothing"


def test_what_a_killed_run_left_does_not_outlive_another_request(runs: Runs) -> None:
    """Hidden states are the largest files of all."""
    assert runs(stage=("calibrate", 3))
    assert list(runs.work.glob("hidden/*")) != []
    answer = runs.worker({**runs.call, "out": runs.out, "seed": 1, "refine": False})
    assert (answer["killed"], answer["error"]) == (False, "")
    assert list(runs.work.glob("hidden/*")) == []
