"""Units of work survive whatever interrupts them."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from quantlib.checkpoint.disk import read_json
from quantlib.checkpoint.workdir import WorkDir
from quantlib.errors import CheckpointError


def work_through(folder: Path, units: int = 3) -> None:
    """A tiny program in the way stages are written: skip what is done, do the rest."""
    with WorkDir.open(folder, "test") as work:
        for i in range(units):
            key = work.key("unit", i=i)
            if not work.has(key):
                files = {f"{i}/a.bin": bytes([i]) * 5000, f"{i}/b.json": b'{"i": %d}' % i}
                work.commit(key, "unit", files, {"i": i})
        summary = work.key("summary", units=units)
        if not work.has(summary):
            parts = [work.file(unit.key, f"{unit.values['i']}/b.json") for unit in work.units()]
            total = sum(read_json(part)["i"] for part in parts)
            work.commit(summary, "summary", {"summary.json": json.dumps(total).encode()})


def results(contents: dict[str, bytes]) -> dict[str, bytes]:
    """What a work directory holds, less what tells how it came about (durations, process ids)."""
    return {name: data for name, data in contents.items() if name not in ("lock", "journal.jsonl")}


def check_recovery(folder: Path) -> int:
    """Open after a kill: no temporary file is left, every unit is whole. Returns their number."""
    with WorkDir.open(folder) as work:
        assert not [path for path in folder.rglob(".*") if path.is_file()]
        units = list(work.units())
        assert all(work.has(unit.key) and work.intact(unit.key) for unit in units)
        return len(units)


def test_killed_before_any_disk_call_it_goes_on_to_the_same_result(
    tmp_path: Path, run_in_child: Callable[..., int | None], folder_contents: Callable
) -> None:
    calls = run_in_child(lambda: work_through(tmp_path / "undisturbed"))
    expected = results(folder_contents(tmp_path / "undisturbed"))
    assert calls is not None
    assert calls > 20
    for kill_at in range(calls):
        folder = tmp_path / f"killed-{kill_at}"
        assert run_in_child(lambda folder=folder: work_through(folder), kill_at) is None
        check_recovery(folder)
        work_through(folder)
        assert results(folder_contents(folder)) == expected, kill_at


def test_a_dozen_kills_at_random_moments(
    tmp_path: Path, folder_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    units, kills, finished = 250, 0, 0
    generator = random.Random(0)
    while kills < 12:
        pid = os.fork()
        if pid == 0:
            try:
                work_through(tmp_path / "killed", units)
            finally:
                os._exit(0)
        time.sleep(generator.uniform(0.002, 0.04))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        found = check_recovery(tmp_path / "killed")
        assert found >= finished, "a finished unit was lost"
        finished = found
    work_through(tmp_path / "killed", units)
    work_through(tmp_path / "undisturbed", units)
    killed, undisturbed = (folder_contents(tmp_path / name) for name in ("killed", "undisturbed"))
    assert results(killed) == results(undisturbed)


def test_replacing_a_unit_s_files_survives_every_kill(
    tmp_path: Path, run_in_child: Callable[..., int | None]
) -> None:
    """The dangerous moment: the new file is in place, the journal still describes the old one."""

    def replace(folder: Path) -> None:
        with WorkDir.open(folder, "test") as work:
            work.commit("new", "unit", {"same": b"new!"})

    killed, kill_at = True, 0
    while killed:
        folder = tmp_path / str(kill_at)
        with WorkDir.open(folder) as work:
            work.commit("old", "unit", {"same": b"old!"})
        killed = run_in_child(lambda folder=folder: replace(folder), kill_at) is None
        with WorkDir.open(folder) as work:
            content = (folder / "same").read_bytes()
            for key, expected in (("old", b"old!"), ("new", b"new!")):
                assert not work.has(key) or content == expected, kill_at
                assert work.has(key) == work.intact(key), kill_at
        kill_at += 1
    assert kill_at > 5


def test_a_second_process_is_told_who_holds_the_lock(
    tmp_path: Path, run_in_child: Callable[..., int | None]
) -> None:
    def second() -> None:
        with pytest.raises(CheckpointError) as told:
            WorkDir.open(tmp_path / "work")
        assert re.search(
            rf"in use by process {parent} on .+ \(quantlib measure X\)", str(told.value)
        )
        assert "wait until it has ended" in str(told.value)

    parent = os.getpid()
    with WorkDir.open(tmp_path / "work", command="quantlib measure X"):
        assert run_in_child(second) is not None
        with pytest.raises(CheckpointError, match="in use"):
            WorkDir.open(tmp_path / "work")
    WorkDir.open(tmp_path / "work").close()


def test_the_lock_dies_with_its_process_even_if_a_worker_lives_on(tmp_path: Path) -> None:
    readable, writable = os.pipe()
    holder = os.fork()
    if holder == 0:
        work = WorkDir.open(tmp_path / "work", command="holder")
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        assert work.path.exists()
        os.write(writable, str(worker).encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(readable, 20))
    try:
        with pytest.raises(CheckpointError, match=f"process {holder} "):
            WorkDir.open(tmp_path / "work")
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        WorkDir.open(tmp_path / "work").close()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(readable)
        os.close(writable)


@pytest.fixture
def two_units(tmp_path: Path) -> Path:
    """A closed work directory with the units "one" and "two"."""
    with WorkDir.open(tmp_path / "work") as work:
        work.commit("one", "unit", {"one.bin": b"1111"})
        work.commit("two", "unit", {"two.bin": b"2222", "two.json": b"2"}, {"x": 0.1}, seconds=2.5)
    return tmp_path / "work"


def test_units_are_found_again(two_units: Path) -> None:
    with WorkDir.open(two_units) as work:
        assert [unit.key for unit in work.units("unit")] == ["one", "two"]
        assert work.has("one")
        assert not work.has("three")
        assert work.unit("two").values == {"x": 0.1}
        assert work.unit("two").seconds == 2.5
        assert work.file("one").read_bytes() == b"1111"
        assert work.file("two", "two.json").read_bytes() == b"2"
        with pytest.raises(CheckpointError, match="no result under the key three"):
            work.file("three")


@pytest.mark.parametrize("torn", [b'{"key": "th', b"{", b"\0\0\0", b'{"files":{}}', b"\0\n"])
def test_a_torn_last_line_is_cut_off(two_units: Path, torn: bytes) -> None:
    journal = two_units / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    with WorkDir.open(two_units) as work:
        assert [unit.key for unit in work.units()] == ["one", "two"]
    assert journal.read_bytes() == whole


@pytest.mark.parametrize("bad", [b"{", b"[1]", b'{"key": "x"}', b'{"files": {"a": {"size": 1}}}'])
def test_a_corrupt_line_in_the_middle_is_named(two_units: Path, bad: bytes) -> None:
    journal = two_units / "journal.jsonl"
    header, one, two, _ = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([header, one, bad, two, b""]))
    with pytest.raises(
        CheckpointError, match=r"line 3 of .*journal.jsonl is corrupt .* delete that"
    ):
        WorkDir.open(two_units)
    journal.write_bytes(b"\n".join([header, one, two, b""]))
    WorkDir.open(two_units).close()  # and the failed open gave the lock back


def test_a_journal_of_another_version_is_refused(two_units: Path) -> None:
    (two_units / "journal.jsonl").write_text('{"journal": "quantlib", "version": 9}\n{}\n')
    with pytest.raises(CheckpointError, match="not a journal of this version"):
        WorkDir.open(two_units)


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="is not a work directory and is not empty"):
        WorkDir.open(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(CheckpointError, match="could not open the work directory"):
        WorkDir.open(tmp_path / "thesis.tex")


def test_a_missing_or_shortened_file_makes_its_unit_unfinished(two_units: Path) -> None:
    (two_units / "one.bin").unlink()
    (two_units / "two.json").write_bytes(b"")
    with WorkDir.open(two_units) as work:
        assert not work.has("one")
        assert not work.has("two")


def test_a_damaged_file_is_told_once_and_then_made_again(two_units: Path) -> None:
    (two_units / "one.bin").write_bytes(b"1112")
    with WorkDir.open(two_units) as work:
        assert work.has("one")  # by its size: nothing has been read yet
        with pytest.raises(
            CheckpointError, match=r"one\.bin .*damaged .* run the same command again"
        ):
            work.file("one")
        assert not work.has("one")
    with WorkDir.open(two_units) as work:
        assert not work.has("one")
        work.commit("one", "unit", {"one.bin": b"1111"})
        assert work.file("one").read_bytes() == b"1111"


def test_a_batch_is_recorded_whole_or_not_at_all(two_units: Path) -> None:
    with WorkDir.open(two_units) as work:
        with suppress(ZeroDivisionError), work.batch() as batch:
            batch.add("three", "unit", {"three.bin": b"3"})
            raise ZeroDivisionError
        assert not work.has("three")
        assert not list(two_units.glob("*three*"))
        assert not list(two_units.glob(".*three*"))
        with work.batch(durable=False) as batch:
            batch.add("three", "unit", {"three.bin": b"3"})
            batch.add("four", "unit", {"four.bin": b"4"})
            assert not work.has("three")
        assert work.has("three")
        assert work.has("four")


def test_values_that_are_not_finite_are_refused(two_units: Path) -> None:
    with WorkDir.open(two_units) as work:
        with pytest.raises(CheckpointError, match="values of a unit result cannot be recorded"):
            work.commit("three", "unit", {"three.bin": b"3"}, {"loss": float("nan")})
        assert not work.has("three")


@pytest.mark.parametrize("room", [0, 100, 3999, 4000, 4001, 4100])
def test_a_full_disk_in_the_middle_loses_nothing(two_units: Path, full_disk, room: int) -> None:
    """Room for none, part or all of the file, and for none or part of its journal line."""
    journal = (two_units / "journal.jsonl").read_bytes()
    with WorkDir.open(two_units) as work:
        with full_disk(after=room), pytest.raises(CheckpointError, match="the disk is full"):
            work.commit("three", "unit", {"three.bin": bytes(4000)})
        assert (two_units / "journal.jsonl").read_bytes() == journal
        assert not list(two_units.glob(".*.tmp"))
        assert not work.has("three")
        work.commit("three", "unit", {"three.bin": bytes(4000)})
    with WorkDir.open(two_units) as work:
        assert all(work.intact(key) for key in ("one", "two", "three"))


def test_a_closed_work_directory_records_nothing(two_units: Path) -> None:
    work = WorkDir.open(two_units)
    work.close()
    with pytest.raises(CheckpointError, match="has been closed"):
        work.commit("three", "unit", {})


def test_keys_depend_on_kind_and_inputs_and_not_on_their_order() -> None:
    key = WorkDir.key("statistics", source="f", layer=3)
    assert key == WorkDir.key("statistics", layer=3, source="f")
    others = {
        WorkDir.key("bank", source="f", layer=3),
        WorkDir.key("statistics", source="f", layer=4),
    }
    assert key not in others
    assert len(others) == 2
