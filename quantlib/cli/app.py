"""The commands, in the order of a model's way through them."""

from __future__ import annotations

from collections.abc import Callable
from inspect import cleandoc

import typer
from rich.markup import escape

from quantlib.cli.allocate import apply, search
from quantlib.cli.bench import bench
from quantlib.cli.compress import compress, measure
from quantlib.cli.evaluate import evaluate
from quantlib.cli.generate import generate
from quantlib.cli.inspect import inspect
from quantlib.cli.outcome import guarded
from quantlib.cli.report import report
from quantlib.cli.train import train_search

app = typer.Typer(
    name="quantlib",
    help="Decides how many bits every part of a model deserves, rounds it to those bits, and runs "
    "the result.",
    epilog="Start with:  quantlib compress MODEL --size 30% --data text.txt -o OUT",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ALL, STAGES, USE = "Everything at once", "One stage at a time", "The result"


def help_text(command: Callable[..., None]) -> str:
    """The docstring of a command: prose refilled to any width, examples kept line by line."""
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    refilled = ("\b\n" + p if "\n  " in p else " ".join(p.split()) for p in paragraphs)
    return escape("\n\n".join(refilled))


for name, command, panel, resumes in (
    ("compress", compress, ALL, True),
    ("inspect", inspect, STAGES, False),
    ("measure", measure, STAGES, True),
    ("search", search, STAGES, False),
    ("apply", apply, STAGES, True),
    ("train-search", train_search, ALL, True),
    ("eval", evaluate, USE, False),
    ("generate", generate, USE, False),
    ("report", report, USE, False),
):
    register = app.command(name, help=help_text(command), rich_help_panel=panel)
    register(guarded(command, resumes))

app.add_typer(bench, rich_help_panel=USE)


def _version(asked: bool) -> None:
    if asked:
        from quantlib import __version__

        typer.echo(f"quantlib {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Options that come before the command."""
