"""`quantlib search` and `quantlib apply`: another budget on what was measured, in seconds."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlib.cli.console import answers, facts, notes, print_json, table
from quantlib.cli.options import (
    FILES,
    OTHER,
    RECIPE,
    Activations,
    Balance,
    Bits,
    Ceiling,
    ComponentSize,
    Debug,
    Engine,
    Floor,
    Json,
    Latency,
    Mode,
    Output,
    Overwrite,
    Pin,
    Ray,
    Score,
    Size,
    TaskWeights,
    Threads,
    Validate,
    Work,
    Workers,
)
from quantlib.cli.progress import Bars
from quantlib.cli.request import budget_of, latency_of, quiet_transformers
from quantlib.cli.results import described, show
from quantlib.cli.words import limit_rows, loss_name, next_commands, predicted_rows
from quantlib.errors import UsageError

if TYPE_CHECKING:
    from quantlib.pipeline.plan import Budget
    from quantlib.pipeline.workfiles import KnownModel
    from quantlib.search.latency import LatencyBudget, LatencyCosts
    from quantlib.search.pareto import Point
    from quantlib.search.plan import Plan
    from quantlib.search.problem import Problem
    from quantlib.search.refine import Refined
    from quantlib.search.sensitivity import Sensitivity
    from quantlib.search.solve import Solution


def search(
    work: Work,
    size: Size = None,
    bits: Bits = None,
    latency: Latency = None,
    threads: Threads = None,
    mode: Mode = None,
    activations: Activations = None,
    component_size: ComponentSize = None,
    task_weights: TaskWeights = None,
    balance: Balance = None,
    engine: Engine = "quantlib",
    floor: Floor = None,
    ceiling: Ceiling = None,
    pin: Pin = None,
    score: Score = "measured",
    validate: Validate = 0,
    workers: Workers = 1,
    ray: Ray = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PLAN",
            help="File for the plan; DIR/plan.json by default.",
            rich_help_panel=FILES,
        ),
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option(
            "--pareto",
            help="Print the best loss at every size; no budget is needed then.",
            rich_help_panel=OTHER,
        ),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the best scheme for every weight within a budget, from what was measured.

    Needs no weights and takes seconds; a first latency on a machine is timed, for up to a minute.
    The plan is a JSON file with one line per weight: read it, compare it, edit it, and apply it.

    Examples:
        quantlib search --work WORK --bits 4.25
        quantlib search --work WORK --size 1.2GB --floor embeddings=4 -o plan.json
        quantlib search --work WORK --latency 12ms --size 90MB
        quantlib search --work WORK --size 9MB --component-size vision_tower=2MB --balance minmax
        quantlib search --work WORK --bits 4.5 --task-weights text=1,image=2
        quantlib search --work WORK --bits 4.25 --score evolved:proxy.json
        quantlib search --work WORK --bits 4.25 --validate 40 --workers 4
        quantlib search --work WORK --pareto
    """
    asked = latency_of(latency, threads, mode)
    budget = budget_of(
        size,
        bits,
        engine,
        floor,
        ceiling,
        pin,
        asked,
        activations,
        component_size,
        task_weights,
        balance,
    )
    if pareto and not budget.given and output is not None:
        raise UsageError("a plan needs a budget: add --size or --bits, or leave out --output")
    if (ray is not None or workers > 1) and not validate:
        raise UsageError("--workers and --ray are for trials: add --validate N")
    if validate and pareto and not budget.given:
        raise UsageError("a plan is validated under a budget: add --size or --bits")
    judging = Judging(score, validate, workers, ray)
    _search(work, budget, judging, output, pareto, json)


@dataclass(frozen=True)
class Judging:
    """How plans are judged: by which score, and by how many trials on true KL, who measures."""

    score: str
    trials: int
    workers: int
    ray: str | None


def _search(
    work: Path,
    budget: Budget,
    judging: Judging,
    output: Path | None,
    pareto: bool,
    json: bool,
) -> None:
    """Find the plan, if there is a budget, and the front, if it is wanted; print them."""
    from quantlib.pipeline import workfiles
    from quantlib.pipeline.layers import scored_by
    from quantlib.pipeline.plan import allocation_problem
    from quantlib.pipeline.plan import search as solve
    from quantlib.search.pareto import pareto_front

    known = workfiles.load_model(work)
    sensitivity = workfiles.load_table(work, known.model_map)
    planned = budget.given or not pareto
    if planned:
        budget.in_bytes(known.model_map)  # before anything is timed
    sensitivity = scored_by(judging.score, work, sensitivity, Bars(notes()))
    costs = _costs(work, known, sensitivity, budget.latency)
    answer: dict[str, Any] = {}
    if planned:
        plan, problem, solution = solve(known.model_map, sensitivity, budget, costs)
        refined = None
        if judging.trials:
            refined = _validated(work, plan, problem, judging)
            plan = refined.plan
        file = output or work / workfiles.PLAN_FILE
        plan.save(file)
        if costs is not None:
            workfiles.save_costs(work, costs)
        answer = _described(plan, solution, known, file)
        answer |= {"validation": _trials_of(refined)} if refined is not None else {}
    else:
        problem = allocation_problem(known.model_map, sensitivity, budget)
    front: list[Point] = []
    if pareto:
        limits = budget.limits(known.model_map)
        front = pareto_front(problem, calibration=sensitivity.calibration, limits=limits)
        answer |= {"front": [_point(point, known) for point in front]} if json else {}
    if json:
        print_json(answer)
        return
    if planned:
        _print_plan(plan, solution, known, file, refined)
    if pareto:
        calibrated = front[0].kl is not None
        _print_front(front, known, loss_name(problem.task, budget.objective.balance, calibrated))
    if planned:
        where = "" if output is None else f" --work {shlex.quote(str(work))}"
        next_commands(f"quantlib apply {shlex.quote(str(file))} -o OUT{where}")


def apply(
    plan: Annotated[
        Path,
        typer.Argument(metavar="PLAN", help="Plan that quantlib search wrote.", show_default=False),
    ],
    output: Output,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Work directory with the layer bank; the plan's folder by default.",
            rich_help_panel=FILES,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Where the model lies now, if it has moved since it was measured.",
            rich_help_panel=FILES,
        ),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Round the plan again with quantized inputs, and ship the better of the two.",
            rich_help_panel=RECIPE,
        ),
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the packed checkpoint of a plan, assembled from what was measured.

    Nothing is rounded again unless --refine is given.

    Examples:
        quantlib apply WORK/plan.json -o OUT
        quantlib apply plan.json --work WORK -o OUT --refine
    """
    from quantlib.pipeline.compress import apply_plan

    quiet_transformers()
    result = apply_plan(
        plan,
        output,
        work if work is not None else plan.parent,
        model=model,
        refine=refine,
        overwrite=overwrite,
        progress=Bars(notes()),
    )
    if json:
        print_json(described(result))
    else:
        show(result, str(result.source))


def _validated(work: Path, plan: Plan, problem: Problem, judging: Judging) -> Refined:
    """Exchanges tried on true KL."""
    from quantlib.pipeline.validate import validate

    quiet_transformers()
    return validate(
        work,
        plan,
        problem,
        judging.trials,
        workers=judging.workers,
        ray=judging.ray,
        progress=Bars(notes()),
    )


def _trials_of(refined: Refined) -> dict[str, Any]:
    return {
        "kl_before": refined.kl_before,
        "kl_after": refined.kl_after,
        "trials": [trial.to_dict() for trial in refined.trials],
    }


def _costs(
    work: Path, known: KnownModel, sensitivity: Sensitivity, latency: LatencyBudget
) -> LatencyCosts | None:
    """What every candidate takes on this machine; None, and nothing is loaded, where no latency is
    limited."""
    if not latency:
        return None
    from quantlib.pipeline import workfiles
    from quantlib.pipeline.latency import costs_for

    schemes = {weight: list(row) for weight, row in sensitivity.rows.items()}
    recipe = workfiles.load_recipe(work)
    return costs_for(known.model_map, known.path, schemes, latency, Bars(notes()), recipe)


def _described(plan: Plan, solution: Solution, known: KnownModel, file: Path) -> dict[str, Any]:
    """The answer as JSON; the plan itself is in its file."""
    from quantlib.search.budget import true_bits
    from quantlib.search.tasks import increases

    return {
        "plan": file,
        "budget_bytes": plan.budget,
        "limits": dict(plan.limits),
        "objective": plan.objective.to_json(),
        "increases": increases(plan.predicted),
        "machine": plan.provenance.get("machine"),
        "bytes": plan.bytes,
        "bits": true_bits(plan.bytes, known.model_map.parameters),
        "loss": plan.loss,
        "predicted": dict(plan.predicted),
        "lp_gap": solution.gap,
        "optimal": solution.optimal,
        "seconds": solution.seconds,
        "schemes": plan.schemes,
    }


def _point(point: Point, known: KnownModel) -> dict[str, Any]:
    from quantlib.search.budget import true_bits

    values = {name: value for name, value in asdict(point).items() if name != "picks"}
    return {**values, "bits": true_bits(point.bytes, known.model_map.parameters)}


def _print_plan(
    plan: Plan, solution: Solution, known: KnownModel, file: Path, refined: Refined | None
) -> None:
    from quantlib.search.budget import format_size, true_bits

    model_map = known.model_map
    allowed = f"{plan.budget:,} allowed" if plan.budget else "no limit"
    sized = f"{plan.bytes:,} bytes ({format_size(plan.bytes)}), {allowed}"
    ended = "" if solution.optimal else ", best found before time ran out"
    rows = [
        ("plan", str(file)),
        ("checkpoint", f"{sized}; {true_bits(plan.bytes, model_map.parameters):.3f} bits"),
        *predicted_rows(plan),
        *limit_rows(plan),
        ("gap to LP bound", f"{solution.gap:.3%} of the loss{ended}"),
        ("solved in", f"{solution.seconds:.2f} s"),
    ]
    if refined is not None:
        kept = sum(trial.accepted for trial in refined.trials)
        exchanges = f"{kept} of {len(refined.trials)} exchanges kept"
        change = f"{refined.kl_before:.4f} before, {refined.kl_after:.4f} after"
        rows.append(("KL on held-back text", f"{change}; {exchanges}"))
    console = answers()
    console.print(facts(rows))
    console.print()
    weights, parameters = Counter[str](), Counter[str]()
    for weight in model_map.weights:
        scheme = plan.weights[weight.name].scheme
        weights[scheme] += 1
        parameters[scheme] += weight.parameters
    total = parameters.total()
    used = [(s, f"{weights[s]}", f"{n / total:.1%}") for s, n in parameters.most_common()]
    console.print(table("scheme", "weights", "of the parameters", rows=used))


def _print_front(front: list[Point], known: KnownModel, loss: str) -> None:
    """loss: the name of what the points lose."""
    from quantlib.search.budget import format_size, true_bits
    from quantlib.search.infeasible import amount_text

    rows = []
    for point in front:
        kl = f"{point.loss:.3g}" if point.kl is None else f"{point.kl:.3g}"
        interval = "" if point.kl_low is None else f"{point.kl_low:.3g} .. {point.kl_high:.3g}"
        bits = true_bits(point.bytes, known.model_map.parameters)
        times = [amount_text(cost, amount) for cost, amount in point.costs.items()]
        sizes = format_size(point.bytes), f"{bits:.2f}"
        rows.append((*sizes, kl, interval, *times, f"{point.gap:.2%}"))
    columns = ["size", "bits", loss, "95 % interval", *map(_cost_name, front[0].costs), "gap"]
    console = answers()
    console.print()
    console.print(table(*columns, rows=rows, numbers_from=0))


def _cost_name(cost: str) -> str:
    """A further cost of a front as the head of a column."""
    from quantlib.search.components import is_component, pattern_of
    from quantlib.search.latency import is_latency, phase_text

    if is_latency(cost):
        return phase_text(cost)
    return f"bytes of {pattern_of(cost)}" if is_component(cost) else cost.replace("_", " ")
