"""The search stage: from the sensitivity table and a budget to a plan, without touching the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantlib.checkpoint.disk import atomic_write_text
from quantlib.checkpoint.writer import SHARD_BYTES
from quantlib.errors import UsageError
from quantlib.models.modelmap import ModelMap
from quantlib.pipeline import bytecount
from quantlib.pipeline.run import Run
from quantlib.search.budget import parse_bits, parse_size
from quantlib.search.constraints import Rule
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem, build_problem
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.solve import Solution, solve

SENSITIVITY_FILE = "sensitivity.json"
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Budget:
    """What the user allows: exactly one of `size` (as `90MB`, `30%`) and `bits` (true bits per parameter), and rules."""

    size: str | None = None
    bits: float | None = None
    engine: str = "quantlib"
    floors: tuple[str, ...] = ()
    ceilings: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()

    def in_bytes(self, model_map: ModelMap) -> int:
        """The budget in bytes of the whole checkpoint. Raises UsageError unless exactly one budget is given."""
        if (self.size is None) == (self.bits is None):
            raise UsageError("give one budget: a size such as --size 82.8MB, or true bits such as --bits 4.25")
        if self.size is not None:
            return parse_size(self.size, model_map.nbytes)
        return parse_bits(str(self.bits), model_map.parameters)

    def rules(self) -> list[Rule]:
        """Floors, ceilings and pins, parsed. Raises UsageError on one that is malformed."""
        kinds: Sequence[tuple[str, tuple[str, ...]]] = (
            ("floor", self.floors),
            ("ceiling", self.ceilings),
            ("pin", self.pins),
        )
        return [Rule.parse(kind, text) for kind, texts in kinds for text in texts]


def allocation_problem(model_map: ModelMap, table: Sensitivity, budget: Budget) -> Problem:
    """The problem the solver is given: every weight's candidates under the budget's rules."""
    return build_problem(
        table,
        model_map.weights,
        fixed_bytes=bytecount.fixed_bytes(model_map, SHARD_BYTES),
        engine=budget.engine,
        rules=budget.rules(),
    )


def search(model_map: ModelMap, table: Sensitivity, budget: Budget) -> tuple[Plan, Problem, Solution]:
    """Solve for the best allocation within the budget."""
    problem = allocation_problem(model_map, table, budget)
    solution = solve(problem, budget.in_bytes(model_map))
    plan = Plan.from_solution(problem, solution, calibration=table.calibration, provenance=table.provenance)
    return plan, problem, solution


def save_table(run: Run, table: Sensitivity) -> None:
    """Write the sensitivity table where people and `quantlib search` find it."""
    atomic_write_text(run.work.path / SENSITIVITY_FILE, table.to_json())


def save_plan(run: Run, plan: Plan) -> None:
    """Write the plan where people and `quantlib apply` find it."""
    atomic_write_text(run.work.path / PLAN_FILE, plan.to_json())
