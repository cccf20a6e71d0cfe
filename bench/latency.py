"""Do latency budgets hold? Five plans of one model for five budgets, predicted and measured.

    python -P -m quantlib.bench.latency                  measure the model first, with preset fast
    python -P -m quantlib.bench.latency --work WORK      use a work directory of SmolLM2 that exists

SmolLM2-135M-Instruct (the permuted copy of `bench.assets`). The budgets lie evenly between the
fastest plan and the one that loses least, in milliseconds a decoded token; each plan is searched
for within its budget, written as a packed checkpoint, loaded as a user would, and timed in turns
with the other four; what predictions rest on is measured in the same run. A prompt's latency is
predicted and measured on the same plans. `error` is measured / predicted - 1. `drift_free_error` is
the same against a prediction whose fixed part and factor come from the three random models timed in
the very rounds of the plans: memory is not as fast every minute on a machine that others share.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantlib.bench import assets, record
from quantlib.kernels.cpu.engine_library import MODES, Decoder
from quantlib.pipeline import workfiles
from quantlib.pipeline.apply import apply
from quantlib.pipeline.compress import measured_table, open_run, reopen_run
from quantlib.pipeline.latency import costs_for, reference_models
from quantlib.pipeline.plan import Budget, search
from quantlib.recipe import Recipe
from quantlib.runtime.load import load
from quantlib.runtime.stopwatch import Fit, latencies
from quantlib.search.infeasible import least_cost
from quantlib.search.latency import LatencyBudget, LatencyCosts
from quantlib.search.plan import Plan

CONTEXT, PROMPT = 256, 512
DECODE, PREFILL = f"decode_ms@{CONTEXT}", f"prefill_ms@{PROMPT}"
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Budgets, as shares of the way from the fastest plan to the best one."""
GENEROUS = 1e6
"""Milliseconds that limit nothing."""


class Said:
    """Progress as lines."""

    def start(self, stage: str, total: int) -> None:
        if total:
            print(f"{stage}: {total} steps", flush=True)

    def tick(self, message: str = "") -> None: ...

    def finish(self) -> None: ...

    def say(self, message: str) -> None:
        print(message, flush=True)


def measure_model(work: Path) -> None:
    """Leave a measured work directory of SmolLM2."""
    recipe = Recipe.create(data=str(assets.wikipedia_text("calibration")), preset="fast")
    with open_run(assets.fetch_smollm2(), work, recipe, progress=Said()) as run:
        measured_table(run)


def compare(work: Path, scratch: Path, threads: int, mode: str) -> dict[str, Any]:
    """Predict, make and time the five plans."""
    costs, plans = make_plans(work, threads, mode, scratch / "timings")
    models: dict[str, Decoder] = {}
    with reopen_run(work, progress=Said()) as run:
        for name, plan in plans.items():
            path, _ = apply(run, plan, scratch / name, refine=False)
            models[name] = load(path, mode=mode).decoder
        drawn = reference_models(
            run.model_map, run.source.path, _candidates(work), mode, run.recipe
        )
    references = {f"random {index}": model for index, (_, model) in enumerate(drawn)}
    measured = latencies(models | references, (DECODE, PREFILL), mode, threads)
    fit = Fit.through(
        [_products(costs, schemes) for schemes, _ in drawn],
        [measured[name][DECODE] for name in references],
    )
    rows = [_row(plan, costs, fit, measured[name]) for name, plan in plans.items()]
    for row in rows:
        print(
            f"{row['limit_ms']:.2f} ms allowed, {row['predicted_ms']:.2f} predicted, "
            f"{row['measured_ms']:.2f} measured ({row['error']:+.1%}; "
            f"{row['drift_free_error']:+.1%} without drift); "
            f"prompt {row['prompt_predicted_ms']:.0f} and {row['prompt_measured_ms']:.0f} ms"
        )
    worst = {name: max(abs(row[name]) for row in rows) for name in ("error", "drift_free_error")}
    print(f"worst error {worst['error']:.1%}, {worst['drift_free_error']:.1%} without drift")
    return {
        "model": "SmolLM2-135M-Instruct",
        "threads": threads,
        "mode": mode,
        "context": CONTEXT,
        "prompt": PROMPT,
        "timed_on": costs.machine,
        "fixed_ms": dict(costs.fixed),
        "worst_error": worst["error"],
        "worst_drift_free_error": worst["drift_free_error"],
        "rows": rows,
    }


def _candidates(work: Path) -> dict[str, list[str]]:
    known = workfiles.load_model(work)
    table = workfiles.load_table(work, known.model_map)
    return {weight: list(row) for weight, row in table.rows.items()}


def _products(costs: LatencyCosts, schemes: Mapping[str, str]) -> float:
    """Milliseconds of a decoded token that schemes decide."""
    prices = costs.costs[DECODE]
    return sum(prices.get(pair, 0.0) for pair in schemes.items())


def make_plans(
    work: Path, threads: int, mode: str, timings: Path
) -> tuple[LatencyCosts, dict[str, Plan]]:
    """The costs on this machine, and the best plan within each of the five budgets.

    timings: an empty folder, so that all is measured now: a machine is not as fast every hour.
    """
    known = workfiles.load_model(work)
    table = workfiles.load_table(work, known.model_map)
    schemes = _candidates(work)

    def budget(ms: float) -> LatencyBudget:
        return LatencyBudget((f"decode={ms:f}ms@{CONTEXT}",), threads, mode)

    both = LatencyBudget((f"decode=1s@{CONTEXT}", f"prefill=1s@{PROMPT}"), threads, mode)
    recipe = workfiles.load_recipe(work)
    costs = costs_for(known.model_map, known.path, schemes, both, Said(), recipe, timings)
    assert costs is not None
    best, problem, _ = search(known.model_map, table, Budget(latency=budget(GENEROUS)), costs)
    low, high = least_cost(problem, DECODE), best.predicted[DECODE]
    plans = {}
    for share in SHARES:
        ms = low + share * (high - low)
        plans[f"plan-{share:.0%}"] = search(
            known.model_map, table, Budget(latency=budget(ms)), costs
        )[0]
    return costs, plans


def _row(
    plan: Plan, costs: LatencyCosts, fit: Fit, measured: Mapping[str, float]
) -> dict[str, Any]:
    prompt = costs.predict(PREFILL, plan.schemes)
    predicted = plan.predicted[DECODE]
    drift_free = fit.fixed + fit.factor * _products(costs, plan.schemes)
    return {
        "limit_ms": plan.limits[DECODE],
        "bytes": plan.bytes,
        "kl_predicted": plan.predicted.get("kl"),
        "predicted_ms": predicted,
        "measured_ms": measured[DECODE],
        "error": measured[DECODE] / predicted - 1,
        "drift_free_error": measured[DECODE] / drift_free - 1,
        "prompt_predicted_ms": prompt,
        "prompt_measured_ms": measured[PREFILL],
    }


def main() -> None:
    """Compare, and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="work directory of SmolLM2 to use and keep")
    parser.add_argument("--mode", default="int8", choices=MODES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="quantlib-bench-"))
    try:
        work = options.work or scratch / "work"
        if not (work / workfiles.SENSITIVITY_FILE).exists():
            measure_model(work)
        print(record.write("latency", compare(work, scratch, options.threads, options.mode)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
