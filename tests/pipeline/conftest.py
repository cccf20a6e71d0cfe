"""Tiny models of the real classes, a text, and how to compress one in a second."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantlib.pipeline.compress import Result, compress

SMALL: dict[str, Any] = {
    "seqlen": 64,
    "windows": 4,
    "probe_windows": 2,
    "probes": 3,
    "passes": 1,
    "refine": True,
    "schemes": ["w2g32z4s4", "w4g32zs4", "w6g64zs6"],
    "report": False,
}


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """The smallest request in which every stage has something to do, without model and budget."""
    return dict(SMALL)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> str:
    """Path of the calibration text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sample_text)
    return str(path)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Path:
    """Folder of a tiny Llama with a tied head. Not to be changed."""
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def squeeze(tmp_path: Path, llama: Path, text: str) -> Callable[..., Result]:
    """`squeeze(**changes)`: compress the tiny Llama to `out` in the test's folder."""

    def run(**changes: Any) -> Result:
        budget = {} if "bits" in changes else {"size": "20%"}
        call = {"model": llama, "out": tmp_path / "out", "data": text, **SMALL, **budget}
        return compress(**(call | changes))

    return run


class Worker:
    """The process of `worker.py`."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, call: dict[str, Any], **request: Any) -> dict[str, Any]:
        """Run one request (see `worker.py`) and return its answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps({"call": call, **request}, default=str), file=stdin, flush=True)
        return dict(json.loads(stdout.readline()))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    """Runs compressions in processes that may be killed."""
    process = Worker()
    yield process
    process.close()


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """`contents(folder)`: every file below it, by relative path."""

    def read(folder: Path) -> dict[str, bytes]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return read
