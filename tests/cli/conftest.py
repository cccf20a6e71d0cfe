"""A tiny model, texts, and the command line in this process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

SCHEMES = "w2g32,w4g32,w8g32"
QUICK = ("--schemes", SCHEMES, "--seqlen", "32", "--windows", "6", "--fast")
"""Options that make a run on the tiny model take about a second."""


class Answer:
    """What a command printed and how it ended."""

    def __init__(self, code: int, stdout: str, stderr: str, exception: BaseException | None):
        self.code, self.stdout, self.stderr = code, stdout, stderr
        self.exception = exception

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    def __repr__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


Run = Callable[..., Answer]


@pytest.fixture(scope="session")
def run() -> Run:
    """`run("inspect", folder)`: the command line, without the cost of a process."""
    from quantlib.cli.app import app

    def call(*arguments: object) -> Answer:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return Answer(result.exit_code, result.stdout, result.stderr, result.exception)

    return call


@pytest.fixture(scope="session")
def fails(run: Run) -> Callable[..., str]:
    """`fails(code, *arguments)`: the command ends with `code` and one sentence, which it returns.

    Nothing on stdout, no traceback, and no exception but the one that carries the exit code.
    """

    def call(code: int, *arguments: object) -> str:
        answer = run(*arguments)
        assert answer.code == code, answer
        assert answer.stdout == "", answer
        assert "Traceback" not in answer.stderr, answer
        assert "bug in quantlib" not in answer.stderr, answer
        assert isinstance(answer.exception, SystemExit), answer
        return answer.stderr

    return call


@pytest.fixture(scope="session")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="session")
def text(sample_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to calibrate on."""
    file = tmp_path_factory.mktemp("cli") / "text.txt"
    file.write_text(sample_text, encoding="utf-8")
    return file


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    """A model of this test's own, to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "damaged"))


@pytest.fixture(scope="session")
def measured_once(
    run: Run, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    work = tmp_path_factory.mktemp("cli") / "work"
    answer = run("measure", model, "--data", text, "--work", work, *QUICK)
    assert answer.code == 0, answer
    return work


@pytest.fixture
def measured(measured_once: Path, tmp_path: Path) -> Path:
    """A work directory of this test's own, in which the tiny model was measured."""
    return Path(shutil.copytree(measured_once, tmp_path / "work"))
