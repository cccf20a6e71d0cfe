"""Several tasks, one objective: how losses of text, answers and images become what is minimised.

A loss of text is in nats per token, one of an image decoder in squared pixels; they cannot be
added. What can be compared is the relative increase of each: what a plan is predicted to add to a
task's loss, over the loss that the full-precision model has on held-back samples
(`Sensitivity.baseline`). The search minimises the weighted sum of these, which is additive as it
is, or the largest of them, weights counted (`minimax.py`). A table with one task needs none of
this: its loss stays in its own unit.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantlib.errors import SearchError, UsageError
from quantlib.search import jsonfile

BALANCES = ("sum", "minmax")
COMBINED = "tasks"
"""What stands in the place of a task's name where several are minimised together."""
COMBINED_UNIT = "relative increase"
_COST = "loss:"
_INCREASE = "increase:"


def task_cost(task: str) -> str:
    """Name of the cost of an allocation problem that is the predicted loss of `task`, in its unit
    (`problem.Choice.costs`)."""
    return _COST + task


def increase_name(task: str) -> str:
    """Name under which a plan keeps what it is predicted to add to a task's loss, as a fraction of
    the full-precision model's (`plan.Plan.predicted`)."""
    return _INCREASE + task


def increases(predicted: Mapping[str, float]) -> dict[str, float]:
    """task -> predicted relative increase, of those that a plan's predictions hold."""
    return {
        name.removeprefix(_INCREASE): value
        for name, value in predicted.items()
        if name.startswith(_INCREASE)
    }


@dataclass(frozen=True)
class Objective:
    """What to minimise over the tasks of a table.

    weights: task -> how much its relative increase counts, 0 to leave it out; the others count 1.
    balance: "sum" minimises the weighted sum, "minmax" the largest weighted one.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    balance: str = "sum"

    def __post_init__(self) -> None:
        if self.balance not in BALANCES:
            raise UsageError(
                f"{self.balance!r} is not a way to balance tasks: use sum (the sum of their "
                "relative increases) or minmax (the largest of them)"
            )
        for task, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UsageError(f"the weight of task {task} is {weight}: give 0 or more")

    @staticmethod
    def parse(texts: Iterable[str] = (), balance: str | None = None) -> Objective:
        """Read what follows --task-weights (`text=1,image=2`) and --balance. Raises UsageError."""
        weights: dict[str, float] = {}
        for part in (part.strip() for text in texts for part in text.split(",")):
            task, separator, value = (piece.strip() for piece in part.partition("="))
            try:
                weight = float(value)
            except ValueError:
                weight = math.nan
            if not separator or not task or math.isnan(weight):
                raise UsageError(
                    f"--task-weights {part}: write TASK=NUMBER, several of them with commas, for "
                    "example --task-weights text=1,image=2"
                )
            if task in weights:
                raise UsageError(f"--task-weights gives task {task} two weights: keep one")
            weights[task] = weight
        return Objective(weights, balance or "sum")

    def check(self, tasks: Sequence[str]) -> None:
        """Raise UsageError for a weight of no task of these, and for weights that leave nothing."""
        for task in self.weights:
            if task not in tasks:
                near = difflib.get_close_matches(task, tasks, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UsageError(
                    f"--task-weights names {task!r}, and what is measured are the losses of "
                    f"{', '.join(tasks)}{hint}"
                )
        if not any(self.weights.get(task, 1.0) for task in tasks):
            raise UsageError(
                f"all of {', '.join(tasks)} have weight 0: there is nothing left to minimise"
            )

    def scales(self, tasks: Sequence[str], baseline: Mapping[str, float]) -> dict[str, float]:
        """task -> the factor on its losses: weight over full-precision loss; empty for one task.

        Raises UsageError as `check` does, and SearchError where several tasks are to be compared
        and one has no full-precision loss.
        """
        self.check(tasks)
        weights = {task: self.weights.get(task, 1.0) for task in tasks}
        if len(tasks) == 1:
            return {}
        for task, weight in weights.items():
            if weight and not baseline.get(task):
                known = (
                    f"the full-precision model loses nothing in task {task}"
                    if task in baseline
                    else f"the sensitivity table does not say what {task} loses in full precision"
                )
                raise SearchError(
                    f"{known}, so it cannot be compared with other tasks: measure again, or leave "
                    f"it out with --task-weights {task}=0"
                )
        return {
            task: weight / baseline[task] if weight else 0.0 for task, weight in weights.items()
        }

    def value(self, losses: Mapping[str, float], baseline: Mapping[str, float]) -> float:
        """What these losses of all tasks are together: of one task its own loss, of several their
        weighted relative increases, summed, or the largest of them. Raises as `scales`."""
        scales = self.scales(list(losses), baseline)
        scaled = [loss * scales.get(task, 1.0) for task, loss in losses.items()]
        return max(scaled) if self.balance == "minmax" else math.fsum(scaled)

    def to_json(self) -> dict[str, Any]:
        return {"weights": dict(self.weights), "balance": self.balance}

    @staticmethod
    def from_json(data: Mapping[str, Any], source: str) -> Objective:
        """Raises SearchError when `data` is not what `to_json` gives."""
        jsonfile.check_keys(data, {"weights", "balance"}, set(), source)
        weights = jsonfile.numbers(data, "weights", source)
        try:
            return Objective(weights, jsonfile.field(data, "balance", str, source))
        except UsageError as error:
            raise SearchError(f"{source}: {error}") from error
