"""All stages in order: the Python form of `quantlib compress`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlib.checkpoint.disk import atomic_write_text
from quantlib.checkpoint.workdir import WorkDir
from quantlib.checkpoint.writer import check_output
from quantlib.errors import DataError
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.pipeline import estimate as estimates
from quantlib.pipeline.apply import Refinement, apply
from quantlib.pipeline.calibrate import calibrate
from quantlib.pipeline.measure import measure
from quantlib.pipeline.plan import Budget, allocation_problem, save_plan, save_table, search
from quantlib.pipeline.probe import probe
from quantlib.pipeline.run import Progress, Run, Silent
from quantlib.pipeline.swap import swap
from quantlib.recipe import Recipe
from quantlib.search.plan import Plan
from quantlib.search.sensitivity import Sensitivity

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Result:
    """What a compression left behind.

    path: the checkpoint. file_bytes: its safetensors files together. source_bytes: those of the source.
    plan: what was decided. refinement: what re-rounding gave, None when it was not asked for.
    report: the HTML report. seconds: time by stage, of this process.
    """

    path: Path
    work: Path
    plan: Plan
    file_bytes: int
    source_bytes: int
    refinement: Refinement | None
    report: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def open_run(
    model: str | Path, work: str | Path, recipe: Recipe, *, download: bool = False, progress: Progress | None = None
) -> Iterator[Run]:
    """A run on a locked work directory. Raises a QuantlibError for anything wrong with model, tokenizer or folder."""
    source = Source.open(model, allow_download=download)
    model_map = ModelMap.from_source(source)
    tokenizer = load_tokenizer(source.path)
    with WorkDir.open(work) as workdir:
        run = Run(source, model_map, workdir, recipe, tokenizer, progress or Silent())
        atomic_write_text(workdir.path / RECIPE_FILE, recipe.to_yaml())
        yield run


def load_tokenizer(path: Path) -> Any:
    """The tokenizer beside a model. Raises DataError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises many types here, for one reason
        raise DataError(
            f"{path} has no usable tokenizer ({str(error).splitlines()[0]}): put the model's tokenizer.json and "
            "tokenizer_config.json beside its weights"
        ) from error


def prepare(run: Run) -> estimates.Estimate:
    """The pre-flight estimate, checked against the disk. Says it through the run's progress."""
    hidden = int(run.model_map.weights[0].in_features)
    found = estimates.estimate(run.model_map, run.recipe, hidden)
    existing = sum(f.stat().st_size for f in run.work.path.rglob("*") if f.is_file())
    estimates.require_room(run.work.path, found, existing)
    return found


def measured_table(run: Run, budget: Budget) -> Sensitivity:
    """Calibrate, measure and probe; the table is written to the work directory."""
    calibrate(run)
    table = measure(run)
    unconstrained = Budget(size=budget.size, bits=budget.bits)
    table = probe(run, table, allocation_problem(run.model_map, table, unconstrained))
    save_table(run, table)
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

    data: calibration text (a file, JSONL, a folder, or `hub:name`); size or bits: the budget; work: the work directory
    (`OUT.work` by default), where a killed run continues and where another budget costs seconds.
    recipe: fields of `quantlib.recipe.Recipe`, such as preset="fast" or seed=1.
    """
    budget = Budget(size, bits, engine, tuple(floors), tuple(ceilings), tuple(pins))
    budget.rules()
    settings = Recipe.create(data=str(data), **recipe)
    out = Path(out)
    place = Path(work) if work is not None else out.with_name(out.name + ".work")
    with open_run(model, place, settings, download=download, progress=progress) as run:
        budget.in_bytes(run.model_map)
        check_output(out, overwrite=True)
        prepare(run)
        table = measured_table(run, budget)
        plan, problem, _ = search(run.model_map, table, budget)
        if settings.swaps:
            plan = swap(run, plan, problem).plan
        save_plan(run, plan)
        path, refinement = apply(run, plan, out, refine=settings.refine, overwrite=overwrite)
        page = None
        if report:
            from quantlib.pipeline.reporting import write_run_report

            page = write_run_report(run, table, problem, plan, refinement)
        size_on_disk = sum(f.stat().st_size for f in path.glob("*.safetensors"))
        return Result(path, place, plan, size_on_disk, run.source.file_bytes, refinement, page, dict(run.seconds))
