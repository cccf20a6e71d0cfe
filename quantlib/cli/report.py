"""`quantlib report`: the picture of what was measured and decided, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlib.cli.console import answers, print_json
from quantlib.cli.options import FILES, Debug, Json, Work


def report(
    work: Work,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="HTML file to write; DIR/report.html by default.",
            rich_help_panel=FILES,
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="PLAN",
            help="Plan to show; DIR/plan.json by default.",
            rich_help_panel=FILES,
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What quantlib eval --json printed, of text or of records: shows what was "
            "measured beside what was predicted, and pictures before and after.",
            rich_help_panel=FILES,
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw bits per layer, sensitivities, the Pareto front, and predicted against measured loss.

    Needs no model. One self-contained HTML file: a table of components and of all that is left in
    16 bits, what each task loses, bits and sensitivity of every layer as pictures, the front with
    the chosen point, and a table of every weight.

    Examples:
        quantlib report --work WORK
        quantlib report --work WORK --plan other_plan.json -o other.html
        quantlib eval OUT --against MODEL --data held_out.txt --json > eval.json
        quantlib report --work OUT.work --evaluation eval.json
        quantlib eval OUT --against MODEL --data test.jsonl --json > both.json
        quantlib report --work OUT.work --evaluation both.json
    """
    from quantlib.pipeline.reporting import report_of

    path = report_of(work, plan, output, evaluation)
    if json:
        print_json({"report": path})
    else:
        answers().print(str(path), markup=False)
