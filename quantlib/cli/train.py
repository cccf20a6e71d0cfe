"""`quantlib train-search`: formats and weights of a language model, found in one training run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlib.cli.console import answers, facts, notes, print_json, table
from quantlib.cli.options import (
    BUDGET,
    FILES,
    RECIPE,
    Data,
    Debug,
    Download,
    Json,
    Model,
    Output,
    Overwrite,
    Seed,
    Threads,
)
from quantlib.cli.progress import Bars
from quantlib.cli.request import quiet_transformers
from quantlib.cli.words import next_commands
from quantlib.errors import UsageError

if TYPE_CHECKING:
    from quantlib.pipeline.train_search import Result

Cost = Annotated[
    str,
    typer.Option(
        metavar="COST",
        help="What the products may cost: 4x8 (bits of weights times bits of inputs, on average), "
        "12.5% (of 16-bit operations), or a time on this machine such as 12ms for each decoded "
        "token or prefill=90ms@512, of the products alone.",
        rich_help_panel=BUDGET,
        show_default=False,
    ),
]
Space = Annotated[
    str,
    typer.Option(
        metavar="NAME|A,B,C",
        help="Candidates: int-s (4, 8 bits), int-l (4 to 8), int-xl (3 to 8), int-pairs (weights "
        "and inputs apart), float-s (4, 8 bits), float (those of OCP), float-l (all of 4 to 8), "
        "mixed-l, mixed-xl and mixed-pairs (these and integers), zero-pairs (and inputs with zero "
        "points), fours (all of 4 bits), columns (some input channels wider), weights (inputs as "
        "they are), or schemes such as w4a8,w8a8.",
        rich_help_panel=RECIPE,
    ),
]
Shared = Annotated[
    str,
    typer.Option(
        metavar="group|weight|block|model",
        help="What gets one decision: what reads one input, each weight, a block, or everything.",
        rich_help_panel=RECIPE,
    ),
]
Widths = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,C",
        help="Search the MLPs' width, too: shares of their hidden channels, such as 0.5,0.75,1.",
        rich_help_panel=RECIPE,
        show_default=False,
    ),
]
Steps = Annotated[
    int, typer.Option(min=1, metavar="N", help="Of training.", rich_help_panel=RECIPE)
]
Rate = Annotated[
    float, typer.Option(metavar="X", help="Highest learning rate.", rich_help_panel=RECIPE)
]
Batch = Annotated[
    int, typer.Option(min=1, metavar="N", help="Windows a step.", rich_help_panel=RECIPE)
]
Seqlen = Annotated[
    int, typer.Option(min=2, metavar="N", help="Tokens of a window.", rich_help_panel=RECIPE)
]
Windows = Annotated[
    int, typer.Option(min=1, metavar="N", help="Windows to draw from.", rich_help_panel=RECIPE)
]
Rest = Annotated[
    str,
    typer.Option(
        metavar="SCHEME",
        help="Of embeddings, heads and experts, which are not searched.",
        rich_help_panel=RECIPE,
    ),
]
Measured = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Judge every format of every layer alone on N batches first, and let the search begin "
        "with what that loses: for short runs. 0: it begins undecided.",
        rich_help_panel=RECIPE,
    ),
]
Bfloat16 = Annotated[
    bool,
    typer.Option("--bf16", help="Multiply in bfloat16 while training.", rich_help_panel=RECIPE),
]
WorkBeside = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where the state of the training is kept, OUT.work by default.",
        rich_help_panel=FILES,
    ),
]


def train_search(
    model: Model,
    output: Output,
    cost: Cost,
    data: Data = None,
    space: Space = "int-l",
    shared: Shared = "group",
    widths: Widths = None,
    steps: Steps = 300,
    rate: Rate = 2e-5,
    batch: Batch = 2,
    seqlen: Seqlen = 64,
    windows: Windows = 512,
    rest: Rest = "w8g64",
    measured: Measured = 0,
    seed: Seed = None,
    bf16: Bfloat16 = False,
    threads: Threads = None,
    work: WorkBeside = None,
    overwrite: Overwrite = False,
    download: Download = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a language model in low precision while the formats of its layers are searched (FLIQS).

    The full-precision model teaches its copy on the text of --data. Weights and formats come out of
    one run; a run that was stopped goes on. It takes the memory of training, and hours where the
    other commands take minutes: use it where the weights have to adapt, as with 4-bit inputs.

    Examples:
        quantlib train-search path/to/model --cost 4x8 --data text.txt -o OUT
        quantlib train-search MODEL -o OUT --data text.txt --cost 12.5% --space float --steps 500
        quantlib train-search MODEL -o OUT --data text.txt --cost 12ms --space w4g64a8,w6g64a8,w8a8
    """
    from quantlib.pipeline.train_search import Request
    from quantlib.pipeline.train_search import train_search as run

    if data is None:
        raise UsageError("training needs text: add --data TEXT (a file, .jsonl, or a folder)")
    request = Request(
        data=data,
        cost=cost,
        space=space,
        shared=shared,
        steps=steps,
        rate=rate,
        batch=batch,
        seqlen=seqlen,
        windows=windows,
        seed=seed or 0,
        rest=rest,
        autocast=bf16,
        measured=measured,
        threads=threads,
        widths=_shares(widths),
    )
    quiet_transformers()
    result = run(
        model,
        output,
        request,
        work=work,
        overwrite=overwrite,
        download=download,
        progress=Bars(notes()),
    )
    if json:
        print_json(_described(result))
    else:
        _show(result, model)


def _shares(text: str | None) -> tuple[float, ...]:
    """Raises UsageError for what are not numbers apart by commas."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise UsageError(f"{text!r} are no widths: write shares such as 0.5,0.75,1") from error


def _described(result: Result) -> dict[str, Any]:
    return {
        "checkpoint": result.path,
        "unit": result.costs.unit,
        "cost": result.cost,
        "target": result.target,
        "bytes": result.plan.bytes,
        "schemes": result.plan.schemes,
    }


def _show(result: Result, model: str) -> None:
    """Where it is, what it costs, and what to try next. `model`: as the user calls it."""
    from quantlib.search.budget import format_size

    say = result.costs.text
    counts: dict[str, int] = {}
    for scheme in result.plan.schemes.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    console = answers()
    console.print(
        facts(
            [
                ("checkpoint", str(result.path)),
                ("size", format_size(result.plan.bytes)),
                ("cost", f"{say(result.cost)}, {say(result.target)} allowed"),
            ]
        )
    )
    console.print()
    console.print(table("scheme", "weights", rows=[(s, str(n)) for s, n in counts.items()]))
    out = shlex.quote(str(result.path))
    next_commands(f"quantlib eval {out} --against {shlex.quote(model)} --data HELD_OUT_TEXT")
