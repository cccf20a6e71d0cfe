"""`quantlib eval`: what a checkpoint is worth, each figure with its standard error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlib.cli.console import answers, notes, print_json, table
from quantlib.cli.options import Checkpoint, Debug, Json
from quantlib.cli.progress import Bars, by_stage
from quantlib.cli.request import quiet_transformers

MEASUREMENT = "Measurement"


def evaluate(
    out: Checkpoint,
    data: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Text that calibration has not seen: a file, .jsonl, a folder, or hub:name.",
            rich_help_panel=MEASUREMENT,
            show_default=False,
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Folder of the model it was made from: adds KL and the share of equal answers.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option(metavar="N", help="Windows of text.", rich_help_panel=MEASUREMENT)
    ] = 12,
    seqlen: Annotated[
        int,
        typer.Option(metavar="N", help="Tokens of a window.", rich_help_panel=MEASUREMENT),
    ] = 512,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="Seed of the choice of windows.", rich_help_panel=MEASUREMENT
        ),
    ] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, KL from the original, and how often both prefer the same token.

    The second half of each window is scored; ± is one standard error over windows.

    Examples:
        quantlib eval OUT --against path/to/model --data held_out.txt
        quantlib eval OUT --data held_out.txt --windows 40 --json
    """
    from quantlib.evaluation.compare import compare

    quiet_transformers()
    found = compare(
        out,
        against,
        data,
        seqlen=seqlen,
        windows=windows,
        seed=seed,
        progress=by_stage(Bars(notes())),
    )
    if json:
        print_json(found.to_json())
        return
    header = ("", Path(found.against).name if found.against else "-", Path(found.model).name)
    console = answers()
    console.print(table(*header, rows=found.rows()))
    console.print(
        f"{windows} windows of {seqlen} tokens of {data}, second half of each scored; ± is one "
        "standard error",
        style="dim",
        markup=False,
    )
