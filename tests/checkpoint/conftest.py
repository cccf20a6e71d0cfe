"""Processes that are killed, disks that fill up, and a small checkpoint, on demand."""

import errno
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.checkpoint.disk import Sink
from quantlib.checkpoint.writer import write_checkpoint
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize, pack

DISK_CALLS = ("replace", "rename", "unlink", "fsync", "mkdir", "rmdir", "ftruncate", "write")
"""What changes a disk, as functions of `os`: pathlib, shutil and our own code end up in these."""


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGKILL leaves the page cache as it is: fsync changes nothing here but the time tests take.

    It is counted and killed at like any other call, and `test_disk` checks when it is made.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def in_child(work: Callable[[], object], kill_at: int | None = None) -> int | None:
    """Run `work` in a forked process; None if SIGKILL ended it, else the number of disk calls made.

    kill_at: the process kills itself instead of making this call (from 0); a write that is killed
    has put half of its bytes on the disk. A fork costs milliseconds, a new interpreter seconds.
    """
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            calls = _count_calls(kill_at)
            work()
            done = calls()
            _original_write(writable, str(done).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return int(answer)


_original_write = os.write


def _count_calls(kill_at: int | None) -> Callable[[], int]:
    count = 0

    def counted(name: str) -> Callable[..., object]:
        original = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            if count == kill_at:
                if name == "write":
                    descriptor, data = arguments
                    _original_write(descriptor, bytes(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return original(*arguments, **options)

        return call

    for name in DISK_CALLS:
        setattr(os, name, counted(name))
    return lambda: count


@pytest.fixture
def run_in_child() -> Callable[..., int | None]:
    return in_child


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """`with full_disk(after=n):` the (n+1)-th byte written by quantlib finds the disk full."""

    @contextmanager
    def fill(after: int) -> Iterator[None]:
        room = after
        whole_write, whole_sink = os.write, Sink.write

        def take(nbytes: int) -> int:
            nonlocal room
            taken = min(nbytes, room)
            room -= taken
            return taken

        def write(descriptor: int, data: bytes) -> int:
            taken = take(len(data))
            if taken == 0 and len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return whole_write(descriptor, bytes(data)[:taken])

        def sink_write(self: Sink, data: bytes) -> int:
            size = memoryview(data).nbytes
            if take(size) < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return whole_sink(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            patch.setattr(Sink, "write", sink_write)
            yield

    return fill


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder by relative name: two folders are equal when these are."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def folder_contents() -> Callable[[Path], dict[str, bytes]]:
    return contents


SCHEMES = {
    "layers.0.q.weight": "w4g32z",
    "layers.0.k.weight": "w3g16zs6",
    "layers.0.experts.up": "w5",
    "layers.1.q.weight": "nvfp4",
    "layers.1.k.weight": "bf16",
    "embed.weight": "w6ta8",
}
SHAPES = dict.fromkeys(SCHEMES, (20, 72)) | {"layers.0.experts.up": (3, 7, 40)}


@dataclass
class Parts:
    """What a checkpoint is made of, and the folder it is written to."""

    out: Path
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    files: dict[str, bytes | Path]
    schemes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    weights: dict[str, torch.Tensor]

    def write(self, out: Path | None = None, **options: Any) -> Path:
        options = {"files": self.files, "provenance": {"source": "hash"}} | options
        out = self.out if out is None else out
        parts = self.tensors, self.config, self.schemes, self.shapes
        return write_checkpoint(out, *parts, **options)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """A small checkpoint of every kind of scheme, a stack of experts, norms, and a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_bytes(b'{"odd":   "spacing"}\r\n')
    tensors = {"norm.weight": torch.ones(72, dtype=torch.bfloat16), "scalar": torch.tensor(1.5)}
    weights = {}
    for name, scheme in SCHEMES.items():
        weight = torch.randn(SHAPES[name], generator=generator)
        if scheme == "bf16":
            tensors[name] = weight.to(torch.bfloat16)
            continue
        flat = weight.reshape(-1, weight.shape[-1])
        quantized = quantize_rtn(flat, Scheme.parse(scheme).segments(flat.shape[1]))
        tensors |= {name + suffix: tensor for suffix, tensor in pack(quantized).items()}
        weights[name] = dequantize(quantized)
    files = {"tokenizer.json": source / "tokenizer.json", "quantlib_plan.json": b"{}\n"}
    config = {"model_type": "llama", "hidden_size": 72}
    return Parts(tmp_path / "out", tensors, config, files, dict(SCHEMES), dict(SHAPES), weights)
