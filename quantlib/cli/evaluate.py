"""`quantlib eval`: what a checkpoint is worth, each figure with its standard error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlib.cli.console import answers, notes, print_json, table
from quantlib.cli.options import Checkpoint, Debug, Json
from quantlib.cli.progress import Bars, by_stage
from quantlib.cli.request import quiet_transformers
from quantlib.errors import UsageError

MEASUREMENT = "Measurement"
TEXT = "Suite text: windows of a text"
BOTH_WAYS = "Suite multimodal: records of pictures, sounds and words"
SUITES = ("text", "multimodal")

Data = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT|RECORDS",
        help="What calibration has not seen: a text (file, .jsonl, folder, or hub:name), or a "
        ".jsonl file of records with pictures or sounds. By default the records that it held back, "
        "if OUT.work is still there.",
        rich_help_panel=MEASUREMENT,
        show_default=False,
    ),
]
Against = Annotated[
    Path | None,
    typer.Option(
        metavar="MODEL",
        help="Folder of the model it was made from: adds KL and the share of equal answers.",
        rich_help_panel=MEASUREMENT,
    ),
]
Suite = Annotated[
    str | None,
    typer.Option(
        metavar="text|multimodal",
        help="What is measured; multimodal unless said where the data has pictures or sounds.",
        rich_help_panel=MEASUREMENT,
        show_default=False,
    ),
]
Windows = Annotated[int, typer.Option(metavar="N", help="Windows of text.", rich_help_panel=TEXT)]
Seqlen = Annotated[int, typer.Option(metavar="N", help="Tokens of a window.", rich_help_panel=TEXT)]
Seed = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Seed of the choice of windows or records, and of drawn pictures.",
        rich_help_panel=MEASUREMENT,
    ),
]
JudgeFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A judge (.safetensors) that says what a drawn picture shows.",
        rich_help_panel=BOTH_WAYS,
    ),
]
Limit = Annotated[
    int,
    typer.Option(metavar="N", help="Most records of each stream.", rich_help_panel=BOTH_WAYS),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        metavar="G",
        help="How strongly drawn pictures follow their prompt; the model's own unless said.",
        rich_help_panel=BOTH_WAYS,
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        metavar="T",
        help="Of drawn pictures; both models draw with the same random numbers.",
        rich_help_panel=BOTH_WAYS,
    ),
]


def evaluate(
    out: Checkpoint,
    data: Data = None,
    against: Against = None,
    suite: Suite = None,
    windows: Windows = 12,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    judge: JudgeFile = None,
    limit: Limit = 64,
    guidance: Guidance = None,
    temperature: Temperature = 1.0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what a checkpoint is worth beside the model it was made from.

    Of a text: perplexity, KL, and how often both prefer the same token; the second half of each
    window is scored. Of records: what the model says of pictures and sounds (answers right and
    flipped, word error rate), the pictures it makes, and the KL of all it predicts. ± is one
    standard error over windows or records.

    Examples:
        quantlib eval OUT --against path/to/model --data held_out.txt
        quantlib eval OUT --data held_out.txt --windows 40 --json
        quantlib eval OUT --against path/to/model --data test.jsonl --judge judge.safetensors
        quantlib eval OUT --against path/to/model --suite multimodal
    """
    from quantlib.calibration.records import is_records

    if suite not in (None, *SUITES):
        raise UsageError(f"unknown --suite {suite}: use one of {', '.join(SUITES)}")
    quiet_transformers()
    chosen = None
    if data is None:
        if suite == "text":
            raise UsageError("--data is missing: give a text that calibration has not seen")
        data, chosen = _held_back(out, against)
    if chosen or suite == "multimodal" or (suite is None and is_records(data)):
        drawing = seed, guidance, temperature
        _both_ways(out, against, data, judge, limit, drawing, json, chosen)
        return
    if judge is not None:
        raise UsageError(
            "--judge looks at pictures, and the data has none: give records with a prompt and a "
            "target, or leave it out"
        )
    _text(out, against, data, seqlen, windows, seed, json)


def _held_back(out: Path, against: Path | None) -> tuple[str, frozenset[str]]:
    """The data that calibration used, and where in it are the records that it held back."""
    from quantlib.pipeline.beside import held_back

    found = held_back(out, against)
    notes().print(
        f"no --data: evaluating on the {len(found.chosen)} records of {found.data} that "
        "calibration held back, which the search has seen; records of your own judge better",
        style="yellow",
        markup=False,
    )
    return found.data, found.chosen


def _text(
    out: Path, against: Path | None, data: str, seqlen: int, windows: int, seed: int, json: bool
) -> None:
    from quantlib.evaluation.compare import compare

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


def _both_ways(
    out: Path,
    against: Path | None,
    data: str,
    judge: Path | None,
    limit: int,
    drawing: tuple[int, float | None, float],
    json: bool,
    chosen: frozenset[str] | None = None,
) -> None:
    from quantlib.evaluation.multimodal import evaluate_suite
    from quantlib.evaluation.passes import Options

    seed, guidance, temperature = drawing
    found = evaluate_suite(
        out,
        against,
        data,
        judge=judge,
        limit=limit,
        chosen=chosen,
        options=Options(seed=seed, guidance=guidance, temperature=temperature),
        progress=by_stage(Bars(notes())),
    )
    for sentence in found.skipped:
        notes().print(sentence, style="yellow", markup=False)
    if json:
        print_json(found.to_json())
        return
    console = answers()
    console.print(table(*found.columns(), rows=found.rows(), numbers_from=2))
    console.print(found.footing(), style="dim", markup=False)
