"""The sensitivity table: what each weight loses in each scheme, how surely, and for how many bytes.

This file is the only thing the solver needs to know about a model, and its JSON is meant for other
tools too: one line per (weight, scheme), units written down, nothing encoded. A loss is the
predicted increase of a task's loss when this weight alone is quantized; `kl` is the mean KL
divergence per token in nats. Losses of a plan are added: that is a second-order Taylor expansion
without cross terms, which `calibrate.Calibration` checks against measurements.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlib.errors import FormatError, SearchError
from quantlib.formats.scheme import Scheme
from quantlib.search import jsonfile
from quantlib.search.calibrate import Calibration
from quantlib.search.tasks import COMBINED, COMBINED_UNIT

FORMAT = "quantlib-sensitivity"
VERSIONS = (1, 2)
"""1: one task, one calibration. 2: full-precision losses, and calibrations by task. A table that
needs no more than the first is written as the first."""
UNITS = {
    **dict.fromkeys(("kl", "text", "answer", "hearing"), "nats per token"),
    "codec": "nats per code of speech",
}
"""Units of tasks whose loss is always the same; others are in the unit of their own loss."""


def unit_of(task: str) -> str:
    """Unit of a task's loss in words, of several together too."""
    return COMBINED_UNIT if task == COMBINED else UNITS.get(task, "loss of the task")


@dataclass(frozen=True)
class Entry:
    """One weight in one scheme.

    bytes: what it adds to the checkpoint file.
    loss:  task -> predicted increase of the task's loss.
    error: task -> standard error of that prediction (bootstrap over calibration windows).
    """

    bytes: int
    loss: Mapping[str, float]
    error: Mapping[str, float]

    def priced(self, task: str, scales: Mapping[str, float]) -> tuple[float, float]:
        """(loss, standard error) of one task, or of several by their `scales`
        (`tasks.Objective.scales`; none: of `task`).

        Errors of tasks add: the same rounding causes them.
        """
        if not scales:
            return self.loss[task], self.error[task]
        loss = math.fsum(scale * self.loss[name] for name, scale in scales.items())
        return loss, math.fsum(scale * self.error[name] for name, scale in scales.items())


@dataclass(frozen=True)
class Sensitivity:
    """Predicted losses of every weight in every candidate scheme.

    model:        fingerprint of the source model (`Source.fingerprint`).
    tasks:        names of the loss columns, such as ("kl",) or ("text", "answer", "image").
    rows:         weight -> scheme -> Entry, weights in model order, schemes in candidate order.
    provenance:   what this was computed from: name -> hash (calibration data, bank, ...).
    calibrations: task -> predicted sums against measured losses, where probes were measured.
    extra_bytes:  of a checkpoint, for what these losses need beside the weights (a rotation's).
    baseline:     task -> loss of the full-precision model on held-back samples, in the task's unit;
                  1 for a loss that is relative by itself. Several tasks are compared by it.
    """

    model: str
    tasks: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Entry]]
    provenance: Mapping[str, str] = field(default_factory=dict)
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    extra_bytes: int = 0
    baseline: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def calibration(self) -> Calibration | None:
        """Of the only task; None where there are several, or no probes."""
        return self.calibrations.get(self.tasks[0]) if len(self.tasks) == 1 else None

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(self.rows)

    def entry(self, weight: str, scheme: str) -> Entry:
        """Raises SearchError when the table has no such weight, or the weight no such candidate."""
        if weight not in self.rows:
            raise SearchError(
                f"the sensitivity table has no weight {weight!r}: it was measured for other weights"
            )
        if scheme not in self.rows[weight]:
            known = ", ".join(self.rows[weight])
            raise SearchError(f"{weight} was not measured in {scheme}; it was in {known}")
        return self.rows[weight][scheme]

    def with_calibrations(self, calibrations: Mapping[str, Calibration]) -> Sensitivity:
        """This table with these calibrations and no others."""
        return replace(self, calibrations=dict(calibrations))

    def with_calibration(self, calibration: Calibration | None) -> Sensitivity:
        """This table with the calibration of its first task, and no others."""
        return self.with_calibrations({self.tasks[0]: calibration} if calibration else {})

    def corrected(self, factor: Callable[[str, str, str], float]) -> Sensitivity:
        """This table with losses and their errors multiplied by `factor(weight, scheme, task)`.
        Calibrations are dropped: they were of other sums."""
        rows: dict[str, dict[str, Entry]] = {}
        for weight, row in self.rows.items():
            rows[weight] = {}
            for scheme, entry in row.items():
                factors = {task: factor(weight, scheme, task) for task in self.tasks}
                rows[weight][scheme] = _multiplied(entry, factors)
        return replace(self, rows=rows, calibrations={})

    def digest(self) -> str:
        """SHA-256 of everything but calibrations: new probes do not make an old plan stale."""
        return hashlib.sha256(self.with_calibrations({}).to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """JSON with one line per (weight, scheme), so that people can read it and diff it."""
        head = {
            "format": FORMAT,
            "version": VERSIONS[0],
            "model": self.model,
            "tasks": list(self.tasks),
            "units": {task: unit_of(task) for task in self.tasks},
            "provenance": dict(self.provenance),
        }
        if self.extra_bytes:
            head["extra_bytes"] = self.extra_bytes
        if self.baseline or self.calibrations.keys() - {self.tasks[0]}:
            head |= {"version": VERSIONS[1], "baseline": dict(self.baseline)}
            found = {task: value.to_dict() for task, value in self.calibrations.items()}
            head |= {"calibrations": found} if found else {}
        elif self.calibrations:
            head["calibration"] = self.calibrations[self.tasks[0]].to_dict()
        lines = [f"  {jsonfile.dump(key)}: {jsonfile.dump(value)}," for key, value in head.items()]
        weights = ",\n".join(
            _weight_lines(weight, row, self.tasks) for weight, row in self.rows.items()
        )
        return "{\n" + "\n".join(lines) + '\n  "weights": {\n' + weights + "\n  }\n}\n"

    @staticmethod
    def from_json(text: str, source: str = "the sensitivity table") -> Sensitivity:
        """Read what `to_json` wrote. Raises SearchError that names `source` and the place of the
        first mistake."""
        data = jsonfile.parse_object(text, source)
        jsonfile.check_header(data, FORMAT, VERSIONS, source)
        required = {"format", "version", "model", "tasks", "weights"}
        several = data["version"] == VERSIONS[1]
        optional = {"units", "provenance", "extra_bytes"}
        optional |= {"baseline", "calibrations"} if several else {"calibration"}
        jsonfile.check_keys(data, required, optional, source)
        tasks = jsonfile.field(data, "tasks", list, source)
        if not all(isinstance(task, str) for task in tasks):
            raise SearchError(f"{source}: 'tasks' must list the names of the loss columns")
        weights = jsonfile.field(data, "weights", dict, source)
        rows = {name: _read_row(weights, name, tuple(tasks), source) for name in weights}
        try:
            return Sensitivity(
                jsonfile.field(data, "model", str, source),
                tuple(tasks),
                rows,
                jsonfile.texts(data, "provenance", source),
                _read_calibrations(data, tasks, source),
                jsonfile.field(data, "extra_bytes", int, source) if "extra_bytes" in data else 0,
                jsonfile.numbers(data, "baseline", source),
            )
        except SearchError as error:
            raise SearchError(f"{source}: {error}") from error

    def save(self, path: str | Path) -> None:
        jsonfile.write_text(path, self.to_json())

    @staticmethod
    def load(path: str | Path, model: str | None = None) -> Sensitivity:
        """Read a table, and when `model` (a fingerprint) is given insist that it was measured on
        that model."""
        table = Sensitivity.from_json(jsonfile.read_text(path, "sensitivity table"), str(path))
        if model is not None and table.model != model:
            raise SearchError(
                f"{path} was measured on another model (fingerprint {table.model[:12]}, this one "
                f"has {model[:12]}): measure this model, or point to its own work directory"
            )
        return table


def _multiplied(entry: Entry, factors: Mapping[str, float]) -> Entry:
    """An entry with the losses of all tasks multiplied, and their errors."""
    loss = {task: value * factors[task] for task, value in entry.loss.items()}
    error = {task: value * factors[task] for task, value in entry.error.items()}
    return Entry(entry.bytes, loss, error)


def _weight_lines(weight: str, row: Mapping[str, Entry], tasks: tuple[str, ...]) -> str:
    cells = ",\n".join(
        f"      {jsonfile.dump(scheme)}: {jsonfile.dump(_cell(entry, tasks))}"
        for scheme, entry in row.items()
    )
    return f"    {jsonfile.dump(weight)}: {{\n{cells}\n    }}"


def _cell(entry: Entry, tasks: tuple[str, ...]) -> dict[str, float]:
    cell: dict[str, float] = {"bytes": entry.bytes}
    for task in tasks:
        cell[task] = entry.loss[task]
        cell[f"{task}_error"] = entry.error[task]
    return cell


def _read_calibrations(
    data: Mapping[str, Any], tasks: list[str], source: str
) -> dict[str, Calibration]:
    """By task; tables of one task have one, without its name."""
    if data.get("calibration") is not None and tasks:
        found = jsonfile.field(data, "calibration", dict, source)
        return {tasks[0]: Calibration.from_dict(found, source)}
    if data.get("calibrations") is None:
        return {}
    found = jsonfile.field(data, "calibrations", dict, source)
    where = f"{source}, calibrations"
    return {
        task: Calibration.from_dict(jsonfile.field(found, task, dict, where), f"{source}, {task}")
        for task in found
    }


def _read_row(
    weights: dict[str, Any], weight: str, tasks: tuple[str, ...], source: str
) -> dict[str, Entry]:
    row = jsonfile.field(weights, weight, dict, source)
    entries = {}
    for scheme in row:
        where = f"{source}, {weight} in {scheme}"
        cell = jsonfile.field(row, scheme, dict, where)
        jsonfile.check_keys(
            cell, {"bytes", *tasks, *(f"{task}_error" for task in tasks)}, set(), where
        )
        entries[scheme] = Entry(
            jsonfile.field(cell, "bytes", int, where),
            {task: jsonfile.field(cell, task, float, where) for task in tasks},
            {task: jsonfile.field(cell, f"{task}_error", float, where) for task in tasks},
        )
    return entries


def _check(table: Sensitivity) -> None:
    """Raise SearchError unless every weight has well-formed candidates with finite losses and
    positive bytes."""
    if not table.model:
        raise SearchError("the sensitivity table does not say which model it was measured on")
    for task in table.tasks:
        reserved = task in ("bytes", COMBINED) or task.endswith("_error")
        if reserved or not re.fullmatch(r"[A-Za-z]\w*", task):
            raise SearchError(f"{task!r} cannot name a loss column: use a word such as kl")
    if not table.tasks or len(set(table.tasks)) != len(table.tasks):
        raise SearchError(
            "the sensitivity table needs one or more loss columns with different names"
        )
    for what in ("baseline", "calibrations"):
        unknown = sorted(set(getattr(table, what)) - set(table.tasks))
        if unknown:
            raise SearchError(f"{what} of {unknown[0]!r}: the table has no such loss column")
    for task, loss in table.baseline.items():
        if not (math.isfinite(loss) and loss >= 0):
            raise SearchError(f"the full-precision loss of {task} is {loss}, not a number >= 0")
    if not table.rows:
        raise SearchError("the sensitivity table is empty: no weight was measured")
    for weight, row in table.rows.items():
        if not row:
            raise SearchError(f"{weight} has no candidate scheme in the sensitivity table")
        for scheme, entry in row.items():
            _check_entry(weight, scheme, entry, table.tasks)


def _check_entry(weight: str, scheme: str, entry: Entry, tasks: tuple[str, ...]) -> None:
    try:
        canonical = str(Scheme.parse(scheme))
    except FormatError as error:
        raise SearchError(f"{weight}: {error}") from error
    if canonical != scheme:
        raise SearchError(f"{weight}: scheme {scheme!r} must be written {canonical!r}")
    if isinstance(entry.bytes, bool) or not isinstance(entry.bytes, int) or entry.bytes <= 0:
        raise SearchError(
            f"{weight} in {scheme}: bytes must be a positive whole number, not {entry.bytes!r}"
        )
    for task in tasks:
        loss, spread = entry.loss.get(task, math.nan), entry.error.get(task, math.nan)
        if not math.isfinite(loss):
            raise SearchError(
                f"{weight} in {scheme}: the predicted {task} is {loss}, not a finite number"
            )
        if not (math.isfinite(spread) and spread >= 0):
            raise SearchError(
                f"{weight} in {scheme}: the standard error of {task} is {spread}, not a number >= 0"
            )
