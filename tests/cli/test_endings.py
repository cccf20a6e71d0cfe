"""How commands end when something breaks: interrupted, out of memory, a bug, a closed pipe."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import QUICK, Run


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """`broken(error)`: opening any model raises it."""
    from quantlib.models.source import Source

    def breaks(error: BaseException) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(Source, "open", refuse)

    return breaks


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ZeroDivisionError("division by zero"), 1, "this is a bug in quantlib"),
        (RuntimeError("shapes differ"), 1, "this is a bug in quantlib"),
        (MemoryError(), 1, "not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB"),
            1,
            "not enough memory",
        ),
        (PermissionError(13, "Permission denied", "/secret"), 1, "/secret: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_a_sentence_and_a_code(
    run: Run, broken: Callable, model: Path, error: BaseException, code: int, words: str
) -> None:
    broken(error)
    answer = run("inspect", model)
    assert answer.code == code
    assert words in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_debug_prints_the_traceback(run: Run, broken: Callable, model: Path) -> None:
    broken(ZeroDivisionError("division by zero"))
    answer = run("inspect", model, "--debug")
    assert answer.code == 1
    assert "Traceback" in answer.stderr
    assert "--debug" in run("inspect", model).stderr


def test_errors_of_a_request_show_no_traceback_even_for_json(run: Run, tmp_path: Path) -> None:
    answer = run("inspect", tmp_path / "nowhere", "--json")
    assert (answer.code, answer.stdout) == (1, "")


def test_a_reader_that_leaves_is_no_failure(run: Run, broken: Callable, model: Path) -> None:
    broken(BrokenPipeError())
    answer = run("inspect", model)
    assert (answer.code, answer.stderr) == (0, "")


class Interruption:
    """Progress that presses Ctrl-C at the `moment`th step."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def start(self, stage: str, total: int) -> None: ...

    def tick(self, message: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def finish(self) -> None: ...

    def say(self, message: str) -> None: ...


def test_an_interrupted_run_continues_to_the_same_bytes(
    run: Run, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted again and again, each time three steps further, until it gets through."""
    command = ("compress", model, "--bits", 4, "--data", text, *QUICK, "--refine", "-o")
    assert run(*command, tmp_path / "straight").code == 0
    out, notes = tmp_path / "out", ""
    for attempt in range(20):
        with monkeypatch.context() as patch:
            patch.setattr(
                "quantlib.cli.compress.Bars", lambda _, moment=1 + 3 * attempt: Interruption(moment)
            )
            answer = run(*command, out)
        if answer.code == 0:
            break
        assert answer.code == 130, answer
        assert "the same command continues" in answer.stderr
        assert not out.exists()
        notes += answer.stderr
    assert answer.code == 0, answer
    assert notes, "it was never interrupted"
    for name in ("model.safetensors", "config.json", "quantlib_plan.json"):
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
