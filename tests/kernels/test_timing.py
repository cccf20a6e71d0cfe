"""The cost table: what is measured, what is kept, and when it is measured again. No time is
asserted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantlib.errors import UsageError
from quantlib.kernels import timing
from quantlib.kernels.cpu import library, stopwatch
from quantlib.kernels.layouts import tile
from quantlib.kernels.timing import Machine, Op, TimingTable, this_machine, undisturbed

MACHINE = Machine("a processor", 2, "avx2", "libkernels-1", 2)
OPS = (Op(64, 96, "w4g32", 1, "int8"), Op(64, 96, "w8g32", 1, "int8"))
SCHEMES = ("w2g64z4s4", "w3g32", "w4", "w5g64zs5", "w8g128", "mxfp4", "nvfp4", "mxfp6e2m3", "fp8")


class Clock:
    """Counts what it is asked, and answers with invented seconds."""

    def __init__(self, answer: Callable[[int], Sequence[float]] = lambda call: [1e-3]) -> None:
        self.asked: list[Op] = []
        self._answer = answer

    def __call__(self, op: Op, threads: int, passes: int) -> Sequence[float]:
        self.asked.append(op)
        return self._answer(len(self.asked) - 1)


# -- the table -----------------------------------------------------------------------------------


def test_operations_take_turns_and_disturbances_do_not_count(tmp_path: Path) -> None:
    disturbed = Clock(lambda call: [9e-3, 9e-3, 9e-3] if call < 4 else [2e-3, 2e-3, 9e-3])
    table = TimingTable.load(MACHINE, tmp_path)
    ticks: list[str] = []
    table.measure([*OPS, OPS[0]], disturbed, ticks.append)
    assert disturbed.asked == [*OPS] * timing.ROUNDS
    assert ticks == [op.key for op in disturbed.asked]
    assert table.ms[OPS[0].key] == 2.0
    assert table.ms[OPS[1].key] == 2.0
    assert table.missing(OPS) == []


def test_a_single_measurement_that_is_too_short_does_not_count_either() -> None:
    assert undisturbed([5.0]) == 5.0
    assert undisturbed([1.0, 5.0, 5.0, 5.0, 9.0]) == 5.0


def test_what_was_measured_is_kept_and_nothing_is_measured_twice(tmp_path: Path) -> None:
    TimingTable.load(MACHINE, tmp_path).measure(OPS[:1], Clock())
    clock = Clock()
    again = TimingTable.load(MACHINE, tmp_path)
    again.measure(OPS, clock)
    assert again.problem == ""
    assert set(clock.asked) == {OPS[1]}
    assert set(TimingTable.load(MACHINE, tmp_path).ms) == {op.key for op in OPS}
    assert len(list(tmp_path.iterdir())) == 1


def test_two_processes_do_not_lose_each_other_s_measurements(tmp_path: Path) -> None:
    first, second = TimingTable.load(MACHINE, tmp_path), TimingTable.load(MACHINE, tmp_path)
    first.measure(OPS[:1], Clock())
    second.measure(OPS[1:], Clock())
    assert set(TimingTable.load(MACHINE, tmp_path).ms) == {op.key for op in OPS}


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": "another"},
        {"cores": 3},
        {"isa": "avx512"},
        {"kernels": "libkernels-2"},
        {"threads": 1},
    ],
)
def test_everything_that_times_depend_on_has_a_table_of_its_own(
    change: dict[str, object], tmp_path: Path
) -> None:
    other = replace(MACHINE, **change)
    assert other.fingerprint != MACHINE.fingerprint
    TimingTable.load(MACHINE, tmp_path).measure(OPS, Clock())
    assert TimingTable.load(other, tmp_path).missing(OPS) == list(OPS)


def corrupt(document: dict[str, object]) -> dict[str, str]:
    """What may be wrong with a table's file -> its text."""
    return {
        "are damaged": json.dumps(document)[:-9],
        "are damaged ": json.dumps({**document, "ms": {"x": "soon"}}),
        "are damaged  ": json.dumps({**document, "ms": {"x": math.nan}}),
        "are damaged   ": json.dumps({**document, "ms": {"x": -1.0}}),
        "are damaged    ": "[]",
        "another version": json.dumps({**document, "version": 0}),
        "another machine": json.dumps(
            {**document, "machine": {**document["machine"], "cores": 64}}
        ),
    }


@pytest.mark.parametrize("case", range(7))
def test_a_table_that_is_damaged_or_another_machine_s_is_measured_again(
    case: int, tmp_path: Path
) -> None:
    table = TimingTable.load(MACHINE, tmp_path)
    table.measure(OPS, Clock())
    reason, text = list(corrupt(json.loads(table.path.read_text())).items())[case]
    table.path.write_text(text)
    again = TimingTable.load(MACHINE, tmp_path)
    assert reason.strip() in again.problem
    assert "measured again" in again.problem
    clock = Clock()
    again.measure(OPS, clock)
    assert set(clock.asked) == set(OPS)
    assert TimingTable.load(MACHINE, tmp_path).problem == ""


def test_a_cache_that_cannot_be_written_is_told_and_does_no_harm(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    table = TimingTable.load(MACHINE, taken / "timing")
    table.measure(OPS, Clock())
    assert "cannot be kept" in table.problem
    assert table.missing(OPS) == []


# -- the machine ---------------------------------------------------------------------------------


def test_this_machine_names_itself() -> None:
    here = this_machine(2)
    kernels = library.load()
    assert kernels is not None
    assert here.isa == kernels.isa
    assert here.kernels.startswith("libquantlib-cpu-")
    assert here.cores >= 1
    assert str(here) == f"{here.cpu}, 2 threads, {here.isa}"
    assert this_machine(2) == here
    assert this_machine(1).fingerprint != here.fingerprint


def test_without_kernels_there_is_nothing_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: None)
    with pytest.raises(UsageError, match="install a C\\+\\+ compiler"):
        this_machine(2)


# -- the stopwatch -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("mode", "tokens"),
    [("int8", 1), ("int8", 33), ("exact", 1), ("int8g128", 2), ("int8g32", 33)],
)
def test_every_kind_of_product_can_be_timed(
    scheme: str, mode: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "footprint", lambda: 1 << 16)
    seconds = stopwatch.seconds(Op(80, 160, scheme, tokens, mode), 2, 3)
    assert 1 <= len(seconds) <= 3
    assert all(0 < second < math.inf for second in seconds)


def test_more_copies_than_caches_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = stopwatch._passes

    def counted(weight, op, copies, threads, passes):
        made.append(copies)
        return real(weight, op, copies, threads, passes)

    monkeypatch.setattr(stopwatch, "_passes", counted)
    monkeypatch.setattr(stopwatch, "_PASS_SECONDS", 1e9)
    monkeypatch.setattr(stopwatch, "footprint", lambda: 1 << 20)
    stopwatch.seconds(Op(64, 128, "w4g32", 1, "int8"), 1, 1)
    nbytes = tile(stopwatch.random_weight(64, 128, "w4g32")).nbytes
    assert made[0] == 1
    assert made[1] * nbytes >= 1 << 20
    assert stopwatch.footprint() >= 1 << 20


def test_what_is_slow_alone_needs_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []

    def slow(weight, op, copies, threads, passes):
        made.append((copies, passes))
        return [10.0] * passes

    monkeypatch.setattr(stopwatch, "_passes", slow)
    assert stopwatch.seconds(Op(64, 128, "w4g32", 1, "int8"), 1, 5) == [10.0]
    assert made == [(1, stopwatch._TRIALS), (1, 1)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_weights_are_finite(scheme: str) -> None:
    packed = stopwatch.random_weight(48, 160, scheme)
    assert packed.shape == (48, 160)
    values = tile(packed).to_packed()
    assert all(torch.equal(values.tensors[name], packed.tensors[name]) for name in packed.tensors)


def test_a_scheme_that_keeps_a_weight_cannot_be_timed() -> None:
    with pytest.raises(UsageError, match="leaves a weight as it is"):
        stopwatch.random_weight(8, 32, "bf16")


def test_a_real_table_has_real_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "footprint", lambda: 1 << 18)
    table = TimingTable.load(this_machine(1), tmp_path)
    table.measure(OPS)
    assert all(0 < table.ms[op.key] < 1e4 for op in OPS)
    document = json.loads(table.path.read_text())
    assert document["unit"] == "ms"
    assert document["machine"]["threads"] == 1
