"""Small pieces of text that several commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlib.cli.console import notes

if TYPE_CHECKING:
    from quantlib.search.plan import Plan


def predicted_rows(plan: Plan) -> list[tuple[str, str]]:
    """What a plan is predicted to lose: one row, or of several tasks one for each.

    `0.0613, 95 % between 0.0551 and 0.0682`, `+1.31 % (0.0244, 95 % between 0.02 and 0.0291)`.
    """
    from quantlib.search.tasks import COMBINED, increases

    if plan.task != COMBINED:
        name = "KL" if plan.task == "kl" else plan.task
        uncalibrated = f"{plan.loss:.3g} (sum of losses, often too small: no probes calibrate it)"
        return [(f"{name} predicted", _interval(plan, plan.task) or uncalibrated)]
    rows = [("tasks predicted", _objective_text(plan))]
    for task, increase in increases(plan.predicted).items():
        more = _interval(plan, task) or "sum of losses: no probes calibrate it"
        rows.append((f"  {task}", f"{increase:+.3%} ({more})"))
    return rows


def _interval(plan: Plan, task: str) -> str:
    """A calibrated loss with its interval, in the task's unit; nothing where there is none."""
    predicted = plan.predicted
    if task not in predicted:
        return ""
    text = f"{predicted[task]:.3g}"
    if f"{task}_low" in predicted and f"{task}_high" in predicted:
        low, high = predicted[f"{task}_low"], predicted[f"{task}_high"]
        text += f", 95 % between {low:.3g} and {high:.3g}"
    return text


def _objective_text(plan: Plan) -> str:
    """`least sum of increases over full precision; image counts 2`."""
    what = "largest" if plan.objective.balance == "minmax" else "sum"
    weights = [f"{task} counts {weight:g}" for task, weight in plan.objective.weights.items()]
    return "; ".join([f"least {what} of increases over full precision", *weights])


def loss_name(task: str, balance: str, calibrated: bool) -> str:
    """What the losses of a front are, as the head of a column."""
    from quantlib.search.tasks import COMBINED

    if task == COMBINED:
        return "largest increase" if balance == "minmax" else "sum of increases"
    if calibrated:
        return "KL" if task == "kl" else task
    return "sum of losses"


def limit_rows(plan: Plan) -> list[tuple[str, str]]:
    """One row for every latency, for every component whose bytes a plan limits and for bits of
    inputs, and one for the machine that latencies are for."""
    from quantlib.search.activations import ACTIVATION_BITS
    from quantlib.search.budget import format_size
    from quantlib.search.components import is_component, pattern_of
    from quantlib.search.latency import format_ms, is_latency, phase_text

    rows, timed = [], False
    for cost, limit in plan.limits.items():
        if cost not in plan.predicted:
            continue
        taken = plan.predicted[cost]
        if is_latency(cost):
            allowed = f"{format_ms(taken)} predicted, {format_ms(limit)} allowed"
            rows.append((phase_text(cost).removeprefix("a "), allowed))
            timed = True
        elif is_component(cost):
            allowed = f"{format_size(int(taken))}, {format_size(int(limit))} allowed"
            rows.append((f"bytes of {pattern_of(cost)}", allowed))
        elif cost == ACTIVATION_BITS:
            rows.append(("bits of inputs", f"{taken:.3f}, {limit:g} allowed"))
    if timed and "machine" in plan.provenance:
        rows.append(("timed on", plan.provenance["machine"]))
    return rows


def next_commands(*commands: str) -> None:
    """Suggest what to try next, on stderr."""
    console = notes()
    console.print("\nnext:", style="dim")
    for command in commands:
        console.print(f"  {command}", markup=False, soft_wrap=True)
