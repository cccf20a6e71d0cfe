"""Help teaches by example, answers at once, and usage errors are exit code 2."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import quantlib
from quantlib.cli.app import app

from .conftest import Run

COMMANDS = (
    "compress",
    "inspect",
    "measure",
    "search",
    "apply",
    "train-search",
    "eval",
    "generate",
    "report",
)


def test_every_stage_is_a_command() -> None:
    assert [command.name for command in app.registered_commands] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_that_the_parser_accepts(run: Run, command: str) -> None:
    """Each example line is parsed again: an option that was renamed would fail here."""
    import typer.main

    answer = run(command, "--help")
    assert answer.code == 0, answer
    assert "Examples:" in answer.stdout
    function = next(c for c in app.registered_commands if c.name == command).callback
    assert function is not None
    assert function.__doc__ is not None
    lines = function.__doc__.split("Examples:\n")[1].splitlines()
    examples = [
        shlex.split(line) for line in lines if line.strip().startswith(f"quantlib {command} ")
    ]
    assert len(examples) >= 2
    group = typer.main.get_command(app)
    for _, name, *arguments in examples:
        group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"quantlib {quantlib.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [(), ("compres",), ("compress",), ("search", "--work"), ("inspect", "a", "b")]
)
def test_bad_usage_is_exit_code_2(run: Run, arguments: tuple[str, ...]) -> None:
    answer = run(*arguments)
    assert answer.code == 2
    assert "Usage:" in answer.stdout + answer.stderr or "Error" in answer.stderr


def test_help_needs_neither_torch_nor_transformers() -> None:
    """That is what makes it instant; a module imported at the top of a command would show here."""
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from quantlib.cli.app import app\n"
        "for command in sys.argv[1:]:\n"
        "    assert CliRunner().invoke(app, [command, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-P", "-c", code, *COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_console_script_is_installed() -> None:
    assert Path(sys.executable).with_name("quantlib").exists()
