"""The search stage: from the sensitivity table and budgets to a plan, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from quantlib.checkpoint.writer import SHARD_BYTES
from quantlib.errors import SearchError, UsageError
from quantlib.formats.scheme import Scheme
from quantlib.models.modelmap import ModelMap
from quantlib.pipeline import bytecount
from quantlib.search.activations import (
    ACTIVATION_BITS,
    activation_costs,
    parse_activation_bits,
    rounds_inputs,
)
from quantlib.search.budget import parse_bits, parse_size
from quantlib.search.build import build_problem
from quantlib.search.components import (
    component_costs,
    component_fixed,
    component_limits,
    is_component,
)
from quantlib.search.constraints import KINDS, Rule, parse_rules
from quantlib.search.latency import LatencyBudget, LatencyCosts
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem
from quantlib.search.sensitivity import Entry, Sensitivity
from quantlib.search.solve import Solution, solve
from quantlib.search.tasks import COMBINED, Objective, task_cost
from quantlib.search.weights import ENGINES

TASK = "kl"
"""The loss of language models: KL divergence per token of text, in nats."""


@dataclass(frozen=True)
class Budget:
    """What the user allows: at most one of `size` (as `90MB`, `30%`) and `bits` (true bits per
    parameter), bytes of components (`search.components`), latencies, mean bits of activations
    (`search.activations`), rules, and what is minimised over several tasks.

    task_limits: task -> the most its predicted loss may be, in its unit: what one plan is predicted
                 to lose in each task, for another that is to be no worse in any (`no_worse`).
    """

    size: str | None = None
    bits: float | None = None
    engine: str = "quantlib"
    floors: tuple[str, ...] = ()
    ceilings: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    latency: LatencyBudget = field(default_factory=LatencyBudget)
    activations: float | None = None
    components: tuple[str, ...] = ()
    objective: Objective = field(default_factory=Objective)
    task_limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.latency and self.engine != "quantlib":
            raise UsageError(
                f"latencies are timed on quantlib's engine, and this plan is for {self.engine}: "
                "leave out --latency or --engine"
            )

    @staticmethod
    def rules_of(plan: Plan) -> Budget:
        """The engine, the rules and the objective a plan was made under, without its budgets."""
        texts: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for rule in plan.rules:
            kind, _, text = rule.removeprefix("--").partition(" ")
            if kind not in texts:
                raise SearchError(f"the plan has a rule {rule!r}: it starts with no known option")
            texts[kind].append(text)
        floors, ceilings, pins = (tuple(texts[kind]) for kind in KINDS)
        objective = plan.objective
        return Budget(None, None, plan.engine, floors, ceilings, pins, objective=objective)

    @property
    def given(self) -> bool:
        """Whether there is a budget, and not only rules."""
        sized = self.size is not None or self.bits is not None
        return sized or bool(self.latency) or bool(self.components)

    def in_bytes(self, model_map: ModelMap) -> int | None:
        """The budget in bytes of the whole checkpoint, None when only latencies or components are
        limited.

        Raises UsageError when there is no budget at all, or a size twice.
        """
        if not self.given or (self.size is not None and self.bits is not None):
            raise UsageError(
                "give one budget: a size such as --size 82.8MB, or true bits such as --bits 4.25 "
                "(or latencies and bytes of components, such as --latency 12ms or --component-size "
                "vision_tower=2MB, alone or with one of them)"
            )
        if self.size is not None:
            return parse_size(self.size, model_map.nbytes)
        return None if self.bits is None else parse_bits(str(self.bits), model_map.parameters)

    def rules(self) -> tuple[Rule, ...]:
        """Floors, ceilings and pins, parsed. Raises UsageError on one that is malformed."""
        return parse_rules(self.floors, self.ceilings, self.pins)

    def limits(self, model_map: ModelMap) -> dict[str, float]:
        """Limits of costs other than the file's bytes, by their names. Raises UsageError."""
        return {
            **self.latency.limits(),
            **parse_activation_bits(self.activations),
            **component_limits(self.components, model_map.components()),
            **{task_cost(task): limit for task, limit in self.task_limits.items()},
        }

    def asked_for(self, plan: Plan, model_map: ModelMap) -> bool:
        """Whether a plan is an answer to this very request."""
        rules = tuple(map(str, self.rules()))
        wanted = (self.in_bytes(model_map), self.limits(model_map), self.engine, rules)
        if plan.task == COMBINED and plan.objective != self.objective:
            return False
        return (plan.budget, dict(plan.limits), plan.engine, plan.rules) == wanted

    @property
    def fuses(self) -> bool:
        """Whether the engine runs the linears that read one input as one matrix."""
        if self.engine not in ENGINES:
            raise UsageError(f"unknown engine {self.engine!r}: use one of {', '.join(ENGINES)}")
        return ENGINES[self.engine]


def allocation_problem(
    model_map: ModelMap, table: Sensitivity, budget: Budget, costs: LatencyCosts | None = None
) -> Problem:
    """The problem the solver is given: every weight's candidates under the budget's rules.

    costs: what each candidate takes, for budgets that limit it (`pipeline.latency`).
    """
    _check_task_limits(budget.task_limits, table.tasks)
    weights = model_map.weights
    spent: dict[str, Mapping[tuple[str, str], float]] = {**(costs.costs if costs else {})}
    fixed = dict(costs.fixed) if costs else {}
    if any(map(rounds_inputs, table.rows.values())):
        spent[ACTIVATION_BITS] = activation_costs(weights, table.rows)
    elif budget.activations is not None:
        raise UsageError(
            f"activations of {budget.activations:g} bits cannot be had: no candidate scheme rounds "
            "the inputs of linears; use --scheme resq, or name such schemes with --schemes, as "
            "w4g64a4z"
        )
    sizes = {name: {s: entry.bytes for s, entry in row.items()} for name, row in table.rows.items()}
    for cost in filter(is_component, budget.limits(model_map)):
        spent[cost] = component_costs(cost, weights, sizes)
        fixed[cost] = component_fixed(cost, bytecount.kept_bytes(model_map))
    return build_problem(
        table,
        weights,
        fixed_bytes=bytecount.fixed_bytes(model_map, SHARD_BYTES) + table.extra_bytes,
        engine=budget.engine,
        groups=model_map.groups,
        rules=budget.rules(),
        objective=budget.objective,
        costs=spent,
        fixed_costs=fixed,
    )


def _check_task_limits(limits: Mapping[str, float], tasks: Sequence[str]) -> None:
    """Raise UsageError for a limit on the loss of a task that cannot have one."""
    if limits and len(tasks) == 1:
        raise UsageError(f"{tasks[0]} is the only task: its loss is minimised, and needs no limit")
    for task in limits:
        if task not in tasks:
            raise UsageError(
                f"there is a limit on the loss of task {task!r}, and what is measured are the "
                f"losses of {', '.join(tasks)}"
            )


def no_worse(problem: Problem, schemes: Mapping[str, str]) -> dict[str, float]:
    """`Budget.task_limits` under which no task of a problem is predicted to lose more than when its
    weights have these schemes; none where there is one task, whose loss is minimised. Raises
    SearchError for schemes that are no choices of the problem."""
    return problem.task_losses(problem.picks(schemes)) if problem.scales else {}


def sizes_only(
    model_map: ModelMap,
    schemes: Mapping[str, Sequence[str]],
    budget: Budget,
    costs: LatencyCosts | None = None,
) -> Problem:
    """The allocation problem before anything was measured: true bytes and times, every loss 0.

    It says which sizes are possible, and raises for rules that match nothing or contradict each
    other, before hours are spent on measuring. schemes: weight -> its candidates.
    """
    nothing = {TASK: 0.0}
    rows = {
        weight.name: {
            name: Entry(bytecount.weight_bytes(weight, Scheme.parse(name)), nothing, nothing)
            for name in schemes[weight.name]
        }
        for weight in model_map.weights
    }
    table = Sensitivity(model_map.fingerprint, (TASK,), rows)
    return allocation_problem(model_map, table, replace(budget, objective=Objective()), costs)


def check_request(
    model_map: ModelMap,
    schemes: Mapping[str, Sequence[str]],
    budget: Budget,
    costs: LatencyCosts | None = None,
) -> None:
    """Raise what `search` would raise after measuring: UsageError for the budget's text or rules,
    SearchError for budgets that no allocation fits, with the least that is possible."""
    budget = replace(budget, task_limits={})  # nothing is known of losses yet
    problem = sizes_only(model_map, schemes, budget, costs)
    solve(problem, budget.in_bytes(model_map), budget.limits(model_map))


def search(
    model_map: ModelMap, table: Sensitivity, budget: Budget, costs: LatencyCosts | None = None
) -> tuple[Plan, Problem, Solution]:
    """Solve for the best allocation within the budgets. A latency needs `costs`."""
    problem = allocation_problem(model_map, table, budget, costs)
    limits = budget.limits(model_map)
    solution = solve(problem, budget.in_bytes(model_map), limits)
    timed = {"machine": costs.machine, "timings": costs.fingerprint} if costs else {}
    plan = Plan.from_solution(
        problem,
        solution,
        limits=limits,
        calibrations=table.calibrations,
        baseline=table.baseline,
        provenance={**table.provenance, **timed},
    )
    return plan, problem, solution
