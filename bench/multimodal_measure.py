"""One row of `bench.multimodal`: a model compressed by a method to a budget, and judged.

Methods that calibrate alike share a work directory: `language model only` takes its weights from
what was measured for `whole`, so that the two differ in where the bytes go, and in nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantlib.bench.comparisons import GUARDS, WORDS, Bed, Request, tasks_of
from quantlib.calibration.records import read_records
from quantlib.checkpoint.workdir import WorkDir
from quantlib.errors import SearchError
from quantlib.evaluation.multimodal import Baseline, Given
from quantlib.evaluation.passes import Options
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import KEPT, Scheme
from quantlib.formats.weight import pack
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.pipeline import bytecount
from quantlib.pipeline.apply import apply
from quantlib.pipeline.compress import measured_table, recipe_for
from quantlib.pipeline.plan import Budget, allocation_problem, no_worse, search
from quantlib.pipeline.run import KEPT_AS, Run
from quantlib.pipeline.whole import mapped, read_workload
from quantlib.pipeline.workfiles import claim_folder
from quantlib.recipe import Recipe
from quantlib.search.plan import Plan
from quantlib.search.sensitivity import Entry, Sensitivity

JUDGE = "judge.safetensors"


@dataclass(frozen=True)
class Packed:
    """A checkpoint: bytes of its weight files, bits of every parameter, what the plan predicts, the
    components that its method keeps in 16 bits, and, of the others, the parameters that the plan
    leaves so."""

    nbytes: int
    bits: float
    predicted: dict[str, float]
    kept: tuple[str, ...]
    left: dict[str, int]


def compressed(asked: Request, bed: Bed, work: Path, out: Path, bits: float, seed: int) -> Packed:
    """Write the checkpoint that a method makes of the bed's model to the folder `out`.

    work: the folder of work directories. bits: of every parameter, scales counted. Raises
    SearchError when no allocation fits, and what the pipeline raises.
    """
    method, model = asked.method, bed.folder() / "model"
    objective = asked.objective(tasks_of(Source.open(model), read_records(asked.data)))
    budget = Budget(bits=bits, pins=method.pins, objective=objective)
    fields = bed.fields(method)
    recipe = recipe_for(budget, data=str(asked.data), keep=asked.unread, seed=seed, **fields)
    measuring = {name: value for name, value in fields.items() if name != "refine"}
    shared = json.dumps([str(asked.data), asked.unread, measuring, method.pins])
    place = work / f"work-{hashlib.sha256(shared.encode()).hexdigest()[:12]}-{seed}"
    with opened(model, place, recipe) as run:
        table = measured_table(run)
        if method.guarded:
            budget = guarded(run, table, budget)
        if asked.spared:
            run, table = sparing(run, table, asked.spared)
        if asked.unread and method.plain:
            run, table = rounding_plainly(run, table, Scheme.parse(bed.plain))
        plan, _, _ = search(run.model_map, table, budget)
        apply(run, plan, out, refine=recipe.refine)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        bits = 8 * size / run.model_map.parameters
        return Packed(size, bits, dict(plan.predicted), asked.kept, _left(run.model_map, plan))


def _left(model_map: ModelMap, plan: Plan) -> dict[str, int]:
    """Component -> parameters of its weights that a plan leaves as they are."""
    found: dict[str, int] = {}
    for weight in model_map.weights:
        if plan.schemes[weight.name] in KEPT:
            found[weight.component] = found.get(weight.component, 0) + weight.parameters
    return found


@contextmanager
def opened(model: Path, work: Path, recipe: Recipe) -> Iterator[Run]:
    """A run on records, whatever their kinds: `open_run` would read those of text alone as windows
    for a language model, and text would then be measured in another way than beside pictures."""
    source, recipe = Source.open(model), recipe.for_streams()
    model_map = mapped(source, recipe)
    workload = read_workload(source, model_map, recipe)
    with WorkDir.open(work) as workdir:
        claim_folder(workdir.path, source, model_map)
        yield Run(source, model_map, workdir, recipe, None, workload=workload)


def guarded(
    run: Run, table: Sensitivity, budget: Budget, shares: Iterable[float] = GUARDS
) -> Budget:
    """The budget with a limit on every task's predicted loss: a share of what the best plan loses
    there that spends as many bytes on WORDS and leaves the rest in 16 bits.

    shares: the first that some plan can keep is taken. The budget as it is, where none can be
    kept, the bytes do not suffice for WORDS alone, or leaving a weight is none of the candidates.
    """
    schemes = {weight.name: KEPT_AS[weight.dtype] for weight in run.model_map.weights}
    if any(scheme not in table.rows[name] for name, scheme in schemes.items()):
        return budget
    others = {weight.component for weight in run.model_map.weights} - {*WORDS}
    words, theirs = sparing(run, table, others)
    try:
        plan, _, _ = search(words.model_map, theirs, budget)
    except SearchError:
        return budget
    problem = allocation_problem(run.model_map, table, budget)
    losses = no_worse(problem, schemes | plan.schemes)
    for share in shares:
        limits = {task: share * loss for task, loss in losses.items()}
        limited = replace(budget, task_limits=limits)
        try:
            search(run.model_map, table, limited)
        except SearchError:
            continue
        return limited
    return budget


def sparing(run: Run, table: Sensitivity, components: Iterable[str]) -> tuple[Run, Sensitivity]:
    """A measured run and its table with these components kept in 16 bits; the others have the
    entries of the bank that were measured."""
    model_map = run.model_map.keeping(components, "spared by this method")
    rows = {weight.name: table.rows[weight.name] for weight in model_map.weights}
    return _with_map(run, model_map), replace(table, rows=rows)


def rounding_plainly(run: Run, table: Sensitivity, scheme: Scheme) -> tuple[Run, Sensitivity]:
    """A measured run and its table with everything quantized: what the recipe keeps, because no
    record runs it, is rounded to the nearest in `scheme`, at a loss that nobody predicts."""
    other = _with_map(run, ModelMap.from_source(run.source))
    nothing = dict.fromkeys(table.tasks, 0.0)
    rows = {}
    for weight in other.model_map.weights:
        if weight.name in table.rows:
            rows[weight.name] = table.rows[weight.name]
            continue
        matrix = weight.matrix(run.source.read(weight.name)).float().flatten(0, -2)
        rounded = quantize_rtn(matrix, scheme.segments(weight.in_features))
        run.bank.put(weight.name, str(scheme), run.rounding_hash, pack(rounded))
        entry = Entry(bytecount.weight_bytes(weight, scheme), nothing, nothing)
        rows[weight.name] = {str(scheme): entry}
    return other, replace(table, rows=rows)


def _with_map(run: Run, model_map: ModelMap) -> Run:
    """The run on another map of its model, with the bank of its own: what is known of a weight does
    not depend on whether others are kept."""
    other = replace(run, model_map=model_map)
    other.source_hash, other.rounding_hash = run.source_hash, run.rounding_hash
    return other


class Judging:
    """A bed's test records, asked of the full-precision model when the first row is judged, and
    then never again.

    limit: the most records of a stream.
    """

    def __init__(self, bed: Bed, limit: int) -> None:
        self.bed, self.limit = bed, limit
        self._baseline: Baseline | None = None

    def figures(self, model: Path) -> dict[str, Any]:
        """What a checkpoint can do, as JSON values. Raises as `evaluate_suite`."""
        if self._baseline is None:
            folder = self.bed.folder()
            judge = folder / JUDGE
            given = Given(
                folder / "test.jsonl",
                judge=judge if judge.is_file() else None,
                limit=self.limit,
                options=Options(seed=0),
            )
            self._baseline = Baseline(folder / "model", given)
        result = self._baseline.evaluate(model)
        figures = [figure.to_json() for figure in result.figures]
        return {"figures": figures, "skipped": result.skipped}

    def close(self) -> None:
        """Give the disk space back."""
        if self._baseline is not None:
            self._baseline.close()

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
