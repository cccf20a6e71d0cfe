"""`quantlib bench`: the measurements behind the project's claims, run on this machine.

Benchmarks stand above the command line (they use all of it), so they are run as programs and not
imported. Their errors end as those of every other command: one sentence and an exit code.
"""

from __future__ import annotations

import runpy
import sys

import typer

from quantlib.cli.options import Debug
from quantlib.cli.outcome import guarded

bench = typer.Typer(
    name="bench",
    help="Run the measurements behind the project's claims on this machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Options belong to the benchmark, `--help` too; only --debug is ours."""


def kernels(context: typer.Context, debug: Debug = False) -> None:
    """Packed linears beside those of others, the machine's roofs beside them (--quick, --json)."""
    _run("kernels", context.args)


def decode(context: typer.Context, debug: Debug = False) -> None:
    """Tokens per second of whole models beside llama.cpp and transformers (--quick, --json)."""
    _run("decode", context.args)


def latency(context: typer.Context, debug: Debug = False) -> None:
    """Five plans for five latency budgets, predicted and measured (--work, --mode, --threads)."""
    _run("latency", context.args)


def quality(context: typer.Context, debug: Debug = False) -> None:
    """KL against bytes on a real model, against simpler allocations (--part, --work)."""
    _run("quality", context.args)


def multimodal(context: typer.Context, debug: Debug = False) -> None:
    """Whole multimodal models against a language model's bits, at equal bytes (--part, --seeds)."""
    _run("multimodal", context.args)


def rounding(context: typer.Context, debug: Debug = False) -> None:
    """What each part of rounding is worth, on real matrices (--work)."""
    _run("rounding", context.args)


def search(context: typer.Context, debug: Debug = False) -> None:
    """Searches at equal bytes: what each plan loses, and what finding it takes (--table)."""
    _run("search", context.args)


for command in (kernels, decode, latency, quality, multimodal, rounding, search):
    bench.command(context_settings=PASSED_ON)(guarded(command))


def _run(name: str, arguments: list[str]) -> None:
    """Run `quantlib.bench.NAME` as the main program with these arguments."""
    before, sys.argv = sys.argv, [f"{name}.py", *arguments]
    try:
        runpy.run_module(f"quantlib.bench.{name}", run_name="__main__", alter_sys=False)
    finally:
        sys.argv = before
