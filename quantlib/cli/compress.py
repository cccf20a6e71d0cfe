"""`quantlib compress` and `quantlib measure`: the commands that take their time."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlib.cli.console import answers, notes, print_json
from quantlib.cli.options import (
    FILES,
    OTHER,
    RECIPE,
    Activations,
    Balance,
    Bits,
    Ceiling,
    ComponentSize,
    Data,
    Debug,
    Download,
    Engine,
    Fast,
    Floor,
    Json,
    Keep,
    Kv,
    Latency,
    Method,
    Mode,
    Model,
    Nonlinear,
    Output,
    Overwrite,
    Pin,
    Preset,
    RecipeFile,
    Rotation,
    Schemes,
    Seed,
    Seqlen,
    Size,
    TaskWeights,
    Threads,
    TokenWeighting,
    Windows,
    Work,
)
from quantlib.cli.progress import Bars
from quantlib.cli.request import budget_of, latency_of, quiet_transformers, recipe_fields
from quantlib.cli.results import described, show
from quantlib.cli.words import next_commands
from quantlib.errors import UsageError

if TYPE_CHECKING:
    from quantlib.pipeline.compress import Result
    from quantlib.pipeline.plan import Budget
    from quantlib.search.sensitivity import Sensitivity

WorkBeside = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Work directory, OUT.work by default; another budget on it costs seconds.",
        rich_help_panel=FILES,
    ),
]
Refine = Annotated[
    bool | None,
    typer.Option(
        "--refine/--no-refine",
        help="Round the plan again with quantized inputs, and ship the better of the two.",
        rich_help_panel=RECIPE,
        show_default=False,
    ),
]
Learning = Annotated[
    int | None,
    typer.Option(
        metavar="STEPS",
        help="Of learned rounding (AutoRound) of every block that --refine rounds again; the best "
        "step is kept, 0 for none.",
        rich_help_panel=RECIPE,
    ),
]
Rows = Annotated[
    bool | None,
    typer.Option(
        "--rows/--no-rows",
        help="Let linears mix widths by rows: outputs that matter more get more bits. Loses less, "
        "and takes longer to measure.",
        rich_help_panel=RECIPE,
        show_default=False,
    ),
]
Predict = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD",
        help="Measure only a part, and predict the rest: rows (a sample of every weight's rows), "
        "ridge (a regression on a tenth of the layers) or graph (a graph network on them).",
        rich_help_panel=RECIPE,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check the request, print the estimate, and stop.",
        rich_help_panel=OTHER,
    ),
]


def compress(
    model: Model,
    output: Output,
    size: Size = None,
    bits: Bits = None,
    latency: Latency = None,
    threads: Threads = None,
    mode: Mode = None,
    activations: Activations = None,
    component_size: ComponentSize = None,
    task_weights: TaskWeights = None,
    balance: Balance = None,
    data: Data = None,
    work: WorkBeside = None,
    overwrite: Overwrite = False,
    download: Download = False,
    preset: Preset = None,
    fast: Fast = False,
    recipe: RecipeFile = None,
    scheme: Method = None,
    schemes: Schemes = None,
    kv: Kv = None,
    nonlinear: Nonlinear = None,
    rotation: Rotation = None,
    weighting: TokenWeighting = None,
    keep: Keep = None,
    seqlen: Seqlen = None,
    windows: Windows = None,
    seed: Seed = None,
    rows: Rows = None,
    refine: Refine = None,
    learning: Learning = None,
    engine: Engine = "quantlib",
    floor: Floor = None,
    ceiling: Ceiling = None,
    pin: Pin = None,
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compress a model to a budget: calibrate, measure, search, and write a packed checkpoint.

    Killed or interrupted anywhere, the same command continues where it stopped. Another budget on
    the same work directory costs seconds.

    With --scheme resq more than weights is rounded: the inputs of linears to a mean of
    --activations bits, keys and values as --kv says, in a basis of the model in which few columns
    matter.

    Examples:
        quantlib compress path/to/model --size 82.8MB --data text.txt -o OUT
        quantlib compress path/to/model --bits 4.25 --data text.txt -o OUT --fast
        quantlib compress MODEL -o OUT --size 30% --data text.txt --floor q_proj=4
        quantlib compress MODEL -o OUT --bits 5 --data text.txt --pin lm_head=w8g64
        quantlib compress MODEL -o OUT --data text.txt --latency 12ms --size 90MB
        quantlib compress MODEL -o OUT --data text.txt --bits 4.4 --scheme resq --activations 4.5
        quantlib compress MODEL -o OUT --data records.jsonl --bits 4.5 --balance minmax
        quantlib compress path/to/model --bits 4 --data text.txt -o OUT --dry-run
    """
    asked: dict[str, Any] = {"data": data, "seqlen": seqlen, "windows": windows, "seed": seed}
    asked |= {"preset": preset, "fast": fast, "schemes": schemes, "method": scheme}
    asked |= {"rotation": rotation, "kv": kv, "nonlinear": nonlinear, "weighting": weighting}
    asked |= {"refine": refine, "learning": learning, "rows": rows, "keep": keep}
    asked |= {"latency": latency, "activations": activations}
    fields = recipe_fields(recipe, **asked)
    rules: dict[str, Any] = {"floor": floor, "ceiling": ceiling, "pin": pin, "engine": engine}
    rules |= {"component_size": component_size, "task_weights": task_weights, "balance": balance}
    rules |= {"latency": latency_of(fields.get("latency"), threads, mode)}
    budget = budget_of(size, bits, activations=activations, **rules)
    if learning and not _refines(budget, fields):
        raise UsageError("--learning is a part of rounding a plan again: add --refine")
    if dry_run:
        _dry_run(model, budget, fields, download, json)
        return
    files = {"out": output, "work": work, "overwrite": overwrite, "download": download}
    result = _run(model, budget, {**files, "threads": threads, "mode": mode, **fields})
    if json:
        print_json(described(result))
    else:
        show(result, model)


def _refines(budget: Budget, fields: dict[str, Any]) -> bool:
    """Whether a request rounds its plan again."""
    from quantlib.pipeline.compress import recipe_for

    return recipe_for(budget, **fields).refine


def _run(model: str, budget: Budget, arguments: dict[str, Any]) -> Result:
    """All stages, with bars."""
    from quantlib.pipeline.compress import compress as run

    quiet_transformers()
    return run(
        model,
        size=budget.size,
        bits=budget.bits,
        engine=budget.engine,
        activations=budget.activations,
        floors=budget.floors,
        ceilings=budget.ceilings,
        pins=budget.pins,
        components=budget.components,
        objective=budget.objective,
        progress=Bars(notes()),
        **arguments,
    )


def measure(
    model: Model,
    work: Work,
    data: Data = None,
    download: Download = False,
    preset: Preset = None,
    fast: Fast = False,
    recipe: RecipeFile = None,
    scheme: Method = None,
    schemes: Schemes = None,
    activations: Activations = None,
    kv: Kv = None,
    nonlinear: Nonlinear = None,
    rotation: Rotation = None,
    weighting: TokenWeighting = None,
    keep: Keep = None,
    seqlen: Seqlen = None,
    windows: Windows = None,
    seed: Seed = None,
    rows: Rows = None,
    engine: Engine = "quantlib",
    predict: Predict = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what every weight loses in every candidate scheme, and keep all of them rounded.

    This is what takes the time; searching and applying afterwards cost seconds. Killed or
    interrupted anywhere, the same command continues where it stopped.

    With --predict only a part is measured, and what a plan chooses is rounded when it is applied.

    Examples:
        quantlib measure path/to/model --data text.txt --work WORK
        quantlib measure path/to/model --data text.txt --work WORK --fast
        quantlib measure path/to/model --data text.txt --work WORK --scheme resq --activations 4.5
        quantlib measure path/to/model --data text.txt --work WORK --predict rows
        quantlib search --work WORK --bits 4.25
    """
    from quantlib.pipeline.compress import measured_table, open_run, prepare, recipe_for, rotated
    from quantlib.pipeline.plan import Budget
    from quantlib.pipeline.workfiles import SENSITIVITY_FILE

    fields = recipe_fields(
        recipe,
        data=data,
        preset=preset,
        fast=fast,
        schemes=schemes,
        seqlen=seqlen,
        windows=windows,
        seed=seed,
        method=scheme,
        activations=activations,
        kv=kv,
        nonlinear=nonlinear,
        rotation=rotation,
        weighting=weighting,
        keep=keep,
        rows=rows,
    )
    settings = recipe_for(Budget(engine=engine), **fields)
    quiet_transformers()
    with open_run(model, work, settings, download=download, progress=Bars(notes())) as run:
        prepare(run)
        run = rotated(run)
        found = measured_table(run, predict)
        seconds = dict(run.seconds)
    file = work / SENSITIVITY_FILE
    if json:
        facts = {"work": work, "sensitivity": file, "schemes": settings.schemes}
        print_json({**facts, **_told(found), "predicted": predict, "seconds": seconds})
        return
    how = f", predicted by {predict}" if predict else ""
    answers().print(f"{file}: {len(found.rows)} weights in {len(settings.schemes)} schemes{how}")
    next_commands(f"quantlib search --work {shlex.quote(str(work))} --bits 4.25")


def _told(table: Sensitivity) -> dict[str, Any]:
    """What `measure --json` says of a table."""
    return {
        "weights": len(table.rows),
        "tasks": table.tasks,
        "baseline": dict(table.baseline),
        "probes": max((len(c.probes) for c in table.calibrations.values()), default=0),
    }


def _dry_run(
    model: str, budget: Budget, fields: dict[str, Any], download: bool, json: bool
) -> None:
    """Everything that can be checked and estimated from headers and timings, and nothing written
    but those timings."""
    from dataclasses import asdict

    from quantlib.pipeline.compress import recipe_for
    from quantlib.pipeline.estimate import for_recipe
    from quantlib.pipeline.opening import load_inputs
    from quantlib.search.budget import format_size
    from quantlib.search.infeasible import limit_text

    quiet_transformers()
    settings = recipe_for(budget, **fields)
    inputs = load_inputs(model, settings, budget=budget, download=download, progress=Bars(notes()))
    estimate, allowed = for_recipe(inputs.model_map, settings), budget.in_bytes(inputs.model_map)
    if json:
        print_json({**asdict(estimate), "disk_bytes": estimate.disk_bytes, "budget": allowed})
        return
    limits = [] if allowed is None else [f"at most {format_size(allowed)}"]
    found = budget.limits(inputs.model_map)
    limits += [limit_text(cost, limit) for cost, limit in found.items()]
    answers().print(f"needs {estimate}, for a checkpoint of {' and '.join(limits)}")
