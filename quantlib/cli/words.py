"""Small pieces of text that several commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlib.cli.console import notes

if TYPE_CHECKING:
    from quantlib.search.plan import Plan


def predicted_text(plan: Plan) -> str:
    """`0.0613 nats per token, 95 % between 0.0551 and 0.0682`."""
    predicted = plan.predicted
    if "kl" not in predicted:
        return f"{plan.loss:.3g} (sum of losses, often too small: no probes calibrate it)"
    text = f"{predicted['kl']:.3g}"
    if "kl_low" in predicted and "kl_high" in predicted:
        text += f", 95 % between {predicted['kl_low']:.3g} and {predicted['kl_high']:.3g}"
    return text


def latency_rows(plan: Plan) -> list[tuple[str, str]]:
    """One row for every latency that a plan limits, and one for the machine it is for."""
    from quantlib.search.latency import format_ms, is_latency, phase_text

    rows = []
    for cost, limit in plan.limits.items():
        if is_latency(cost) and cost in plan.predicted:
            taken = f"{format_ms(plan.predicted[cost])} predicted, {format_ms(limit)} allowed"
            rows.append((phase_text(cost).removeprefix("a "), taken))
    if rows and "machine" in plan.provenance:
        rows.append(("timed on", plan.provenance["machine"]))
    return rows


def next_commands(*commands: str) -> None:
    """Suggest what to try next, on stderr."""
    console = notes()
    console.print("\nnext:", style="dim")
    for command in commands:
        console.print(f"  {command}", markup=False, soft_wrap=True)
