"""Plans whose losses were measured, kept as data: what scores of layers are judged by.

    python -P -m quantlib.bench.plans_measured smollm2       240 plans of SmolLM2-135M
    python -P -m quantlib.bench.plans_measured dinov2        240 plans of DINOv2-small
    python -P -m quantlib.bench.plans_measured --scores      how known scores rank them

At each of six budgets, 20 plans are random (`baselines.random_allocation`) and 20 are solutions of
a problem whose losses were multiplied, weight by weight, with random factors: plans as a search
finds them, from nearly right to wrong. A plan's loss is measured with its weights substituted from
the layer bank, which is why it takes a second or two: KL on two windows of 192 tokens, or half the
squared relative error of the vectors of 16 pictures; all held back from calibration.

A plan is kept as soon as it is measured, so the command can be stopped and goes on where it was.
The result file also holds the statistics and the sensitivity table that scores are computed from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from quantlib.bench import artifacts, assets, record
from quantlib.bench.beds.encoders import vision_bed
from quantlib.bench.beds.folders import CALIBRATION, MODEL
from quantlib.checkpoint.disk import read_json
from quantlib.errors import DataError, QuantlibError, UsageError
from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.language import evaluate_language
from quantlib.evaluation.reference import reference_logprobs
from quantlib.pipeline.compress import measured_table, open_run
from quantlib.pipeline.dense import DensePlan, measured_kl
from quantlib.pipeline.layers import layers_of
from quantlib.pipeline.plan import TASK, Budget, allocation_problem
from quantlib.pipeline.run import Run
from quantlib.pipeline.task_trials import TaskTrials
from quantlib.recipe import Recipe
from quantlib.search.baselines import random_allocation
from quantlib.search.expressions import Expression
from quantlib.search.problem import Picks, Problem
from quantlib.search.proxies import COLUMNS, KNOWN, LAYER, Columns, Layers
from quantlib.search.rank import MeasuredPlans, qualities
from quantlib.search.sensitivity import Entry, Sensitivity
from quantlib.search.solve import solve

BUDGETS, EACH = 6, 20
PLANS = 2 * EACH * BUDGETS
SPAN = (0.06, 0.60)
"""Budgets as fractions of the way from the smallest plan to the best one."""
SPREAD = (0.3, 2.0)
"""Standard deviations of the logarithms of the random factors, from the first plan to the last."""
WINDOWS, TOKENS = 2, 192
PICTURES = 16
FIXED: dict[str, Any] = {
    "schemes": (
        *("w2g64z4s4", "w2g32z4s4", "w3g64z4s4", "w3g32z4s4", "w4g64z5s5", "w4g32zs4"),
        *("w5g64zs5", "w5g32zs5", "w6g64zs6", "w8g64zs6"),
    ),
    "damping": 0.01,
    "weighting": "token",
}
"""Said here, so that the data stays what it is when defaults change."""
KIND = "plan loss"
RANDOM_SEED = 1_000
"""Of the first plan of a random search."""

console = Console(stderr=True)


@dataclass(frozen=True)
class Subject:
    """A model whose plans are measured: its name, task and what a loss of it is."""

    name: str
    task: str
    unit: str


SUBJECTS = {
    "smollm2": Subject("smollm2", "kl", "KL, nats per token, of 382 tokens"),
    "dinov2": Subject("dinov2", "vectors", "half the squared relative error of 16 pictures"),
}


@contextmanager
def opened(subject: Subject, work: Path | None = None) -> Iterator[tuple[Run, Sensitivity]]:
    """A run of the subject and its sensitivity table, measured if it is not in its work directory
    yet. Raises as `assets.fetch_smollm2` or `encoders.vision_bed`."""
    work = work or artifacts.folder() / "search" / subject.name
    if subject.name == "smollm2":
        model = assets.fetch_smollm2()
        recipe = Recipe.create(data=str(assets.wikipedia_text("calibration")), **FIXED)
    else:
        bed = vision_bed()
        model = bed / MODEL
        recipe = Recipe.create(data=str(bed / CALIBRATION), probe_windows=PICTURES, **FIXED)
    with open_run(model, work, recipe) as run:
        yield run, measured_table(run)


def budgets_of(problem: Problem) -> list[int]:
    """The BUDGETS budgets, in bytes."""
    low, high = problem.bytes(problem.smallest()), problem.bytes(problem.best())
    shares = np.linspace(*SPAN, BUDGETS)
    return [int(low + share * (high - low)) for share in shares]


def plan_of(problem: Problem, number: int) -> tuple[int, Picks]:
    """(budget in bytes, picks) of plan `number`, below PLANS: the same every time."""
    index, number = divmod(number, 2 * EACH)
    budget = budgets_of(problem)[index]
    number, is_solved = divmod(number, 2)
    seed = EACH * index + number
    if not is_solved:
        return budget, random_allocation(problem, budget, seed)
    spread = SPREAD[0] + (SPREAD[1] - SPREAD[0]) * number / (EACH - 1)
    return budget, solve(_distorted(problem, spread, seed), budget).picks


def _distorted(problem: Problem, spread: float, seed: int) -> Problem:
    """The problem with every item's losses times a random factor of its own."""
    factors = np.random.default_rng(seed).lognormal(0.0, spread, len(problem.items))
    items = [
        replace(
            item,
            choices=tuple(
                replace(c, loss=c.loss * factor, parts=tuple((b, p * factor) for b, p in c.parts))
                for c in item.choices
            ),
        )
        for item, factor in zip(problem.items, factors.tolist(), strict=True)
    ]
    return replace(problem, items=tuple(items))


class ShortTrials:
    """KL of plans of a language model on a few short windows, by task as `TaskTrials`."""

    def __init__(self, run: Run) -> None:
        chosen = torch.linspace(0, len(run.probe_windows) - 1, WINDOWS).round().long()
        self._windows = run.probe_windows[chosen, :TOKENS]
        self._plan = DensePlan(run)
        self._reference = reference_logprobs(self._plan.model, self._windows, second_half=False)

    def measure(self, schemes: Mapping[str, str]) -> dict[str, Estimate]:
        """Mean over windows."""
        self._plan.load(schemes)
        model, reference = self._plan.model, self._reference
        found = evaluate_language(model, self._windows, reference, second_half=False)
        return {TASK: measured_kl(found)}


@dataclass(frozen=True)
class Measured:
    """A plan, the bytes it was made for, what it loses, and the processor's seconds that took.
    schemes: of every weight."""

    budget: int
    schemes: tuple[str, ...]
    loss: float
    error: float
    seconds: float


class Measuring:
    """The plans of a subject, each measured once per work directory; the model is loaded with the
    first that is not measured yet."""

    def __init__(self, subject: Subject, run: Run, table: Sensitivity) -> None:
        self._subject, self._run, self._table = subject, run, table
        self._problem = allocation_problem(run.model_map, table, Budget())
        self._about = [table.digest(), subject.unit, BUDGETS, EACH, SPAN, SPREAD]

    @cached_property
    def _trials(self) -> ShortTrials | TaskTrials:
        run = self._run
        return ShortTrials(run) if run.workload is None else TaskTrials(run)

    def plan(self, number: int) -> Measured:
        """Plan `number`, below PLANS."""
        return self.kept({"number": number}, lambda: plan_of(self._problem, number))

    def random(self, budget: int, number: int) -> Measured:
        """Random plan `number` of a random search at a budget; none of the plans above."""
        return self.kept(
            {"random": number, "budget": budget},
            lambda: (budget, random_allocation(self._problem, budget, RANDOM_SEED + number)),
        )

    def kept(self, name: Mapping[str, int], make: Callable[[], tuple[int, Picks]]) -> Measured:
        """The plan that `make` makes, measured, if it is not in the work directory under `name`."""
        work = self._run.work
        key = work.key(KIND, about=self._about, **name)
        if not work.has(key):
            budget, picks = make()
            schemes = self._problem.schemes(picks)
            started = time.process_time()
            loss = self._trials.measure(schemes)[self._subject.task]
            seconds, error = time.process_time() - started, loss.standard_error or 0.0
            chosen = [schemes[name] for name in self._table.rows]
            found = Measured(budget, tuple(chosen), loss.value, error, seconds)
            work.commit(key, KIND, {}, vars(found) | {"schemes": chosen})
        values = work.unit(key).values
        return Measured(**{**values, "schemes": tuple(values["schemes"])})


def measure(subject: Subject, work: Path | None = None, most: int = PLANS) -> dict[str, Any]:
    """Measure what is not yet measured of the first `most` plans, one at every budget in turn, and
    return the rows of the result file."""
    numbers = [2 * EACH * index + turn for turn in range(2 * EACH) for index in range(BUDGETS)]
    with opened(subject, work) as (run, table):
        measuring, plans = Measuring(subject, run, table), []
        for number in numbers[:most]:
            plans.append(measuring.plan(number))
            if len(plans) % EACH == 0:
                console.print(f"{len(plans)} of {most} of {subject.name}: {plans[-1].loss:.4g}")
        return as_rows(subject, table, layers_of(run), plans)


def as_rows(
    subject: Subject, table: Sensitivity, layers: Layers, plans: Sequence[Measured]
) -> dict[str, Any]:
    """The result file: numbers in few digits, a line for every weight and every plan. A plan is one
    digit per weight, the index of its scheme."""
    task, schemes = subject.task, list(next(iter(table.rows.values())))
    measured = []
    for plan in plans:
        digits = "".join(str(schemes.index(scheme)) for scheme in plan.schemes)
        measured.append(f"{plan.budget} {plan.loss:.6g} {plan.error:.3g} {digits}")
    weights = {}
    for name, row in table.rows.items():
        weights[name] = {
            "layer": " ".join(f"{layers.rows[task][name][column]:.5g}" for column in LAYER),
            "bytes": " ".join(str(row[scheme].bytes) for scheme in schemes),
            "loss": " ".join(f"{row[scheme].loss[task]:.5g}" for scheme in schemes),
        }
    return {
        "subject": subject.name,
        "task": task,
        "unit": subject.unit,
        "columns": list(LAYER),
        "schemes": schemes,
        "weights": weights,
        "plans": measured,
    }


def kept(folder: Path = record.RESULTS) -> list[str]:
    """The subjects whose plans are measured."""
    return [name for name in SUBJECTS if (folder / f"plans_{name}.json").exists()]


def load(name: str, folder: Path = record.RESULTS) -> MeasuredPlans:
    """The measured plans of a subject. Raises DataError when they were not measured, or when the
    file is not one that this module wrote."""
    file = folder / f"plans_{name}.json"
    if not file.exists():
        raise DataError(
            f"the plans of {name} were not measured: run python -P -m "
            f"quantlib.bench.plans_measured {name}"
        )
    data = read_json(file)
    try:
        if tuple(data["columns"]) != LAYER:
            raise DataError(f"{file} has other statistics than this quantlib: measure it again")
        task, schemes = data["task"], data["schemes"]
        rows, layers = {}, {}
        for weight, found in data["weights"].items():
            numbers = map(float, found["layer"].split())
            layers[weight] = dict(zip(LAYER, numbers, strict=True))
            sizes, losses = map(int, found["bytes"].split()), map(float, found["loss"].split())
            pairs = zip(schemes, sizes, losses, strict=True)
            rows[weight] = {s: Entry(size, {task: loss}, {task: 0.0}) for s, size, loss in pairs}
        plans = [line.split() for line in data["plans"]]
        digits = np.array([[int(digit) for digit in plan[3]] for plan in plans])
        measured = np.array([[float(number) for number in plan[:3]] for plan in plans])
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"{file} is damaged ({error!r}): measure it again") from error
    columns = Columns.of(Sensitivity(name, (task,), rows), Layers(name, {task: layers}), task)
    weights = np.repeat(np.arange(len(rows)), len(schemes))
    first = len(schemes) * np.arange(len(rows))
    budgets = measured[:, 0].astype(np.int64)
    return MeasuredPlans(
        name, columns.values, weights, first + digits, measured[:, 1], measured[:, 2], budgets
    )


def known_scores(plans: MeasuredPlans) -> dict[str, dict[str, float]]:
    """Score -> rank correlations, of those that need no evolution, and of the measured table."""
    formulas = {name: Expression.parse(text, COLUMNS) for name, text in KNOWN.items()}
    formulas["measured"] = Expression.parse("loss", COLUMNS)
    return {
        name: qualities(plans.scores(formula.evaluate(plans.columns)), plans)
        for name, formula in formulas.items()
    }


def main(
    subject: Annotated[str | None, typer.Argument(help="smollm2 or dinov2.")] = None,
    work: Annotated[Path | None, typer.Option(help="Work directory of the model.")] = None,
    plans: Annotated[int, typer.Option(help="The most plans to measure.")] = PLANS,
    scores: Annotated[bool, typer.Option("--scores", help="Rank what was measured.")] = False,
) -> None:
    """Measure the plans of a model, or say how well known scores rank those that are measured."""
    try:
        if subject is not None:
            if subject not in SUBJECTS:
                raise UsageError(f"unknown subject {subject!r}: use {', '.join(SUBJECTS)}")
            print(record.write(f"plans_{subject}", measure(SUBJECTS[subject], work, plans)))
        if scores or subject is None:
            for name in kept() or SUBJECTS:
                for score, found in known_scores(load(name)).items():
                    print(name, score, {key: round(value, 3) for key, value in found.items()})
    except QuantlibError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
