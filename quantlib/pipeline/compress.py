"""All stages in order: the Python form of `quantlib compress`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlib.checkpoint.disk import read_json
from quantlib.checkpoint.writer import PLAN_FILE, PROVENANCE_FILE, check_output
from quantlib.errors import CheckpointError, QuantlibError, UsageError
from quantlib.formats.scheme import Scheme
from quantlib.pipeline import estimate as estimates
from quantlib.pipeline import workfiles
from quantlib.pipeline.apply import Refinement, TaskRefinement, apply
from quantlib.pipeline.bytecount import stored_bytes
from quantlib.pipeline.calibrate import calibrate
from quantlib.pipeline.latency import measured_ms
from quantlib.pipeline.measure import measure
from quantlib.pipeline.modalities import cache_scales
from quantlib.pipeline.opening import load_tokenizer, open_run, reopen_run
from quantlib.pipeline.plan import Budget, allocation_problem, search
from quantlib.pipeline.predict import check as check_prediction
from quantlib.pipeline.predict import predicted_table
from quantlib.pipeline.probe import probe
from quantlib.pipeline.rotate import rotated
from quantlib.pipeline.row_blocks import with_row_blocks
from quantlib.pipeline.run import Progress, Run
from quantlib.pipeline.shares import load_shares
from quantlib.pipeline.status import already_there
from quantlib.pipeline.swap import swap
from quantlib.recipe import FUSED_SCHEMES, Recipe, method_fields
from quantlib.search.activations import rounds_inputs
from quantlib.search.latency import LatencyBudget, format_ms, phase_text
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.tasks import Objective

__all__ = [
    "Result",
    "apply_plan",
    "compress",
    "load_tokenizer",
    "measured_table",
    "open_run",
    "prepare",
    "recipe_for",
    "reopen_run",
    "rotated",
]


@dataclass(frozen=True)
class Result:
    """What a compression left behind.

    path, file_bytes: the checkpoint, and its safetensors files together.
    source, source_bytes, parameters: the model it was made from.
    plan: what was decided. refinement: what re-rounding gave, None when it was not asked for.
    report: the HTML report. seconds: time by stage, of this process.
    latency: milliseconds of the checkpoint on this machine, for the latencies that were limited.
    """

    path: Path
    work: Path
    plan: Plan
    file_bytes: int
    source: Path
    source_bytes: int
    parameters: int
    refinement: Refinement | TaskRefinement | None
    report: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    latency: dict[str, float] = field(default_factory=dict)


def prepare(run: Run, out: Path | None = None, budget: int | None = None) -> estimates.Estimate:
    """The pre-flight estimate and what is already done, said through the run's progress.

    out, budget: where a checkpoint of at most so many bytes (None: any) will be written, if one
    will.
    Raises CheckpointError when a disk cannot hold the run.
    """
    found = estimates.for_recipe(run.model_map, run.recipe)
    run.progress.say(f"needs {found} in {run.work.path}")
    done = already_there(run)
    if done:
        run.progress.say(f"continuing: {done} are already there")
    estimates.require_room(run, found, out, budget)
    return found


def measured_table(run: Run, predict: str | None = None) -> Sensitivity:
    """Calibrate, measure and probe; the table is written to the work directory.

    Probes are plans without rules, so the table serves every later budget. predict: a method of
    `pipeline.predict`, to measure a part only; there are then no probes, which would round what was
    left out.
    """
    if predict is not None:
        check_prediction(run, predict)
    calibrate(run)
    run.extra_bytes += stored_bytes(cache_scales(run))
    if predict is None:
        table = measure(run)
        if run.recipe.rows:
            table = with_row_blocks(run, table)
        table = probe(run, table, allocation_problem(run.model_map, table, Budget()))
    else:
        table = predicted_table(run, predict)
    workfiles.save_table(run.work.path, table, run.recipe)
    return table


def compress(
    model: str | Path,
    *,
    out: str | Path,
    data: str | Path,
    size: str | None = None,
    bits: float | None = None,
    work: str | Path | None = None,
    scheme: str | None = None,
    activations: float | None = None,
    engine: str = "quantlib",
    floors: tuple[str, ...] = (),
    ceilings: tuple[str, ...] = (),
    pins: tuple[str, ...] = (),
    components: tuple[str, ...] = (),
    objective: Objective | None = None,
    threads: int | None = None,
    mode: str | None = None,
    overwrite: bool = False,
    download: bool = False,
    report: bool = True,
    progress: Progress | None = None,
    **recipe: Any,
) -> Result:
    """Compress `model` to a budget and write a packed checkpoint to `out`.

    data: calibration text (a file, JSONL, a folder, or `hub:name`). size or bits: the budget; or
    latency=["12ms", "prefill=0.5s@512"], alone or with one of them, for `threads` threads of this
    machine (torch's number by default) and activations in `mode` ("exact", "int8"; by default as
    the schemes say). scheme: a method that rounds activations and the KV cache too, "resq" or
    "resq-fp" (`recipe.method_fields`). activations: the most mean bits of the inputs of linears,
    where the candidates round them (`search.activations`). components: byte budgets of components
    ("vision_tower=2MB"), beside the budget of the whole or alone. objective: what to minimise over
    several tasks; by default the sum of their relative increases. work: the work directory
    (`OUT.work` by default), where a killed run continues and where another budget costs seconds.
    recipe: fields of `quantlib.recipe.Recipe`, such as preset="fast" or seed=1.
    """
    if scheme is not None:
        recipe = method_fields(scheme, activations) | recipe
    budget = Budget(
        size,
        bits,
        engine,
        tuple(floors),
        tuple(ceilings),
        tuple(pins),
        components=tuple(components),
        objective=objective or Objective(),
    )
    settings = recipe_for(budget, data=str(data), **recipe)
    latency = LatencyBudget(settings.latency, threads, mode)
    budget = replace(budget, latency=latency, activations=activations)
    out = Path(out)
    place = default_work(out) if work is None else Path(work)
    check_output(out, overwrite=True)
    _check_apart(out, place)
    with open_run(
        model, place, settings, budget=budget, download=download, progress=progress
    ) as run:
        budget.objective.check(run.tasks)
        _check_replaced(out, run, overwrite, lambda there: budget.asked_for(there, run.model_map))
        prepare(run, out, budget.in_bytes(run.model_map))
        run = rotated(run)
        table = measured_table(run)
        plan, problem, _ = search(run.model_map, table, budget, run.costs)
        if settings.swaps:
            plan = swap(run, plan, problem).plan
        workfiles.save_plan(run.work.path, plan)
        if run.costs is not None:
            workfiles.save_costs(run.work.path, run.costs)
        path, refinement = apply(run, plan, out, refine=settings.refine, overwrite=overwrite)
        return finish(run, table, problem, plan, path, refinement, report=report)


def apply_plan(
    plan: Path,
    out: str | Path,
    work: str | Path,
    *,
    model: str | Path | None = None,
    refine: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Write the checkpoint of a plan file from what was measured in `work`: `quantlib apply`.

    model: where the model lies now, if it has moved. refine: re-round the plan, and ship the better
    of the two.
    """
    known, out = workfiles.load_model(work), Path(out)
    table = workfiles.load_table(work, known.model_map)
    chosen = workfiles.load_plan(plan, known.model_map, table)
    check_output(out, overwrite=True)
    with reopen_run(work, model=model, with_data=refine, progress=progress) as run:
        _check_replaced(out, run, overwrite, lambda there: there.schemes == chosen.schemes)
        path, refinement = apply(run, chosen, out, refine=refine, overwrite=overwrite)
        workfiles.save_plan(run.work.path, chosen)
        run.costs = workfiles.load_costs(work, chosen)
        problem = allocation_problem(known.model_map, table, Budget.rules_of(chosen), run.costs)
        return finish(run, table, problem, chosen, path, refinement)


def recipe_for(budget: Budget, **fields: Any) -> Recipe:
    """The recipe of these fields for a budget.

    An engine that fuses has candidates of its own by default, and a scheme that a weight is pinned
    to becomes a candidate.
    """
    if budget.fuses and fields.get("schemes") is None:
        fields["schemes"] = FUSED_SCHEMES
    recipe = Recipe.create(**fields)
    if budget.fuses and recipe.rows:
        raise UsageError(
            f"{budget.engine} runs linears of one matrix, and rows puts them in several: leave out "
            "--rows or --engine"
        )
    pinned = [Scheme.parse(rule.value) for rule in budget.rules() if rule.kind == "pin"]
    missing = [str(s) for s in pinned if s.weight and str(s) not in recipe.schemes]
    if not missing:
        return recipe
    if not recipe.rounds_activations and rounds_inputs(missing):
        raise UsageError(
            f"a weight is pinned to {', '.join(missing)}, which rounds activations, and "
            "no candidate does: name candidates that do with --schemes, or use --scheme resq"
        )
    return Recipe.create(**recipe.model_dump() | {"schemes": (*recipe.schemes, *missing)})


def default_work(out: Path) -> Path:
    """The work directory that goes with a checkpoint."""
    return out.with_name(out.name + ".work")


def finish(
    run: Run,
    table: Sensitivity,
    problem: Problem,
    plan: Plan,
    path: Path,
    refinement: Refinement | TaskRefinement | None,
    *,
    report: bool = True,
) -> Result:
    """Remember a finished checkpoint in the work directory, and draw the report."""
    work = run.work.path
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    text = refinement if isinstance(refinement, Refinement) else None
    tasks = refinement.to_json() if isinstance(refinement, TaskRefinement) else {}
    shipped = text.shipped if text else None
    before = text.bank if text and text.kept else None
    taken = _measured_latency(run, plan, path)
    outcome = workfiles.Outcome(
        path, size, plan.schemes, shipped, before, run.seconds, taken, tasks
    )
    workfiles.save_outcome(work, outcome)
    page = None
    if report:
        # Imported here: it brings matplotlib, which nothing before it needs.
        from quantlib.pipeline.reporting import REPORT_FILE, write_run_report

        known = workfiles.load_model(work)
        page = write_run_report(
            work / REPORT_FILE,
            known,
            run.recipe,
            table,
            problem,
            plan,
            outcome,
            run.costs,
            shares=load_shares(work),
        )
    return Result(
        path,
        work,
        plan,
        size,
        run.source.path,
        run.source.file_bytes,
        run.model_map.parameters,
        refinement,
        page,
        dict(run.seconds),
        taken,
    )


def _measured_latency(run: Run, plan: Plan, path: Path) -> dict[str, float]:
    """Cost -> milliseconds of the finished checkpoint, for the latencies that its plan limits and
    this machine has prices of."""
    costs = [cost for cost in plan.limits if run.costs is not None and cost in run.costs.fixed]
    if not costs or run.costs is None:
        return {}
    with run.stage("time", 1) as progress:
        taken = measured_ms(path, costs, run.costs.threads, run.costs.mode)
        progress.tick(", ".join(f"{format_ms(ms)} for {phase_text(c)}" for c, ms in taken.items()))
    return taken


def _check_apart(out: Path, work: Path) -> None:
    """Raise UsageError for a work directory inside the folder of the checkpoint."""
    checkpoint, place = Path(os.path.abspath(out)), Path(os.path.abspath(work))
    if checkpoint == place or checkpoint in place.parents:
        raise UsageError(
            f"the work directory {work} lies in {out}, which holds the checkpoint and nothing "
            "else: choose a --work beside it"
        )


def _check_replaced(out: Path, run: Run, overwrite: bool, is_ours: Callable[[Plan], bool]) -> None:
    """Raise CheckpointError, before long work, when `out` holds the checkpoint of another request.

    That of this very request is left to `write_checkpoint`, which knows whether anything differs.
    """
    if overwrite or not out.is_dir() or not any(out.iterdir()):
        return
    try:
        there = Plan.load(out / PLAN_FILE, run.source.fingerprint)
        recipe = read_json(out / PROVENANCE_FILE).get("recipe")
    except QuantlibError:
        there, recipe = None, None
    mine = run.recipe.model_dump(mode="json", exclude={"data"})
    if there is None or not is_ours(there) or recipe != mine:
        raise CheckpointError(
            f"{out} already holds another checkpoint: choose another folder, or allow it to be "
            "overwritten (--overwrite)"
        )
