"""The report of a work directory: its files, put into `report.ReportData`.

Only files are read, so the report of a finished run can be drawn again without the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantlib.checkpoint.disk import read_json
from quantlib.checkpoint.provenance import versions
from quantlib.errors import DataError, UsageError
from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.language import LanguageResult
from quantlib.pipeline import workfiles
from quantlib.pipeline.plan import TASK, Budget, allocation_problem
from quantlib.pipeline.shares import Shares, load_shares
from quantlib.pipeline.workfiles import KnownModel, Outcome
from quantlib.recipe import Recipe
from quantlib.report.collect import LatencyParts, collect
from quantlib.report.data import MeasuredPoint, ReportData, ShareRow
from quantlib.report.render import write_report
from quantlib.search.activations import activation_costs, rounds_inputs
from quantlib.search.latency import LatencyCosts
from quantlib.search.pareto import pareto_front
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Sensitivity

REPORT_FILE = "report.html"


def write_run_report(
    path: Path,
    model: KnownModel,
    recipe: Recipe,
    table: Sensitivity,
    problem: Problem,
    plan: Plan,
    outcome: Outcome | None,
    costs: LatencyCosts | None = None,
    suite: Mapping[str, Any] | None = None,
    shares: Mapping[str, Shares] | None = None,
) -> Path:
    """Write the report of a plan; returns its path.

    problem: what the plan was chosen from. outcome: the checkpoint made from it, None if there is
    none yet. costs: what everything costs in time, if that is known. suite: the JSON of an
    evaluation in both directions. shares: component -> whose data decides how it is rounded.
    """
    data = report_data(model, recipe, table, problem, plan, outcome, costs, suite)
    data = replace(data, shares=share_rows(shares or {}))
    return write_report(data, path)


def report_of(
    work: Path,
    plan: Path | None = None,
    path: Path | None = None,
    evaluation: Path | None = None,
) -> Path:
    """Draw the report of a work directory, of its own plan unless another is given.

    evaluation: what `quantlib eval --json` printed of the checkpoint made from that plan.
    Raises SearchError for a plan of another model, and a QuantlibError for missing or damaged
    files, and for an evaluation of something else.
    """
    model = workfiles.load_model(work)
    table = workfiles.load_table(work, model.model_map)
    chosen = workfiles.load_plan(plan or work / workfiles.PLAN_FILE, model.model_map, table)
    # The problem the plan was an answer to: rules shrink the front, so they belong in the picture.
    costs = workfiles.load_costs(work, chosen)
    problem = allocation_problem(model.model_map, table, Budget.rules_of(chosen), costs)
    outcome, suite = workfiles.load_outcome(work, chosen), None
    if evaluation is not None:
        outcome, suite = _evaluated(outcome, evaluation)
    place = path or work / REPORT_FILE
    recipe, shares = workfiles.load_recipe(work), load_shares(work)
    return write_run_report(
        place, model, recipe, table, problem, chosen, outcome, costs, suite, shares
    )


def _evaluated(
    outcome: Outcome | None, file: Path
) -> tuple[Outcome | None, Mapping[str, Any] | None]:
    """(the outcome with what was measured of its text, what was measured in both directions).

    Raises DataError and UsageError.
    """
    found = read_json(file)
    known = isinstance(found, dict) and {"model", "model_bytes"} <= set(found)
    if not known or not {"result", "figures"} & set(found):
        raise DataError(f"{file} is not what quantlib eval --json prints: evaluate again")
    if outcome is None or outcome.file_bytes != found["model_bytes"]:
        raise UsageError(
            f"{file} is an evaluation of {found['model']}, which is not the checkpoint that was "
            "last made from this plan: evaluate that one"
        )
    if "figures" in found:
        return outcome, found
    return replace(outcome, evaluation=LanguageResult.from_json(found["result"])), None


def report_data(
    model: KnownModel,
    recipe: Recipe,
    table: Sensitivity,
    problem: Problem,
    plan: Plan,
    outcome: Outcome | None,
    costs: LatencyCosts | None = None,
    suite: Mapping[str, Any] | None = None,
) -> ReportData:
    """Everything the report shows."""
    taken = outcome.latency if outcome else {}
    data = collect(
        model.model_map,
        plan,
        title=model.path.name,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sensitivity=table,
        front=pareto_front(problem, calibration=table.calibration),
        evaluation=outcome.evaluation if outcome else None,
        suite=suite,
        measured=_before_rerounding(plan, outcome),
        latency=LatencyParts.of(plan, problem, costs, taken, table.calibration),
        timings=outcome.seconds if outcome else {},
        bytes_before=model.file_bytes,
        bytes_after=outcome.file_bytes if outcome else None,
    )
    inputs, tasks = _input_facts(model, table, plan), _task_facts(outcome)
    return replace(data, facts=(*data.facts, *tasks, *inputs, *_recipe_facts(recipe, table.tasks)))


def share_rows(shares: Mapping[str, Shares]) -> tuple[ShareRow, ...]:
    """Shares as rows of the report."""
    return tuple(
        ShareRow(component, by, name, share.tokens, share.weight)
        for component, found in shares.items()
        for by, given in (("stream", found.streams), ("modality", found.modalities))
        for name, share in given.items()
    )


def _before_rerounding(plan: Plan, outcome: Outcome | None) -> list[MeasuredPoint]:
    if outcome is None or outcome.bank is None or outcome.bank.kl is None:
        return []
    kl = outcome.bank.kl
    return [MeasuredPoint("before re-rounding", plan.bytes, kl.value, kl.standard_error)]


def _input_facts(model: KnownModel, table: Sensitivity, plan: Plan) -> list[tuple[str, str]]:
    """Mean bits of the inputs of linears, where some candidate rounds them."""
    if not any(map(rounds_inputs, table.rows.values())):
        return []
    costs = activation_costs(model.model_map.weights, table.rows)
    bits = sum(costs[name, scheme] for name, scheme in plan.schemes.items())
    return [("bits of inputs", f"{bits:.3f} in the mean, scales and zero points counted")]


def _task_facts(outcome: Outcome | None) -> list[tuple[str, str]]:
    """What the checkpoint of a model that is run as a whole was measured to lose while it was
    re-rounded."""
    known = outcome.tasks if outcome else {}
    facts = []
    for task, found in known.get("tasks", {}).items():
        text = f"{Estimate(**found)}, measured on held-back records"
        if "before" in known:
            text += f"; {Estimate(**known['before'][task])} before re-rounding"
        facts.append((f"loss of {task}", text))
    return facts


def _recipe_facts(recipe: Recipe, tasks: Sequence[str]) -> list[tuple[str, str]]:
    seen = f"{recipe.windows} windows of {recipe.seqlen} tokens, seed {recipe.seed}"
    if tuple(tasks) != (TASK,):
        streams = ", ".join(tasks)
        seen = f"at most {recipe.windows} records of each stream ({streams}), seed {recipe.seed}"
    facts = [
        ("preset", recipe.preset),
        ("calibration", seen),
        ("scores", "Fisher-weighted" if recipe.gradients else "block-local (no gradients)"),
        ("candidates", ", ".join(recipe.schemes)),
    ]
    if tuple(tasks) != (TASK,):
        facts.append(("tokens weighted", _WEIGHTINGS[recipe.stream_weighting]))
    facts += _beside_weights(recipe)
    return facts + [(f"{name} version", value) for name, value in versions().items()]


_WEIGHTINGS = {
    "token": "each by its own gradient energy",
    "root": "each by the root of its gradient energy",
    "modality": "by the mean gradient energy of their modality",
    "none": "all alike",
}
"""`Recipe.weighting` in words."""


_BASES = {
    "pca": "principal components of activations (ResQ)",
    "weights": "directions by what their rounding costs, priced by the energy of weights",
    "gradients": "directions by what their rounding costs, priced by gradients",
}
"""`Recipe.rotation` in words."""


def _beside_weights(recipe: Recipe) -> list[tuple[str, str]]:
    """What a recipe asks of a model beside its weights: its basis, its cache, its operators."""
    facts = []
    if recipe.rotation != "none":
        facts.append(("basis", _BASES[recipe.rotation]))
    static = set(recipe.kv_static)
    formats = [
        f"{kind} {form}{' with static scales' if kind in static else ''}"
        for kind, form in recipe.kv_modalities.items()
    ]
    if formats or recipe.kv != "f32":
        one = recipe.kv if recipe.kv_bits is None else f"at most {recipe.kv} bits in the mean"
        facts.append(("KV cache", ", ".join(formats) or one))
    if recipe.nonlinear is not None:
        facts.append(
            ("in integers", f"softmax, GELU and LayerNorm where {recipe.nonlinear} allows")
        )
    return facts
