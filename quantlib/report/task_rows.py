"""What a report says of components and of tasks: part of `collect.py`, which knows other stages.

Where a table has several tasks, every loss is shown relative to the full-precision model's: as the
search weighed it. Where it has one, in that task's own unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quantlib.calibration.paths.route import ANSWER, HEARING
from quantlib.models.components import component_table
from quantlib.models.modelmap import ModelMap
from quantlib.report.data import ComponentRow, KeptRow, TaskRow
from quantlib.search.plan import Plan
from quantlib.search.sensitivity import Entry, Sensitivity, unit_of
from quantlib.search.tasks import COMBINED

DIVERGENCES = ("KL per ", "relative error to the reference")
"""What the names of an evaluation's figures begin with that measure what a task's loss predicts."""


def component_rows(
    modelmap: ModelMap, plan: Plan, sensitivity: Sensitivity | None
) -> tuple[ComponentRow, ...]:
    """Quantized weights at the plan's bytes, kept tensors at the source's."""
    sizes = {name: row.bytes for name, row in plan.weights.items()}
    owner = {weight.name: weight.component for weight in modelmap.weights}
    losses: dict[str, dict[str, float]] = {}
    for weight, entry in _chosen(plan, sensitivity).items():
        found = losses.setdefault(owner[weight], dict.fromkeys(entry.loss, 0.0))
        for task, loss in entry.loss.items():
            found[task] += loss / _unit_loss(sensitivity, task)
    return tuple(
        ComponentRow(
            row.name,
            row.before,
            row.bytes,
            row.parameters,
            dict(row.schemes),
            losses.get(row.name, {}),
        )
        for row in component_table(modelmap, sizes, plan.schemes)
    )


def kept_rows(modelmap: ModelMap) -> tuple[KeptRow, ...]:
    """Every tensor that is left as it is, with its reason, part by part."""
    return tuple(
        KeptRow(part.name, row.name, row.count, row.bytes, row.dtype, row.reason)
        for part in component_table(modelmap)
        for row in part.kept
    )


def scales_of(plan: Plan, sensitivity: Sensitivity | None) -> dict[str, float]:
    """Factors on the losses of several tasks; none where the plan is about one."""
    if sensitivity is None or plan.task != COMBINED:
        return {}
    return plan.objective.scales(sensitivity.tasks, sensitivity.baseline)


def _unit_loss(sensitivity: Sensitivity | None, task: str) -> float:
    """What losses are shown relative to: the full-precision loss where there are several tasks."""
    several = sensitivity is not None and len(sensitivity.tasks) > 1
    return (sensitivity.baseline.get(task) or 1.0) if sensitivity and several else 1.0


def _chosen(plan: Plan, sensitivity: Sensitivity | None) -> dict[str, Entry]:
    """weight -> its entry in the scheme that the plan gives it, where it was measured."""
    rows = {} if sensitivity is None else sensitivity.rows
    return {
        weight: rows[weight][row.scheme]
        for weight, row in plan.weights.items()
        if row.scheme in rows.get(weight, {})
    }


def _losses(plan: Plan, sensitivity: Sensitivity) -> dict[str, float]:
    """task -> sum of predicted losses of the plan."""
    entries = _chosen(plan, sensitivity).values()
    return {task: math.fsum(e.loss[task] for e in entries) for task in sensitivity.tasks}


def minimised(plan: Plan, sensitivity: Sensitivity | None) -> float:
    """What the search minimised: the sum, or the largest of several tasks' increases."""
    scales = scales_of(plan, sensitivity)
    if sensitivity is None or not scales or plan.objective.balance != "minmax":
        return plan.loss
    losses = _losses(plan, sensitivity)
    return max(scale * losses[task] for task, scale in scales.items())


def task_rows(
    plan: Plan, sensitivity: Sensitivity | None, suite: Mapping[str, Any]
) -> tuple[TaskRow, ...]:
    """Each of several tasks; of one there is nothing to say that the rest of the page does not."""
    if sensitivity is None or len(sensitivity.tasks) < 2:
        return ()
    rows = []
    for task, loss in _losses(plan, sensitivity).items():
        ends: tuple[float | None, float | None] = None, None
        if task in sensitivity.calibrations:
            loss, *found = sensitivity.calibrations[task].predict(max(0.0, loss))
            ends = found[0], found[1]
        measured, error = _measured(suite, task)
        rows.append(
            TaskRow(
                task,
                unit_of(task),
                plan.objective.weights.get(task, 1.0),
                sensitivity.baseline.get(task),
                loss,
                *ends,
                measured,
                error,
            )
        )
    return tuple(rows)


def _measured(suite: Mapping[str, Any], task: str) -> tuple[float | None, float | None]:
    """What an evaluation found of what is predicted of a task: its divergence from the original.

    Answers that are speech are evaluated as "speech"."""
    names = (task, "speech") if task in (ANSWER, HEARING) else (task,)
    for figure in suite.get("figures", ()):
        if figure["task"] in names and figure["name"].startswith(DIVERGENCES):
            return figure["model"]["value"], figure["model"]["standard_error"]
    return None, None
