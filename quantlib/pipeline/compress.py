"""All stages in order: the Python form of `quantlib compress`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlib.checkpoint.disk import read_json
from quantlib.checkpoint.workdir import WorkDir
from quantlib.checkpoint.writer import PLAN_FILE, PROVENANCE_FILE, check_output
from quantlib.errors import CheckpointError, DataError, QuantlibError
from quantlib.formats.scheme import Scheme
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.pipeline import estimate as estimates
from quantlib.pipeline import workfiles
from quantlib.pipeline.apply import Refinement, apply
from quantlib.pipeline.calibrate import calibrate
from quantlib.pipeline.measure import measure
from quantlib.pipeline.plan import Budget, allocation_problem, check_request, search
from quantlib.pipeline.probe import probe
from quantlib.pipeline.run import Progress, Run, Silent, read_windows
from quantlib.pipeline.status import already_there
from quantlib.pipeline.swap import swap
from quantlib.recipe import FUSED_SCHEMES, Recipe
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Sensitivity


@dataclass(frozen=True)
class Result:
    """What a compression left behind.

    path, file_bytes: the checkpoint, and its safetensors files together.
    source, source_bytes, parameters: the model it was made from.
    plan: what was decided. refinement: what re-rounding gave, None when it was not asked for.
    report: the HTML report. seconds: time by stage, of this process.
    """

    path: Path
    work: Path
    plan: Plan
    file_bytes: int
    source: Path
    source_bytes: int
    parameters: int
    refinement: Refinement | None
    report: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def open_run(
    model: str | Path,
    work: str | Path,
    recipe: Recipe,
    *,
    budget: Budget | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> Iterator[Run]:
    """A run on a locked work directory.

    budget: checked to be possible. Raises a QuantlibError for anything wrong with the model, its
    tokenizer, the data or the budget before the folder is made, and then for the folder.
    """
    source = Source.open(model, allow_download=download)
    model_map = ModelMap.from_source(source)
    if budget is not None:
        check_request(model_map, recipe.schemes, budget)
    tokenizer = load_tokenizer(source.path)
    windows = read_windows(recipe, tokenizer)
    with WorkDir.open(work) as workdir:
        workfiles.claim_folder(workdir.path, source, model_map)
        run = Run(source, model_map, workdir, recipe, tokenizer, progress or Silent())
        run.all_windows = windows
        yield run


@contextmanager
def reopen_run(
    work: str | Path,
    *,
    model: str | Path | None = None,
    with_data: bool = False,
    progress: Progress | None = None,
) -> Iterator[Run]:
    """The run that measured a work directory, from the files it left there.

    model:     where the model lies now; where it was measured, by default.
    with_data: read the calibration text too, and check that it is still the same.
    """
    known, recipe = workfiles.load_model(work), workfiles.load_recipe(work)
    table = workfiles.load_table(work, known.model_map)
    source = Source.open(model or known.path)
    tokenizer = load_tokenizer(source.path)
    with WorkDir.open(work) as workdir:
        run = Run(source, known.model_map, workdir, recipe, tokenizer, progress or Silent())
        made_from = table.provenance
        if run.source_hash != made_from.get("source"):
            raise CheckpointError(
                f"{source.path} is not the model that was measured in {work}: its files differ. "
                "Give that model with --model, or measure this one in another work directory"
            )
        if not with_data:
            run.rounding_hash = made_from.get("bank", "")
        elif run.rounding_hash != made_from.get("bank"):
            raise CheckpointError(
                f"the calibration text {recipe.data} is not the one that was measured in {work}: "
                "restore it, or apply the plan without --refine"
            )
        yield run


def load_tokenizer(path: Path) -> Any:
    """The tokenizer beside a model. Raises DataError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises many types here, for one reason
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} has no usable tokenizer ({reason}): put the model's tokenizer.json and "
            "tokenizer_config.json beside its weights"
        ) from error


def prepare(run: Run, out: Path | None = None, budget: int = 0) -> estimates.Estimate:
    """The pre-flight estimate and what is already done, said through the run's progress.

    out, budget: where a checkpoint of at most so many bytes will be written, if one will.
    Raises CheckpointError when a disk cannot hold the run.
    """
    found = estimates.for_recipe(run.model_map, run.recipe)
    run.progress.say(f"needs {found} in {run.work.path}")
    done = already_there(run)
    if done:
        run.progress.say(f"continuing: {done} are already there")
    estimates.require_room(run, found, out, budget)
    return found


def measured_table(run: Run, budget: Budget | None = None) -> Sensitivity:
    """Calibrate, measure and probe; the table is written to the work directory.

    Probes are plans without rules, so the table serves every later budget.
    """
    calibrate(run)
    table = measure(run)
    table = probe(run, table, allocation_problem(run.model_map, table, Budget()))
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
    engine: str = "quantlib",
    floors: tuple[str, ...] = (),
    ceilings: tuple[str, ...] = (),
    pins: tuple[str, ...] = (),
    overwrite: bool = False,
    download: bool = False,
    report: bool = True,
    progress: Progress | None = None,
    **recipe: Any,
) -> Result:
    """Compress `model` to a budget and write a packed checkpoint to `out`.

    data: calibration text (a file, JSONL, a folder, or `hub:name`). size or bits: the budget.
    work: the work directory (`OUT.work` by default), where a killed run continues and where another
    budget costs seconds. recipe: fields of `quantlib.recipe.Recipe`, such as preset="fast" or
    seed=1.
    """
    budget = Budget(size, bits, engine, tuple(floors), tuple(ceilings), tuple(pins))
    settings = recipe_for(budget, data=str(data), **recipe)
    out = Path(out)
    place = default_work(out) if work is None else Path(work)
    check_output(out, overwrite=True)
    with open_run(
        model, place, settings, budget=budget, download=download, progress=progress
    ) as run:
        _check_replaced(out, run, overwrite, lambda there: budget.asked_for(there, run.model_map))
        prepare(run, out, budget.in_bytes(run.model_map))
        table = measured_table(run)
        plan, problem, _ = search(run.model_map, table, budget)
        if settings.swaps:
            plan = swap(run, plan, problem).plan
        workfiles.save_plan(run.work.path, plan)
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
        problem = allocation_problem(known.model_map, table, Budget.rules_of(chosen))
        return finish(run, table, problem, chosen, path, refinement)


def recipe_for(budget: Budget, **fields: Any) -> Recipe:
    """The recipe of these fields for a budget.

    An engine that fuses has candidates of its own by default, and a scheme that a weight is pinned
    to becomes a candidate.
    """
    if budget.fuses and fields.get("schemes") is None:
        fields["schemes"] = FUSED_SCHEMES
    recipe = Recipe.create(**fields)
    pinned = [Scheme.parse(rule.value) for rule in budget.rules() if rule.kind == "pin"]
    missing = [str(s) for s in pinned if s.weight and str(s) not in recipe.schemes]
    if not missing:
        return recipe
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
    refinement: Refinement | None,
    *,
    report: bool = True,
) -> Result:
    """Remember a finished checkpoint in the work directory, and draw the report."""
    work = run.work.path
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    shipped = refinement.shipped if refinement else None
    before = refinement.bank if refinement and refinement.kept else None
    outcome = workfiles.Outcome(path, size, plan.schemes, shipped, before, run.seconds)
    workfiles.save_outcome(work, outcome)
    page = None
    if report:
        # Imported here: it brings matplotlib, which nothing before it needs.
        from quantlib.pipeline.reporting import REPORT_FILE, write_run_report

        known = workfiles.load_model(work)
        page = write_run_report(
            work / REPORT_FILE, known, run.recipe, table, problem, plan, outcome
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
