"""Evolved proxies (EMQ): a formula that ranks plans, found on one model and judged on another.

    python -P -m quantlib.bench.evolved                 three seeds, on every model that is measured

Measured plans come from `bench.plans_measured`. For every model and seed, a formula is evolved on
half of its plans; it is judged on the other half, and on all plans of the model it never saw. Two
sets of columns: `training free` knows statistics and formats only, so nothing has to be rounded;
`measured` knows the sensitivity table's prediction, too, and may only mend it. The formula that is
kept for use (`bench/proxies/NAME.json`, for `quantlib search --score evolved:FILE`) is, of the
training-free ones of a model, the best on the half of its own plans that it was not evolved on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from quantlib.bench import artifacts, plans_measured, record
from quantlib.bench.plans_measured import SUBJECTS
from quantlib.checkpoint.disk import atomic_write_text
from quantlib.checkpoint.provenance import digest
from quantlib.errors import QuantlibError
from quantlib.search.evolve import Settings, evolve
from quantlib.search.expressions import Expression
from quantlib.search.proxies import COLUMNS, TRAINING_FREE, Proxy
from quantlib.search.rank import MeasuredPlans, qualities

SETS = {"training free": TRAINING_FREE, "measured": COLUMNS}
SEEDS = 3
PROXIES = Path(__file__).parent / "proxies"
"""Formulas kept for use."""
FINALISTS = 10
"""Of the fittest formulas, the one that ranks the held-out half best is kept."""

console = Console(stderr=True)


def judged(expression: Expression, plans: MeasuredPlans) -> dict[str, float]:
    """Rank correlations of a formula with measured losses (`rank.qualities`)."""
    found = qualities(plans.scores(expression.evaluate(plans.columns)), plans)
    return {name: round(value, 4) for name, value in found.items()}


def row_of(
    plans: MeasuredPlans, others: Sequence[MeasuredPlans], columns: str, settings: Settings
) -> dict[str, Any]:
    """Evolve on half of `plans`; judge on the other half and on all plans of `others`."""
    first, held_out = plans.halves(settings.seed)
    started = time.process_time()
    found = evolve([first], SETS[columns], settings)
    seconds = time.process_time() - started
    finalists = [member.expression for member in found.members[:FINALISTS]]
    best = max(finalists, key=lambda one: sum(judged(one, held_out).values()))
    return {
        "evolved_on": plans.name,
        "columns": columns,
        "seed": settings.seed,
        "expression": best.text,
        "first_half": judged(best, first),
        "held_out": judged(best, held_out),
        "unseen": {other.name: judged(best, other) for other in others},
        "history": [round(value, 4) for value in found.history],
        "tried": found.tried,
        "passed": found.passed,
        "seconds": round(seconds, 1),
    }


def results(
    subjects: Sequence[MeasuredPlans], seeds: int, settings: Settings, work: Path
) -> dict[str, Any]:
    """All rows, and what known scores reach on the same plans. Finished evolutions are kept in
    `work`, so a command that was stopped goes on."""
    rows = []
    data = [[one.name, one.losses.tolist()] for one in subjects]
    for plans in subjects:
        others = [other for other in subjects if other is not plans]
        for columns in SETS:
            for seed in range(seeds):
                own = Settings(**(vars(settings) | {"seed": seed}))
                file = work / f"{digest([data, plans.name, SETS[columns], vars(own)])}.json"
                if not file.exists():
                    row = row_of(plans, others, columns, own)
                    atomic_write_text(file, json.dumps(row))
                rows.append(json.loads(file.read_text(encoding="utf-8")))
                console.print({k: v for k, v in rows[-1].items() if k != "history"})
    known = {plans.name: plans_measured.known_scores(plans) for plans in subjects}
    rounded = {
        name: {score: {k: round(v, 4) for k, v in found.items()} for score, found in scores.items()}
        for name, scores in known.items()
    }
    counts = {plans.name: len(plans.losses) for plans in subjects}
    return {"settings": vars(settings), "plans": counts, "known": rounded, "rows": rows}


def keep_best(rows: Sequence[dict[str, Any]], settings: Settings, folder: Path = PROXIES) -> None:
    """Write a proxy's file for every model that formulas were evolved on."""
    for name in dict.fromkeys(row["evolved_on"] for row in rows):
        mine = [r for r in rows if r["evolved_on"] == name and r["columns"] == "training free"]
        best = max(mine, key=lambda row: sum(row["held_out"].values()))
        quality = {f"held_out_{key}": value for key, value in best["held_out"].items()}
        how = vars(settings) | {"seed": best["seed"]}
        proxy = Proxy(Expression.parse(best["expression"], COLUMNS), (name,), quality, how)
        file = folder / f"{name}.json"
        proxy.save(file)
        print(f"{file}: {proxy.expression.text}")


def main(
    seeds: Annotated[int, typer.Option(help="Evolutions of each kind.")] = SEEDS,
    generations: Annotated[int, typer.Option(help="Of each evolution.")] = 40,
    population: Annotated[int, typer.Option(help="And as many children each time.")] = 100,
) -> None:
    """Evolve and judge; writes the result file and the proxies' files."""
    try:
        settings = Settings(population=population, children=population, generations=generations)
        subjects = [plans_measured.load(name) for name in plans_measured.kept() or SUBJECTS]
        work = artifacts.folder() / "evolved"
        work.mkdir(parents=True, exist_ok=True)
        found = results(subjects, seeds, settings, work)
        keep_best(found["rows"], settings)
        print(record.write("evolved", found))
    except QuantlibError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
