"""`quantlib bench`: the measurements behind the project's claims, run on this machine.

Benchmarks stand above the command line (they use all of it), so they are run as programs and not
imported.
"""

from __future__ import annotations

import runpy
import sys

import typer

bench = typer.Typer(
    name="bench",
    help="Run the measurements behind the project's claims on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Options belong to the benchmark, `--help` too."""


@bench.command(context_settings=PASSED_ON)
def kernels(context: typer.Context) -> None:
    """Packed linears beside torch's dense ones, memory bandwidth as roof (--quick, --json)."""
    _run("kernels", context.args)


@bench.command(context_settings=PASSED_ON)
def quality(context: typer.Context) -> None:
    """KL against bytes on a real model, against simpler allocations (--part, --work)."""
    _run("quality", context.args)


@bench.command(context_settings=PASSED_ON)
def rounding(context: typer.Context) -> None:
    """What each part of rounding is worth, on real matrices (--work)."""
    _run("rounding", context.args)


def _run(name: str, arguments: list[str]) -> None:
    """Run `quantlib.bench.NAME` as the main program with these arguments."""
    before, sys.argv = sys.argv, [f"{name}.py", *arguments]
    try:
        runpy.run_module(f"quantlib.bench.{name}", run_name="__main__", alter_sys=False)
    finally:
        sys.argv = before
