"""`quantlib bench ...` ends as every command does: with a sentence and an exit code."""

import runpy
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from quantlib.cli.app import app
from quantlib.errors import DataError, UsageError

BENCHMARKS = ("kernels", "decode", "latency", "quality", "rounding")


@pytest.fixture
def bench() -> Callable[..., Any]:
    return lambda *arguments: CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """`broken(error)`: every benchmark raises it."""

    def breaks(error: BaseException) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(runpy, "run_module", refuse)

    return breaks


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError("no package index can be reached"), 1, "no package index can be reached"),
        (UsageError("there is no such part"), 2, "there is no such part"),
        (ZeroDivisionError("division by zero"), 1, "this is a bug in quantlib"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_a_sentence_and_a_code(
    bench: Callable[..., Any],
    broken: Callable[[BaseException], None],
    name: str,
    error: BaseException,
    code: int,
    words: str,
) -> None:
    broken(error)
    answer = bench(name)
    assert answer.exit_code == code
    assert words in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_debug_shows_the_traceback_and_is_not_passed_on(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def run(*_: object, **__: object) -> None:
        import sys

        seen.append(sys.argv[1:])
        raise DataError("nothing there")

    monkeypatch.setattr(runpy, "run_module", run)
    answer = bench("kernels", "--debug", "--quick")
    assert "Traceback" in answer.stderr
    assert seen == [["--quick"]]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # other tests have imported them
@pytest.mark.parametrize("name", ["kernels", "decode"])
def test_help_and_wrong_options_are_the_benchmarks_own(
    bench: Callable[..., Any], name: str
) -> None:
    helped = bench(name, "--help")
    assert helped.exit_code == 0
    assert "--quick" in helped.stdout
    wrong = bench(name, "--quik")
    assert wrong.exit_code == 2
    assert "unrecognized arguments: --quik" in wrong.stderr
    assert wrong.stdout == ""
