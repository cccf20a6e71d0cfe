"""The plan: which scheme every weight gets, what that is predicted to cost, and where it comes
from.

`search` writes it, `apply` executes it, and people edit and compare it: one line per weight, in
model order, so that a diff of two plans reads as the list of changes. Someone who edits changes a
`scheme`; the numbers beside it are then stale, and `Plan.priced` computes them again from the
sensitivity table. What a plan was made for (model, table, engine) is written in it and checked when
it is used.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from quantlib.errors import FormatError, SearchError
from quantlib.formats.scheme import Scheme
from quantlib.search import jsonfile
from quantlib.search.calibrate import Calibration
from quantlib.search.problem import Picks, Problem
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.solve import Solution
from quantlib.search.tasks import COMBINED, Objective, increase_name
from quantlib.search.weights import ENGINES, GroupInfo, WeightInfo, units

FORMAT = "quantlib-plan"
VERSIONS = (1, 2)
"""1: one task. 2: several tasks and an objective; a plan that needs no more is written as the
first."""


class Assignment(NamedTuple):
    """What one weight gets: its scheme, and the bytes and predicted loss that go with it."""

    scheme: str
    bytes: int
    loss: float


@dataclass(frozen=True)
class Plan:
    """An allocation of schemes to the weights of one model.

    model:       fingerprint of the source model. engine: who will run the checkpoint
                 (`weights.ENGINES`).
    weights:     weight -> Assignment, in model order.
    fixed_bytes: bytes of the checkpoint that do not depend on the plan.
    budget:      bytes allowed, None for a plan written by hand. limits: further cost -> most
                 allowed.
    task:        the loss column that was minimised, `tasks.COMBINED` for several: losses are then
                 weighted sums of relative increases.
    rules:       the user's floors, ceilings and pins, as text.
    predicted:   what the search promised of the allocation it found: "kl", "kl_low", "kl_high" (95
                 % interval; of every task that has a calibration, by its name), of several tasks
                 their relative increases (`tasks.increases`), "lp_gap", "proven_gap", and every
                 limited cost by its name. Dropped when the plan is changed, because it no longer
                 holds.
    provenance:  name -> hash of what the plan was computed from ("sensitivity", ...).
    objective:   how several tasks were weighed.
    """

    model: str
    weights: Mapping[str, Assignment]
    engine: str = "quantlib"
    fixed_bytes: int = 0
    budget: int | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    task: str = "kl"
    rules: tuple[str, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    objective: Objective = field(default_factory=Objective)

    @staticmethod
    def of(
        problem: Problem,
        picks: Picks,
        *,
        budget: int | None = None,
        limits: Mapping[str, float] | None = None,
        predicted: Mapping[str, float] | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> Plan:
        """The plan that gives `problem`'s items their `picks`."""
        rows: dict[str, Assignment] = {}
        for item, choice in zip(problem.items, problem.chosen(picks), strict=True):
            for member, (size, loss) in zip(item.members, choice.shares(), strict=True):
                rows[member] = Assignment(choice.scheme, size, loss)
        source = {"sensitivity": problem.sensitivity} if problem.sensitivity else {}
        return Plan(
            problem.model,
            {weight: rows[weight] for weight in problem.weights},
            problem.engine,
            problem.fixed_bytes,
            budget,
            dict(limits or {}),
            problem.task,
            problem.rules,
            dict(predicted or {}),
            source | dict(provenance or {}),
            problem.objective,
        )

    @staticmethod
    def from_solution(
        problem: Problem,
        solution: Solution,
        *,
        limits: Mapping[str, float] | None = None,
        calibrations: Mapping[str, Calibration] | None = None,
        baseline: Mapping[str, float] | None = None,
        provenance: Mapping[str, str] | None = None,
    ) -> Plan:
        """The plan of a solution, with its certificate and, of calibrated tasks, the loss to
        expect. baseline: task -> full-precision loss, for relative increases."""
        predicted = {"lp_gap": solution.gap, "proven_gap": solution.proven_gap, **solution.costs}
        losses = problem.task_losses(solution.picks)
        for task, calibration in (calibrations or {}).items():
            if task in losses:
                expected = calibration.predict(max(0.0, losses[task]))
                ends = {f"{task}_low": expected.low, f"{task}_high": expected.high}
                predicted |= {task: expected.value, **ends}
        if problem.scales:
            known = baseline or {}
            expects = {task: predicted.get(task, losses[task]) for task in losses if task in known}
            predicted |= {increase_name(t): loss / known[t] for t, loss in expects.items()}
        predicted = {name: value for name, value in predicted.items() if math.isfinite(value)}
        return Plan.of(
            problem,
            solution.picks,
            budget=solution.budget,
            limits=limits,
            predicted=predicted,
            provenance=provenance,
        )

    @property
    def bytes(self) -> int:
        """Predicted size of the whole checkpoint."""
        return self.fixed_bytes + sum(row.bytes for row in self.weights.values())

    @property
    def loss(self) -> float:
        """Sum of the predicted losses."""
        return math.fsum(row.loss for row in self.weights.values())

    @property
    def schemes(self) -> dict[str, str]:
        return {weight: row.scheme for weight, row in self.weights.items()}

    def priced(self, table: Sensitivity) -> Plan:
        """The same schemes with bytes and losses from `table`: for a plan that somebody may have
        edited.

        The search's promises are kept only if no number changed. Raises SearchError for a table of
        another model or task, and for a scheme that was not measured.
        """
        several = self.task == COMBINED
        if table.model != self.model or not (several or self.task in table.tasks):
            raise SearchError(
                f"the sensitivity table is of model {table.model[:12]} with "
                f"{', '.join(table.tasks)}; the plan needs model {self.model[:12]} with {self.task}"
            )
        if several and (len(table.tasks) < 2 or set(self.objective.weights) - set(table.tasks)):
            raise SearchError(
                f"the sensitivity table has the losses of {', '.join(table.tasks)}, and the plan "
                "weighs several tasks or others: search again"
            )
        scales = self.objective.scales(table.tasks, table.baseline) if several else {}
        rows = {}
        for weight, row in self.weights.items():
            entry = table.entry(weight, row.scheme)
            loss, _ = entry.priced(self.task, scales)
            rows[weight] = Assignment(row.scheme, entry.bytes, loss)
        return replace(
            self,
            weights=rows,
            predicted=self.predicted if rows == dict(self.weights) else {},
            provenance={**self.provenance, "sensitivity": table.digest()},
        )

    def check(
        self,
        model: str,
        weights: Sequence[WeightInfo] | None = None,
        groups: Iterable[GroupInfo] | None = None,
    ) -> None:
        """Raise SearchError unless the plan is for this model and, given `weights`, names exactly
        them.

        For an engine that fuses linear groups (those marked so in `groups`, or all), the members
        of each must also share a scheme.
        """
        if self.model != model:
            raise SearchError(
                f"the plan is for another model (fingerprint {self.model[:12]}, this one has "
                f"{model[:12]}): search again in this model's work directory"
            )
        if weights is not None:
            self._check_weights([info.name for info in weights])
            self._check_fused(weights, groups)

    def _check_weights(self, known: Sequence[str]) -> None:
        unknown = sorted(self.weights.keys() - set(known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SearchError(
                f"the plan names {unknown[0]!r}, which is not a weight of this model{hint}"
            )
        missing = [weight for weight in known if weight not in self.weights]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise SearchError(
                f"the plan has no scheme for {missing[0]!r}{more}: every weight needs a line"
            )

    def _check_fused(
        self, weights: Sequence[WeightInfo], groups: Iterable[GroupInfo] | None
    ) -> None:
        for members in units(weights, self.engine, groups).values():
            first, *others = [member.name for member in members]
            for other in others:
                schemes = self.weights[first].scheme, self.weights[other].scheme
                if schemes[0] != schemes[1]:
                    raise SearchError(
                        f"{self.engine} fuses {first} and {other}, and the plan gives them "
                        f"{' and '.join(schemes)}: give them one scheme, or plan for quantlib"
                    )

    def to_json(self) -> str:
        """JSON with one line per weight, in model order."""
        head: dict[str, object] = {
            "format": FORMAT,
            "version": VERSIONS[0],
            "model": self.model,
            "engine": self.engine,
            "task": self.task,
            "budget": self.budget,
            "limits": dict(self.limits),
            "rules": list(self.rules),
            "fixed_bytes": self.fixed_bytes,
            "bytes": self.bytes,
            "loss": self.loss,
            "predicted": dict(self.predicted),
            "provenance": dict(self.provenance),
        }
        if self.task == COMBINED:
            head |= {"version": VERSIONS[1], "objective": self.objective.to_json()}
        lines = [f"  {jsonfile.dump(key)}: {jsonfile.dump(value)}," for key, value in head.items()]
        rows = [
            f"    {jsonfile.dump(name)}: {jsonfile.dump(row._asdict())}"
            for name, row in self.weights.items()
        ]
        return "{\n" + "\n".join(lines) + '\n  "weights": {\n' + ",\n".join(rows) + "\n  }\n}\n"

    @staticmethod
    def from_json(text: str, source: str = "the plan") -> Plan:
        """Read what `to_json` or a person wrote. Raises SearchError that names `source` and the
        first mistake."""
        data = jsonfile.parse_object(text, source)
        jsonfile.check_header(data, FORMAT, VERSIONS, source)
        optional = {
            "task",
            "budget",
            "limits",
            "rules",
            "fixed_bytes",
            "bytes",
            "loss",
            "predicted",
            "provenance",
        }
        optional |= {"objective"} if data["version"] == VERSIONS[1] else set()
        jsonfile.check_keys(
            data, {"format", "version", "model", "engine", "weights"}, optional, source
        )
        engine = jsonfile.field(data, "engine", str, source)
        if engine not in ENGINES:
            raise SearchError(
                f"{source}: unknown engine {engine!r}; use one of {', '.join(ENGINES)}"
            )
        rules = jsonfile.field(data, "rules", list, source) if "rules" in data else []
        if not all(isinstance(rule, str) for rule in rules):
            raise SearchError(f"{source}: 'rules' must be a list of texts")
        weights = jsonfile.field(data, "weights", dict, source)
        if not weights:
            raise SearchError(f"{source} assigns no scheme to any weight")
        return Plan(
            jsonfile.field(data, "model", str, source),
            {weight: _read_assignment(weights, weight, source) for weight in weights},
            engine,
            _whole(data, "fixed_bytes", source) or 0,
            _whole(data, "budget", source),
            jsonfile.numbers(data, "limits", source),
            jsonfile.field(data, "task", str, source) if "task" in data else "kl",
            tuple(rules),
            jsonfile.numbers(data, "predicted", source),
            jsonfile.texts(data, "provenance", source),
            _read_objective(data, source),
        )

    def save(self, path: str | Path) -> None:
        jsonfile.write_text(path, self.to_json())

    @staticmethod
    def load(
        path: str | Path,
        model: str | None = None,
        weights: Sequence[WeightInfo] | None = None,
        groups: Iterable[GroupInfo] | None = None,
    ) -> Plan:
        """Read a plan; given `model` (a fingerprint), also `check` that it fits that model."""
        plan = Plan.from_json(jsonfile.read_text(path, "plan"), str(path))
        if model is not None:
            try:
                plan.check(model, weights, groups)
            except SearchError as error:
                raise SearchError(f"{path}: {error}") from error
        return plan


def _read_assignment(weights: Mapping[str, Any], weight: str, source: str) -> Assignment:
    where = f"{source}, {weight}"
    row = jsonfile.field(weights, weight, dict, source)
    jsonfile.check_keys(row, set(Assignment._fields), set(), where)
    name = jsonfile.field(row, "scheme", str, where)
    try:
        scheme = str(Scheme.parse(name))
    except FormatError as error:
        raise SearchError(f"{where}: {error}") from error
    size = jsonfile.field(row, "bytes", int, where)
    if size < 0:
        raise SearchError(f"{where}: bytes cannot be negative")
    return Assignment(scheme, size, jsonfile.field(row, "loss", float, where))


def _read_objective(data: Mapping[str, Any], source: str) -> Objective:
    if "objective" not in data:
        return Objective()
    found = jsonfile.field(data, "objective", dict, source)
    return Objective.from_json(found, f"{source}, objective")


def _whole(data: Mapping[str, Any], key: str, source: str) -> int | None:
    """`data[key]` as a whole number >= 0, or None when it is absent or null."""
    if data.get(key) is None:
        return None
    value = jsonfile.field(data, key, int, source)
    if value < 0:
        raise SearchError(f"{source}: {key!r} cannot be negative")
    return value


class Change(NamedTuple):
    """One line of the difference of two plans; None where a plan has no such weight."""

    weight: str
    before: str | None
    after: str | None
    bytes: int
    loss: float


def diff(before: Plan, after: Plan) -> list[Change]:
    """The weights whose scheme differs, in model order, with what the change does to bytes and
    predicted loss."""
    nothing = Assignment("", 0, 0.0)
    changes = []
    for weight in dict.fromkeys((*before.weights, *after.weights)):
        old, new = before.weights.get(weight, nothing), after.weights.get(weight, nothing)
        if old.scheme != new.scheme:
            changes.append(
                Change(
                    weight,
                    old.scheme or None,
                    new.scheme or None,
                    new.bytes - old.bytes,
                    new.loss - old.loss,
                )
            )
    return changes
