"""What quality costs: KL against bytes on a real language model, held-out text, and everything
counted.

    python -P -m quantlib.bench.quality                 everything below, one after the other
    python -P -m quantlib.bench.quality --part budgets  one part (see --help for their names)
    python -P -m quantlib.bench.quality --part refined_rows --budget 89.5 --work DIR

SmolLM2-135M-Instruct (the permuted copy of `bench.assets`), calibrated on nine tenths of the
articles of a Wikipedia extract and evaluated on the tenth that was held out: KL(full precision ||
quantized) over the second half of 512-token windows. Sizes are those of the whole safetensors file.
Every allocation is measured on the same windows; errors are standard errors over windows. Baselines
share everything with quantlib but the allocation: the same rounding, the same candidate schemes,
the same bytes. `rows` and `refined_rows` are `budgets` and `refined` with mixtures of rows among
the candidates, without probes. Budgets of the refined parts take half an hour of a core each:
finished ones are kept in DIR, and the result file has all of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from torch import Tensor

from quantlib.bench import assets, record
from quantlib.calibration.data import load_windows
from quantlib.checkpoint.disk import atomic_write_text
from quantlib.evaluation.language import LanguageResult, evaluate_language
from quantlib.evaluation.reference import Reference, reference_logprobs
from quantlib.models import skeleton
from quantlib.models.source import Source
from quantlib.pipeline.apply import Refinement
from quantlib.pipeline.compress import Result, compress, load_tokenizer, measured_table, open_run
from quantlib.pipeline.dense import DenseTrial
from quantlib.pipeline.plan import Budget, allocation_problem
from quantlib.pipeline.run import Run
from quantlib.recipe import PRESETS, Recipe
from quantlib.runtime.load import load
from quantlib.search.baselines import heuristic_first_last, random_allocation, uniform
from quantlib.search.problem import Picks, Problem
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.solve import solve

BUDGETS_MB = (89.5, 82.8, 76.2, 69.6, 62.9)
TARGET_KL = (0.033, 0.062, 0.128, 0.265, 0.65)
"""What the project set out to reach at these sizes."""
TARGET_REFINED = (0.024, 0.045, 0.092, 0.19, 0.45)
"""The same where plans are re-rounded."""
WINDOWS, SEQLEN = 24, 512
PARTS = (
    "presets",
    "budgets",
    "rows",
    "baselines",
    "prediction",
    "refinement",
    "refined",
    "refined_rows",
    "swaps",
)
RANDOM_PLANS = 40
RANDOM_WINDOWS = 6
"""Windows each random plan is measured on: ranks need fewer than values do."""
SWAPS = 12
REFINED: dict[str, dict[str, Any]] = {"plain": {}, "refine": {"refine": True}}
SWAPPED: dict[str, dict[str, Any]] = {"plain": {}, "swaps": {"swaps": SWAPS}}


class Bench:
    """The model, its held-out windows and a work directory that all parts share."""

    def __init__(self, work: Path) -> None:
        self.model = assets.fetch_smollm2()
        self.data = assets.wikipedia_text("calibration")
        self.work = work
        tokenizer = load_tokenizer(self.model)
        held_out = str(assets.wikipedia_text("held_out"))
        self.windows = load_windows(held_out, tokenizer, SEQLEN, WINDOWS, seed=0)
        self.recipe = Recipe.create(data=str(self.data))

    @cached_property
    def reference(self) -> Reference:
        """The full-precision model's predictions on the held-out windows."""
        source = Source.open(self.model)
        dense = skeleton.build(source)
        skeleton.materialize(dense, "", source)
        return reference_logprobs(dense, self.windows)

    def compress(self, size_mb: float, out: Path, work: Path, **recipe: Any) -> Result:
        """`quantlib compress` to a size in MB."""
        return compress(
            self.model,
            out=out,
            work=work,
            data=self.data,
            size=f"{size_mb}MB",
            overwrite=True,
            **recipe,
        )

    @contextmanager
    def run(self) -> Iterator[tuple[Run, Sensitivity, Problem]]:
        """The shared work directory's run, its sensitivity table and allocation problem."""
        with open_run(self.model, self.work, self.recipe) as run:
            budget = Budget(size=f"{BUDGETS_MB[0]}MB")
            table = measured_table(run)
            yield run, table, allocation_problem(run.model_map, table, budget)

    def trial(self, run: Run, windows: Tensor) -> DenseTrial:
        """A trial that measures plans on held-out windows."""
        trial = DenseTrial(run)
        trial.windows = windows
        trial.reference = reference_logprobs(trial.model, windows)
        return trial


def budgets(
    bench: Bench,
    scratch: Path,
    name: str,
    targets: Sequence[float],
    wanted: Sequence[float] = BUDGETS_MB,
    **recipe: Any,
) -> dict[str, Any]:
    """Compress to each of the `wanted` budgets and measure the packed checkpoint as a user would
    load it; rows that were measured before are kept in the work directory under `name`."""
    file = bench.work / f"quality_{name}.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for size, target in zip(BUDGETS_MB, targets, strict=True):
        if size in wanted and str(size) not in known:
            known[str(size)] = _budget_row(bench, scratch, size, target, recipe)
            atomic_write_text(file, json.dumps(known) + "\n")
    return {"rows": [known[str(size)] for size in BUDGETS_MB if str(size) in known]}


def _budget_row(
    bench: Bench, scratch: Path, size: float, target: float, recipe: Mapping[str, Any]
) -> dict[str, Any]:
    started = time.monotonic()
    result = bench.compress(size, scratch / f"out-{size}", bench.work, **recipe)
    row: dict[str, Any] = {
        "budget_mb": size,
        "bytes": result.file_bytes,
        "target_kl": target,
        "seconds": round(time.monotonic() - started, 1),
    }
    measured = evaluate_language(load(result.path).model, bench.windows, bench.reference)
    row |= figures(measured) | {"plan_bytes": result.plan.bytes}
    row["predicted"] = dict(result.plan.predicted)
    row["mixed"] = sum("@" in scheme for scheme in result.plan.schemes.values())
    if isinstance(result.refinement, Refinement):
        row["held_back"] = {
            "bank_kl": result.refinement.bank_kl,
            "refined_kl": result.refinement.refined_kl,
        }
    print(
        f"{size} MB: {result.file_bytes:,} bytes, "
        f"KL {row['kl']:.4f} +- {row['kl_error']:.4f} (target {target})"
    )
    return row


def baselines(bench: Bench) -> dict[str, Any]:
    """The exact allocation against simpler ones at equal bytes, all assembled from one bank without
    re-rounding."""
    rows: list[dict[str, Any]] = []
    with bench.run() as (run, table, problem):
        trial = bench.trial(run, bench.windows)
        for size in BUDGETS_MB:
            limit = int(size * 1e6)
            exact = solve(problem, limit).picks
            plans: dict[str, Picks] = {
                "exact": exact,
                "uniform": uniform(problem, limit),
                "first_last": heuristic_first_last(problem, limit),
                "random": random_allocation(problem, limit, seed=0),
            }
            row: dict[str, Any] = {"budget_mb": size}
            for name, picks in plans.items():
                row[name] = figures(trial.measure(problem.schemes(picks))) | {
                    "bytes": problem.bytes(picks),
                    "predicted_sum": problem.loss(picks),
                }
            if table.calibration is not None:
                row["exact"]["predicted"] = table.calibration.predict(problem.loss(exact))._asdict()
            rows.append(row)
            print(f"{size} MB: " + ", ".join(f"{n} {row[n]['kl']:.4f}" for n in plans))
    return {"rows": rows}


def prediction(bench: Bench) -> dict[str, Any]:
    """Predicted against measured KL: the interval at the five budgets is in `baselines`; here 40
    random plans."""
    points = []
    with bench.run() as (run, _, problem):
        trial = bench.trial(run, bench.windows[:RANDOM_WINDOWS])
        low, high = BUDGETS_MB[-1] * 1e6, BUDGETS_MB[0] * 1e6
        for index in range(RANDOM_PLANS):
            limit = int(low + (high - low) * index / (RANDOM_PLANS - 1))
            picks = random_allocation(problem, limit, seed=index)
            measured = figures(trial.measure(problem.schemes(picks)))
            points.append(
                {"bytes": problem.bytes(picks), "predicted_sum": problem.loss(picks), **measured}
            )
    rho = float(
        spearmanr([p["predicted_sum"] for p in points], [p["kl"] for p in points]).statistic
    )
    print(f"Spearman correlation over {RANDOM_PLANS} random plans: {rho:.3f}")
    return {"spearman": rho, "windows": RANDOM_WINDOWS, "points": points}


def after_solving(
    bench: Bench, scratch: Path, variants: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What further work on a plan adds at one budget, on the held-out windows: variants of the
    recipe by name."""
    rows: list[dict[str, Any]] = []
    for name, recipe in variants.items():
        started = time.monotonic()
        result = bench.compress(82.8, scratch / f"out-{name}", bench.work, **recipe)
        row: dict[str, Any] = {"variant": name, "seconds": round(time.monotonic() - started, 1)}
        row |= figures(evaluate_language(load(result.path).model, bench.windows, bench.reference))
        if isinstance(result.refinement, Refinement):
            compared = {
                "bank_kl": result.refinement.bank_kl,
                "refined_kl": result.refinement.refined_kl,
            }
            row["held_back"] = compared | {"kept": result.refinement.kept}
        rows.append(row)
        print(f"{name}: KL {row['kl']:.4f} +- {row['kl_error']:.4f}", row.get("held_back", ""))
    return {"rows": rows}


def presets(bench: Bench, scratch: Path, names: Sequence[str]) -> dict[str, Any]:
    """The presets from an empty work directory, timed."""
    rows: list[dict[str, Any]] = []
    for preset in names:
        started = time.monotonic()
        result = bench.compress(
            82.8, scratch / f"out-{preset}", scratch / f"work-{preset}", preset=preset
        )
        seconds = time.monotonic() - started
        row = {
            "preset": preset,
            "bytes": result.file_bytes,
            "seconds": round(seconds, 1),
            "stages": result.seconds,
        }
        row |= figures(evaluate_language(load(result.path).model, bench.windows, bench.reference))
        rows.append(row)
        print(f"{preset}: {seconds:.0f} s, KL {row['kl']:.4f} at {result.file_bytes / 1e6:.1f} MB")
    return {"rows": rows}


def figures(result: LanguageResult) -> dict[str, float]:
    """KL, perplexity and its ratio to full precision, same-top share, each with its standard
    error."""
    out: dict[str, float] = {}
    for name in ("kl", "perplexity", "perplexity_ratio", "same_top"):
        estimate = getattr(result, name)
        out[name] = estimate.value
        out[f"{name}_error"] = estimate.standard_error or 0.0
    return out


def main() -> None:
    """Run the parts that were asked for, each into its own file of `results/`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="for --part presets")
    parser.add_argument(
        "--budget", type=float, choices=BUDGETS_MB, action="append", help="in MB, for some parts"
    )
    parser.add_argument(
        "--work", type=Path, help="work directory to use and keep (a temporary one by default)"
    )
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="quantlib-bench-"))
    try:
        bench = Bench(options.work or scratch / "work")
        names = options.preset or tuple(PRESETS)
        sizes = options.budget or BUDGETS_MB

        def at_budgets(name: str, targets: Sequence[float], **recipe: Any) -> dict[str, Any]:
            return budgets(bench, scratch, name, targets, sizes, **recipe)

        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "presets": lambda: presets(bench, scratch, names),
            "budgets": lambda: at_budgets("budgets", TARGET_KL),
            "rows": lambda: at_budgets("rows", TARGET_KL, rows=True, probes=0),
            "refined": lambda: at_budgets("refined", TARGET_REFINED, refine=True),
            "refined_rows": lambda: at_budgets(
                "refined_rows", TARGET_REFINED, refine=True, rows=True, probes=0
            ),
            "baselines": lambda: baselines(bench),
            "prediction": lambda: prediction(bench),
            "refinement": lambda: after_solving(bench, scratch, REFINED),
            "swaps": lambda: after_solving(bench, scratch, SWAPPED),
        }
        for part in options.part or PARTS:
            print(record.write(f"quality_{part}", parts[part]()))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
