"""The files of a work directory that people and later commands read, beside its journalled units.

    model.json         which model was measured: its map, where it lies, its size
    recipe.yaml        the recipe that sensitivity.json was measured with
    sensitivity.json   what every weight loses in every candidate scheme
    weighting.json     whose data decides how each component is rounded (`shares`)
    plan.json          the latest plan
    latency.json       what everything would cost in time on this machine, if a plan limited that
    result.json        the latest checkpoint: where it is, and its loss on held-back windows
    report.html

They are enough to search for another budget, and to draw the report, without opening the model.
Each is written whole or not at all, so reading them needs no lock.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlib.calibration.data import HUB
from quantlib.checkpoint.disk import atomic_write_json, atomic_write_text, read_json
from quantlib.errors import CheckpointError, QuantlibError, SearchError
from quantlib.evaluation.language import LanguageResult
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.recipe import Recipe
from quantlib.search.latency import LatencyCosts, is_latency
from quantlib.search.plan import Plan
from quantlib.search.sensitivity import Sensitivity

MODEL_FILE = "model.json"
RECIPE_FILE = "recipe.yaml"
SENSITIVITY_FILE = "sensitivity.json"
PLAN_FILE = "plan.json"
LATENCY_FILE = "latency.json"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class KnownModel:
    """The model of a work directory: where it lies, the bytes of its weight files, and its map."""

    path: Path
    file_bytes: int
    model_map: ModelMap


@dataclass(frozen=True)
class Outcome:
    """A finished checkpoint.

    schemes:    weight -> scheme, what it was assembled from; `path` and `file_bytes` are its own.
    evaluation: on held-back windows, None when it was not measured.
    bank:       the same windows before re-rounding, None unless re-rounding was kept.
    seconds:    time by stage, of the process that finished it.
    latency:    cost -> milliseconds it was measured to take, for the latencies its plan limits.
    tasks:      of a model that is run as a whole and was re-rounded: "tasks" and, if that was kept,
                "before" -> task -> estimate of its loss on held-back records, as JSON
                (`apply.TaskRefinement.to_json`).
    """

    path: Path
    file_bytes: int
    schemes: Mapping[str, str]
    evaluation: LanguageResult | None = None
    bank: LanguageResult | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    latency: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def claim_folder(work: Path, source: Source, model_map: ModelMap) -> None:
    """Write `model.json`, or check that the work directory belongs to this model.

    Raises CheckpointError when it belongs to another one: its files would be overwritten.
    """
    if (work / MODEL_FILE).exists():
        known = load_model(work)
        if known.model_map.fingerprint != source.fingerprint:
            raise CheckpointError(
                f"{work} is the work directory of another model ({known.path}): choose another "
                "one, or delete it to start again"
            )
        if known == KnownModel(_absolute(source.path), source.file_bytes, model_map):
            return
    described = {
        "path": str(_absolute(source.path)),
        "file_bytes": source.file_bytes,
        "map": model_map.to_json(),
    }
    atomic_write_json(work / MODEL_FILE, described)


def load_model(work: str | Path) -> KnownModel:
    """The model of a work directory. Raises CheckpointError when it is missing or damaged."""
    file = _measured_file(work, MODEL_FILE)
    data = read_json(file)
    try:
        path, size, described = Path(data["path"]), int(data["file_bytes"]), data["map"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, error) from error
    try:
        return KnownModel(path, size, ModelMap.from_json(described))
    except QuantlibError as error:
        raise _damaged(file, error) from error


def save_table(work: Path, table: Sensitivity, recipe: Recipe) -> None:
    """Write the sensitivity table and the recipe it was measured with."""
    atomic_write_text(work / RECIPE_FILE, _with_absolute_data(recipe).to_yaml())
    atomic_write_text(work / SENSITIVITY_FILE, table.to_json())


def load_table(work: str | Path, model: ModelMap) -> Sensitivity:
    """The sensitivity table. Raises SearchError or CheckpointError when it cannot be used."""
    return Sensitivity.load(_measured_file(work, SENSITIVITY_FILE), model.fingerprint)


def load_recipe(work: str | Path) -> Recipe:
    """The recipe of the sensitivity table."""
    return Recipe.load(_measured_file(work, RECIPE_FILE))


def save_plan(work: Path, plan: Plan) -> None:
    """Write the plan where people and `quantlib apply` find it."""
    atomic_write_text(work / PLAN_FILE, plan.to_json())


def load_plan(path: Path, model_map: ModelMap, table: Sensitivity) -> Plan:
    """A plan for this model, its bytes and losses as the table has them (somebody may have edited
    its schemes). Raises SearchError when it is for another model or cannot be used."""
    if not path.is_file():
        raise SearchError(
            f"there is no plan {path}: make one with quantlib search --work DIR --bits 4.25"
        )
    plan = Plan.load(path, model_map.fingerprint, model_map.weights, model_map.groups)
    try:
        return plan.priced(table)
    except SearchError as error:
        raise SearchError(f"{path}: {error}") from error


def save_costs(work: Path, costs: LatencyCosts) -> None:
    """Remember what everything costs in time; costs of the same machine that are there stay."""
    with contextlib.suppress(QuantlibError):
        costs = costs.merged(LatencyCosts.from_json(read_json(work / LATENCY_FILE)))
    atomic_write_json(work / LATENCY_FILE, costs.to_json())


def load_costs(work: str | Path, plan: Plan) -> LatencyCosts | None:
    """What everything cost in time when `plan` was made; None when it limits no latency, or
    another machine was timed since. Raises CheckpointError for a damaged file."""
    file = Path(work) / LATENCY_FILE
    limited = [cost for cost in plan.limits if is_latency(cost)]
    if not limited or not file.exists():
        return None
    try:
        costs = LatencyCosts.from_json(read_json(file))
    except SearchError as error:
        raise CheckpointError(
            f"{file} is damaged: delete it, and run quantlib search again with --latency"
        ) from error
    same = costs.fingerprint == plan.provenance.get("timings", costs.fingerprint)
    return costs if same and all(cost in costs.fixed for cost in limited) else None


def save_outcome(work: Path, outcome: Outcome) -> None:
    """Remember the checkpoint that was made last."""
    data = {
        "path": str(_absolute(outcome.path)),
        "file_bytes": outcome.file_bytes,
        "schemes": dict(outcome.schemes),
        "evaluation": outcome.evaluation.to_json() if outcome.evaluation else None,
        "bank": outcome.bank.to_json() if outcome.bank else None,
        "seconds": dict(outcome.seconds),
        "latency": dict(outcome.latency),
        "tasks": dict(outcome.tasks),
    }
    atomic_write_json(work / RESULT_FILE, data)


def load_outcome(work: str | Path, plan: Plan) -> Outcome | None:
    """The checkpoint made last, if it was made from `plan`. Raises CheckpointError for a damaged
    file."""
    file = Path(work) / RESULT_FILE
    if not file.exists():
        return None
    data = read_json(file)
    try:
        outcome = Outcome(
            Path(data["path"]),
            int(data["file_bytes"]),
            dict(data["schemes"]),
            _language(data["evaluation"]),
            _language(data["bank"]),
            {str(stage): float(seconds) for stage, seconds in data["seconds"].items()},
            {str(cost): float(ms) for cost, ms in data.get("latency", {}).items()},
            {str(when): dict(found) for when, found in data.get("tasks", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(file, error) from error
    return outcome if outcome.schemes == plan.schemes else None


def _language(data: Any) -> LanguageResult | None:
    return None if data is None else LanguageResult.from_json(data)


def _measured_file(work: str | Path, name: str) -> Path:
    """A file that `measure` leaves. Raises CheckpointError when it is not there."""
    work = Path(work)
    if not work.is_dir():
        raise CheckpointError(
            f"there is no work directory {work}: make one with quantlib measure MODEL --data "
            f"TEXT --work {work}"
        )
    if not (work / name).is_file():
        raise CheckpointError(
            f"{work} has no {name}: nothing was measured there yet (or it was interrupted); run "
            f"quantlib measure MODEL --data TEXT --work {work}"
        )
    return work / name


def _damaged(file: Path, why: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file} is damaged ({why}): delete it and run quantlib measure again, which keeps what "
        "was measured"
    )


def _with_absolute_data(recipe: Recipe) -> Recipe:
    """The recipe with a path to its data that holds in any working directory."""
    if recipe.data.startswith(HUB):
        return recipe
    return recipe.model_copy(update={"data": str(_absolute(Path(recipe.data).expanduser()))})


def _absolute(path: Path) -> Path:
    """Not resolved: a link may be what stays when its target moves."""
    return Path(os.path.abspath(path))
