"""What a finished checkpoint is shown as: after `compress` and after `apply`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from quantlib.cli.console import answers, facts, table
from quantlib.cli.words import limit_rows, next_commands, predicted_rows

if TYPE_CHECKING:
    from pathlib import Path

    from quantlib.pipeline.apply import Refinement, TaskRefinement
    from quantlib.pipeline.compress import Result


def described(result: Result) -> dict[str, Any]:
    """A result as JSON."""
    from quantlib.search.budget import true_bits

    plan, refinement = result.plan, result.refinement
    return {
        "checkpoint": result.path,
        "work": result.work,
        "report": result.report,
        "budget_bytes": plan.budget,
        "bytes": result.file_bytes,
        "source_bytes": result.source_bytes,
        "parameters": result.parameters,
        "bits": true_bits(result.file_bytes, result.parameters),
        "source_bits": true_bits(result.source_bytes, result.parameters),
        "loss": plan.loss,
        "predicted": dict(plan.predicted),
        "limits": dict(plan.limits),
        "latency": result.latency,
        "measured": _measured_json(refinement),
        "refined": refinement is not None and refinement.kept,
        "seconds": result.seconds,
    }


def show(result: Result, model: str) -> None:
    """Before and after, where things are, and what to try next. `model`: as the user calls it."""
    from quantlib.search.budget import format_size, true_bits
    from quantlib.search.latency import format_ms, phase_text

    sizes = result.source_bytes, result.file_bytes
    rows = [
        ("weights on disk", *map(format_size, sizes)),
        ("bits per parameter", *(f"{true_bits(n, result.parameters):.2f}" for n in sizes)),
        *((name, "0", text) for name, text in predicted_rows(result.plan)),
    ]
    if result.refinement is not None:
        rows += _measured(result.refinement)
    rows += [(name, "", taken) for name, taken in limit_rows(result.plan)]
    rows += [
        (f"  measured: {phase_text(cost)}", "", format_ms(ms))
        for cost, ms in result.latency.items()
    ]
    console = answers()
    console.print()
    console.print(table("", "before", "after", rows=rows))
    console.print()
    places = [("checkpoint", str(result.path)), ("work directory", str(result.work))]
    if result.report is not None:
        places.append(("report", str(result.report)))
    console.print(facts(places))
    out = shlex.quote(str(result.path))
    data, request = first_data_and_request(result.path, result.plan.task)
    asked = [] if request is None else [f"quantlib generate {out} {request}"]
    next_commands(
        f"quantlib inspect {out}",
        f"quantlib eval {out} --against {shlex.quote(model)} --data {data}",
        *asked,
    )


def first_data_and_request(checkpoint: Path, task: str) -> tuple[str, str | None]:
    """What to evaluate a checkpoint on, and what to ask it for at first: of a model of several
    parts what makes it one, nothing of an encoder. task: its plan's."""
    from quantlib.calibration.paths import find
    from quantlib.calibration.paths.route import ANSWER
    from quantlib.calibration.records import QUESTION, TEXT
    from quantlib.checkpoint.disk import read_json
    from quantlib.pipeline.plan import TASK
    from quantlib.runtime.media_images import DRAWERS

    model_type = str(read_json(checkpoint / "config.json").get("model_type"))
    routes = None if task == TASK else find(model_type)
    if routes is None:
        return "HELD_OUT_TEXT", shlex.quote(_first_prompt(checkpoint))
    data, streams = "HELD_OUT.jsonl", {route.stream: route for route in routes.routes}
    if model_type in DRAWERS:
        return data, "'a red three on a black background' --image out.png"
    if ANSWER in streams:
        looks = QUESTION in streams[ANSWER].kinds
        return data, "'What is this?' --image-input photo.png" if looks else "--audio clip.wav"
    return data, shlex.quote(_first_prompt(checkpoint)) if TEXT in streams else None


def _first_prompt(checkpoint: Path) -> str:
    """Something to answer for a model that answers, something to continue for another: half a
    sentence in a chat template confuses the model before any weight is rounded."""
    from quantlib.checkpoint.disk import read_json

    settings = checkpoint / "tokenizer_config.json"
    chats = (checkpoint / "chat_template.jinja").exists() or (
        settings.exists() and read_json(settings).get("chat_template") is not None
    )
    return "What is the capital of France?" if chats else "The capital of France is"


def _measured_json(refinement: Refinement | TaskRefinement | None) -> dict[str, Any] | None:
    """What was measured on held-back windows, or of every task on held-back records."""
    from quantlib.pipeline.apply import TaskRefinement

    if refinement is None or isinstance(refinement, TaskRefinement):
        return None if refinement is None else refinement.to_json()
    return refinement.shipped.to_json()


def _measured(refinement: Refinement | TaskRefinement) -> list[tuple[str, str, str]]:
    """What was measured on held-back windows of the calibration text, or on held-back records."""
    from quantlib.pipeline.apply import TaskRefinement

    if isinstance(refinement, TaskRefinement):
        rows = []
        for task, loss in refinement.shipped.items():
            rows.append((f"{task}: measured loss on held-back records", "0", str(loss)))
            if refinement.kept:
                rows.append(("  before re-rounding", "0", str(refinement.bank[task])))
        return rows
    shipped = refinement.shipped
    rows = [("KL on held-back windows", "0", str(shipped.kl))]
    if refinement.kept:
        rows.append(("  before re-rounding", "0", str(refinement.bank.kl)))
    rows.append(("perplexity there", str(shipped.reference_perplexity), str(shipped.perplexity)))
    return rows
