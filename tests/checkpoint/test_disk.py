"""Files are complete or absent, and disk trouble is a sentence."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quantlib.checkpoint.disk import (
    PendingFile,
    atomic_write,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    json_bytes,
    read_json,
    remove_temporaries,
    require_free,
    size_text,
)
from quantlib.checkpoint.provenance import file_sha256
from quantlib.checkpoint.reader import read_layout
from quantlib.checkpoint.workdir import WorkDir
from quantlib.checkpoint.writer import write_checkpoint
from quantlib.errors import CheckpointError


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    atomic_write_bytes(tmp_path / "a" / "b.bin", b"\0\1")
    atomic_write_text(tmp_path / "t.txt", "größer\n")
    atomic_write_json(tmp_path / "v.json", {"b": [1, 0.1], "a": "ü"})
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\0\1"
    assert (tmp_path / "t.txt").read_text("utf-8") == "größer\n"
    assert read_json(tmp_path / "v.json") == {"a": "ü", "b": [1, 0.1]}


def test_json_does_not_depend_on_the_order_of_keys_and_refuses_nan() -> None:
    assert json_bytes({"b": 1, "a": 2}) == json_bytes({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        json_bytes({"loss": float("nan")})


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    atomic_write_bytes(path, b"old")

    def fail(sink: object) -> None:
        sink.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PendingFile.write(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_the_hash_taken_while_writing_is_that_of_the_file(tmp_path: Path) -> None:
    pieces = [os.urandom(1000) for _ in range(5)]
    pending = PendingFile.write(tmp_path / "f", lambda sink: [sink.write(p) for p in pieces])
    pending.publish()
    assert pending.sha256 == file_sha256(tmp_path / "f")
    assert pending.nbytes == 5000


@pytest.mark.parametrize("durable", [True, False])
def test_a_durable_file_is_flushed_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    calls: list[str] = []
    replace = os.replace

    def fsync(descriptor: int) -> None:
        calls.append("flush " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix)

    def rename(*names: Path) -> None:
        calls.append("rename")
        replace(*names)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    (tmp_path / "f.d").mkdir()
    atomic_write(tmp_path / "f.d" / "f", b"1", durable)
    assert calls == (["flush .tmp", "rename", "flush .d"] if durable else ["rename"])


def test_unfinished_files_are_removed_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("sub/keep.tmp", ".hidden", "keep"):
        (tmp_path / name).touch()
    PendingFile.write(tmp_path / "sub" / "f", b"1")
    remove_temporaries(tmp_path)
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == [".hidden", "keep", "keep.tmp", "sub"]


def test_too_little_room_is_told_before_work_starts(tmp_path: Path) -> None:
    require_free(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(
        CheckpointError, match=r"the bank needs 1000000\.0 TB .* free there"
    ) as told:
        require_free(tmp_path / "not" / "there", 10**18, "the bank")
    assert str(tmp_path) in str(told.value)
    assert os.listdir(tmp_path) == []


def test_a_path_below_a_file_is_told_before_work_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"could not write in .*file: Not a directory"):
        require_free(tmp_path / "file", 1)


def test_an_unwritable_folder_is_told_before_work_starts(
    tmp_path: Path, run_in_child: Callable[..., int | None]
) -> None:
    def attempts() -> None:
        if os.geteuid() == 0:  # root may write anywhere: be somebody else
            os.setuid(65534)
        with pytest.raises(CheckpointError, match="Choose a folder you may write to"):
            require_free(tmp_path / "out" / "deep", 1)
        with pytest.raises(CheckpointError, match="Choose a folder you may write to"):
            atomic_write_bytes(tmp_path / "f", b"")
        with pytest.raises(CheckpointError, match="Choose a folder you may write to"):
            WorkDir.open(tmp_path / "work")
        with pytest.raises(CheckpointError, match="Choose a folder you may write to"):
            write_checkpoint(tmp_path / "out", {}, {}, {}, {})
        with pytest.raises(CheckpointError, match=r"could not read|there is no checkpoint"):
            read_layout(tmp_path)

    tmp_path.chmod(0o500)
    assert run_in_child(attempts) is not None
    tmp_path.chmod(0o700)


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, full_disk) -> None:
    atomic_write_bytes(tmp_path / "f", b"old")
    with full_disk(after=10), pytest.raises(CheckpointError, match="the disk is full") as told:
        atomic_write_bytes(tmp_path / "f", b"x" * 11)
    assert "run the same command again" in str(told.value)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(("text", "why"), [(b'{"a": 1', "not valid JSON"), (b"\xff", "not valid")])
def test_json_cut_short_is_a_sentence(tmp_path: Path, text: bytes, why: str) -> None:
    (tmp_path / "v.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=f"v.json is {why}"):
        read_json(tmp_path / "v.json")
    with pytest.raises(CheckpointError, match=r"could not read .*absent\.json: No such"):
        read_json(tmp_path / "absent.json")


def test_sizes_are_in_the_units_of_budgets() -> None:
    assert [size_text(n) for n in (0, 999, 82_800_000, 5 * 10**9, 2 * 10**15)] == [
        "0 bytes",
        "999 bytes",
        "82.8 MB",
        "5.0 GB",
        "2000.0 TB",
    ]


_FILL = """
import os, sys
from pathlib import Path
from quantlib.checkpoint.workdir import WorkDir
from quantlib.checkpoint.reader import read_layout
from quantlib.checkpoint.workdir import WorkDir
from quantlib.checkpoint.writer import write_checkpoint
from quantlib.errors import CheckpointError

folder = Path(sys.argv[1])
work = WorkDir.open(folder / "work")
try:
    for i in range(100):
        work.commit(work.key("u", i=i), "u", {f"{i}.bin": bytes(20_000)})
except CheckpointError as error:
    print(error)
work.close()
with WorkDir.open(folder / "work") as again:
    print(len([u for u in again.units() if again.intact(u.key)]), i)
    print([name for name in os.listdir(folder / "work") if name.endswith(".tmp")])
"""


def test_a_really_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A 256 kB file system of its own, in a mount namespace that ends with the process."""
    mount = f"mount -t tmpfs -o size=256k none {tmp_path}"
    space = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        if subprocess.run([*space, mount], capture_output=True, check=False).returncode:
            pytest.skip("this machine does not let a user mount a file system")
    except FileNotFoundError:
        pytest.skip("no unshare on this machine")
    command = [*space, f'{mount} && exec "$0" -c "$1" {tmp_path}', sys.executable, _FILL]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    sentence, counts, leftovers = result.stdout.splitlines()
    kept, failed_at = map(int, counts.split())
    assert "the disk is full" in sentence
    assert kept == failed_at > 5
    assert leftovers == "[]"
