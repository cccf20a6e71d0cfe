"""A work directory that is read beside the process that writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlib.checkpoint.workdir import JOURNAL_NAME, WorkDir
from quantlib.errors import CheckpointError


def test_a_reader_sees_what_was_finished_when_it_looked(tmp_path: Path) -> None:
    with WorkDir.open(tmp_path / "work") as work:
        first, second = work.key("a", n=1), work.key("a", n=2)
        work.commit(first, "a", {"a/1.bin": b"one"}, {"n": 1})
        with WorkDir.view(work.path) as view:
            assert view.has(first)
            assert view.file(first).read_bytes() == b"one"
            work.commit(second, "a", {"a/2.bin": b"two"})
            assert not view.has(second)
        with WorkDir.view(work.path) as later:
            assert later.has(second)
        work.commit(work.key("a", n=3), "a", {})  # the readers took nothing away


def test_a_line_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    with WorkDir.open(tmp_path / "work") as work:
        key = work.key("a", n=1)
        work.commit(key, "a", {}, {"n": 1})
        journal = work.path / JOURNAL_NAME
        whole = journal.read_bytes()
        journal.write_bytes(whole + b'{"key": "half')
        with WorkDir.view(work.path) as view:
            assert view.has(key)
        assert journal.read_bytes() == whole + b'{"key": "half'
        journal.write_bytes(whole)


def test_a_reader_cannot_record_and_forgets_what_is_damaged_for_itself(tmp_path: Path) -> None:
    with WorkDir.open(tmp_path / "work") as work:
        key = work.key("a", n=1)
        work.commit(key, "a", {"a/1.bin": b"one"})
        journal = (work.path / JOURNAL_NAME).read_bytes()
        with WorkDir.view(work.path) as view:
            with pytest.raises(CheckpointError, match="reading only"):
                view.commit(view.key("a", n=2), "a", {})
            (work.path / "a/1.bin").write_bytes(b"two")
            with pytest.raises(CheckpointError, match="missing or damaged"):
                view.file(key)
            assert not view.has(key)
        assert (work.path / JOURNAL_NAME).read_bytes() == journal


def test_a_folder_that_is_no_work_directory_cannot_be_viewed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        WorkDir.view(tmp_path / "nowhere")
    (tmp_path / JOURNAL_NAME).write_text("something else\n{}\n")
    with pytest.raises(CheckpointError):
        WorkDir.view(tmp_path)
