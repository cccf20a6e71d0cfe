"""A disk that is too small is found before work starts; one that fills up loses nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantlib.checkpoint.disk import Sink
from quantlib.checkpoint.workdir import WorkDir
from quantlib.errors import CheckpointError
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.pipeline.compress import Result
from quantlib.pipeline.estimate import PROCESS_BYTES, for_recipe
from quantlib.recipe import Recipe

Squeeze = Callable[..., Result]
Contents = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`free(bytes)`: what every disk says is left."""

    def leave(nbytes: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=nbytes))

    return leave


def test_too_small_a_disk_is_refused_before_work_starts(
    squeeze: Squeeze, tmp_path: Path, free: Callable[[int], None]
) -> None:
    free(1_000_000)
    with pytest.raises(CheckpointError, match=r"work directory.*needs .* is free there: free"):
        squeeze()
    with WorkDir.open(tmp_path / "out.work") as work:
        assert list(work.units()) == []


def test_room_for_the_checkpoint_alone_is_checked_too(
    squeeze: Squeeze, tmp_path: Path, free: Callable[[int], None]
) -> None:
    squeeze(size="20%")
    free(60_000)
    with pytest.raises(CheckpointError, match=r"the checkpoint needs .* kB"):
        squeeze(size="21%", out=tmp_path / "other", work=tmp_path / "out.work")


def test_a_finished_work_directory_needs_no_room_again(
    squeeze: Squeeze, tmp_path: Path, free: Callable[[int], None], llama: Path
) -> None:
    first = squeeze(refine=False)
    free(3_000_000)  # the writer wants a megabyte to spare
    second = squeeze(refine=False, size="19%", out=tmp_path / "other", work=first.work)
    assert second.file_bytes < first.file_bytes


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 0.97])
def test_a_disk_that_fills_up_leaves_a_run_that_goes_on(
    squeeze: Squeeze,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: Contents,
    undisturbed: tuple[dict[str, bytes], int],
    share: float,
) -> None:
    expected, written = undisturbed
    left = int(share * written)

    def write(sink: Sink, data: Any) -> int:
        nonlocal left
        left -= memoryview(data).nbytes
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(sink, data)

    original = Sink.write
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "write", write)
        with pytest.raises(CheckpointError, match=r"the disk is full .*run the same command again"):
            squeeze()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.rglob("*.tmp")) == []
    squeeze()
    assert contents(tmp_path / "out") == expected


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory,
    worker: Callable[..., dict[str, Any]],
    contents: Contents,
    llama: Path,
    text: str,
    small: dict[str, Any],
) -> tuple[dict[str, bytes], int]:
    """The checkpoint of `squeeze()`, and how many bytes it takes to make it, all files counted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    call = {**small, "model": llama, "data": text, "size": "20%", "out": folder / "out"}
    answer = worker(call)
    assert answer["error"] == ""
    return contents(folder / "out"), answer["written"]


def test_the_estimate_of_disk_is_nearly_exact(
    squeeze: Squeeze, tmp_path: Path, llama: Path, text: str, small: dict[str, Any]
) -> None:
    """Headers of small files are what it leaves out."""
    fields = {name: value for name, value in small.items() if name != "report"}
    found = for_recipe(
        ModelMap.from_source(Source.open(llama)), Recipe.create(data=text, **fields), timed=False
    )
    watch = Watch(tmp_path / "out.work" / "hidden")
    squeeze(progress=watch)
    with WorkDir.open(tmp_path / "out.work") as work:
        for kind, expected in (("bank", found.bank_bytes), ("statistics", found.statistics_bytes)):
            files = [file for unit in work.units(kind) for file in unit.files.values()]
            assert 0.75 <= sum(file.nbytes for file in files) / expected <= 1.25, kind
    assert 0.75 <= watch.most / found.hidden_bytes <= 1.05


class Watch:
    """Progress that measures a folder after every step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most = folder, 0

    def start(self, stage: str, total: int) -> None: ...

    def tick(self, message: str = "") -> None:
        found = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        self.most = max(self.most, found)

    def finish(self) -> None: ...

    def say(self, message: str) -> None: ...


def test_the_estimate_of_memory_is_within_a_factor_of_two(
    worker: Callable[..., dict[str, Any]],
    tmp_path: Path,
    tiny_llama: Callable[..., Path],
    text: str,
    small: dict[str, Any],
) -> None:
    """Of what a run adds to a process that has imported torch, mapped files not counted."""
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 3}
    model = tiny_llama(tmp_path / "model", **shape)
    call = {**small, "passes": 0, "windows": 8, "schemes": ["w2g32z4s4", "w4g32zs4"]}
    fields = {name: value for name, value in call.items() if name != "report"}
    found = for_recipe(
        ModelMap.from_source(Source.open(model)), Recipe.create(data=text, **fields), timed=False
    )
    answer = worker({**call, "model": model, "data": text, "size": "12%", "out": tmp_path / "out"})
    assert answer["error"] == ""
    expected = found.memory_bytes - PROCESS_BYTES
    assert 0.5 <= answer["memory"] / expected <= 2, (answer["memory"], expected)
