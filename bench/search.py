"""Searches compared at equal bytes: what each one's plan really loses, and what finding it takes.

    python -P -m quantlib.bench.search                       both tasks, three budgets each
    python -P -m quantlib.bench.search smollm2 --random 20   random search of 20 plans a budget
    python -P -m quantlib.bench.search --table               tables and plots of what is measured

Tasks: `smollm2`, KL on 8 held-out windows of 512 tokens; `dinov2`, half the squared relative error
of the vectors of 128 pictures. Neither calibration nor search has seen them. All plans are of the
same candidates, rounded alike and substituted from the same bank: what differs is the allocation.
`evolved` is the formula that was evolved on the other model (`bench.evolved`). Standard errors are
over windows or pictures; `against exact` is the mean difference, in per cent, from the exact search
on measured errors, with the standard error of paired differences. Minutes are of one core and do
not count calibration (`search_methods.py`). Rows of the graph network, FLIQS and CSQ come from
their own benchmarks, with their own units of cost and half of a 95 % interval (`search_others.py`).

Plans and their losses are kept in the work directories, so the command goes on where it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from quantlib.bench import record
from quantlib.bench.evolved import PROXIES
from quantlib.bench.plans_measured import SUBJECTS, budgets_of, opened
from quantlib.bench.search_judge import Judge
from quantlib.bench.search_methods import Context, searches
from quantlib.bench.search_others import other_rows
from quantlib.bench.search_plot import save_others, save_plot
from quantlib.checkpoint.disk import read_json
from quantlib.errors import DataError, QuantlibError, UsageError
from quantlib.search.expressions import Expression
from quantlib.search.proxies import Proxy

CHOSEN = (1, 3, 5)
"""Which of the budgets of `plans_measured` are compared."""
EXACT = "exact, measured"
RESULT = "search"
WORDS = re.compile(r"\w+")
UNITS = {"smollm2": "KL, nats per token", "dinov2": "half the squared relative error"}

console = Console(stderr=True)


def evolved_elsewhere(name: str, folder: Path = PROXIES) -> dict[str, Expression]:
    """The formulas that were evolved on other models, by the name of their row."""
    found = {}
    for other in SUBJECTS:
        file = folder / f"{other}.json"
        if other != name and file.exists():
            found[f"evolved on {other}"] = Proxy.load(file).expression
    return found


def compared(
    name: str, random_plans: int | None, work: Path | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of one task: after every budget, those of all budgets until then."""
    subject = SUBJECTS[name]
    rows: list[dict[str, Any]] = []
    with opened(subject, work) as (run, table):
        context, judge = Context(subject, run, table, evolved_elsewhere(name)), Judge(run)
        budgets = budgets_of(context.problem)
        minutes = {"table": context.table_minutes, "layers": context.layer_minutes}
        for index in CHOSEN:
            for found in searches(context, budgets[index], random_plans):
                samples = [float(f"{x:.5g}") for x in judge.samples(found.schemes)]
                row: dict[str, Any] = {
                    "method": found.method,
                    "budget": budgets[index],
                    "bytes": found.bytes,
                    "samples": samples,
                    "minutes": round(found.minutes, 3),
                    "note": found.note,
                }
                rows.append(row | loss_of(samples))
                console.print({k: v for k, v in rows[-1].items() if k != "samples"})
            yield {
                "unit": UNITS[name],
                "parameters": run.model_map.parameters,
                "minutes": {key: round(value, 3) for key, value in minutes.items()},
                "rows": with_differences(rows),
            }


def loss_of(samples: Sequence[float]) -> dict[str, float]:
    """Mean and standard error over samples."""
    values = np.asarray(samples)
    return {
        "loss": float(values.mean()),
        "error": float(values.std(ddof=1) / math.sqrt(len(values))),
    }


def with_differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their paired difference from the exact search at the same budget, in per cent."""
    exact = {row["budget"]: row for row in rows if row["method"] == EXACT}
    out = []
    for row in rows:
        base = exact[row["budget"]]
        change = loss_of(np.subtract(row["samples"], base["samples"]).tolist())
        percent = {k: round(100 * v / base["loss"], 2) for k, v in change.items()}
        out.append({**row, "against_exact": percent["loss"], "against_error": percent["error"]})
    return out


def table(task: Mapping[str, Any]) -> str:
    """A task's rows as Markdown: a line for every method, a column for every budget."""
    budgets = sorted({row["budget"] for row in task["rows"]})
    bits = [f"{8 * budget / task['parameters']:.2f} bits" for budget in budgets]
    lines = [
        f"| search | {' | '.join(bits)} | core-minutes |",
        f"|---|{'---|' * len(budgets)}---|",
    ]
    for method in dict.fromkeys(row["method"] for row in task["rows"]):
        mine = {row["budget"]: row for row in task["rows"] if row["method"] == method}
        cells = [_cell(mine[budget]) for budget in budgets]
        minutes = np.mean([row["minutes"] for row in mine.values()])
        lines.append(f"| {method} | {' | '.join(cells)} | {minutes:.2g} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    value = f"{row['loss']:.3g} ± {row['error']:.1g}"
    if row["method"] == EXACT:
        return value
    return f"{value} ({row['against_exact']:+.0f} ± {row['against_error']:.0f} %)"


def others_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of other benchmarks as Markdown."""
    lines = ["| task | search | cost | quality, ± 95 % | minutes |", "|---|---|---|---|---|"]
    for row in rows:
        error = "" if row["error"] is None else f" ± {row['error']:.2g}"
        cost = f"{row['cost']:.3g} {row['cost_unit']}"
        quality = f"{row['quality']:.4g}{error} {row['quality_unit']}"
        minutes = "" if row["minutes"] is None else f"{row['minutes']:.2g}"
        cells = (row["task"], row["method"], cost, quality, minutes)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kept() -> dict[str, Any]:
    """The tasks of the result file; none where there is none."""
    file = record.path_of(RESULT)
    return dict(read_json(file)["tasks"]) if file.exists() else {}


def show(found: Mapping[str, Any], names: Sequence[str]) -> None:
    """Print tables and write plots: of these tasks, and of what other benchmarks measured."""
    missing = [name for name in names if name not in found]
    if missing or not names:
        raise DataError(f"{(missing or list(SUBJECTS))[0]} is not measured yet: leave out --table")
    for name in names:
        print(f"\n{name}: {found[name]['unit']}\n\n{table(found[name])}")
        save_plot(found[name], record.RESULTS / f"{RESULT}_{name}.svg")
    if others := other_rows():
        print(f"\n{others_table(others)}")
        for task in dict.fromkeys(row["task"] for row in others):
            mine = [row for row in others if row["task"] == task]
            save_others(mine, record.RESULTS / f"{RESULT}_{'_'.join(WORDS.findall(task))}.svg")


def main(
    tasks: Annotated[list[str] | None, typer.Argument(help="smollm2, dinov2; both.")] = None,
    random: Annotated[
        int | None,
        typer.Option(help="Plans of random search; as many as the exact search's time allows."),
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Work directory, of one task.")] = None,
    only_table: Annotated[
        bool, typer.Option("--table", help="Print and plot what is measured.")
    ] = False,
) -> None:
    """Compare searches; writes the result file, and a plot for every task."""
    try:
        unknown = [name for name in tasks or () if name not in SUBJECTS]
        if unknown:
            raise UsageError(f"unknown task {unknown[0]!r}: use {', '.join(SUBJECTS)}")
        found = kept()
        for name in [] if only_table else tasks or SUBJECTS:
            for task in compared(name, random, work):
                found[name] = task
                print(record.write(RESULT, {"tasks": found}))
        show(found, tasks or [name for name in SUBJECTS if name in found])
    except QuantlibError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
