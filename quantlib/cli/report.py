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
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw bits per layer, sensitivities, the Pareto front, and predicted against measured loss.

    Needs no model. One self-contained HTML file.

    Examples:
        quantlib report --work WORK
        quantlib report --work WORK --plan other_plan.json -o other.html
    """
    from quantlib.pipeline.reporting import report_of

    path = report_of(work, plan, output)
    if json:
        print_json({"report": path})
    else:
        answers().print(str(path), markup=False)
