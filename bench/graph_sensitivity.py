"""The part `prediction` of `bench.graph`: sensitivities that were not measured, by sampled rows, by
ridge regression and by the graph network, against those that were.

    table     every method's table of SmolLM2 beside the measured one: rank correlations over the
              entries that were predicted (all of them; and the mean over schemes of those within
              one), the median error, the seconds, and what its plans lose in truth
    transfer  ridge and network, taught on SmolLM2 alone, on another model: `graph_transfer.py`

Seconds are those of the processor, so that other work on the machine does not count: run this on
one thread. Those of measuring everything are of rounding one block and an eighth of the embedding's
rows, taken here and multiplied (scoring, which is left out, takes a sixth of that again).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantlib.bench.graph_model import Bench
from quantlib.bench.graph_transfer import compared, transfer_row
from quantlib.checkpoint.provenance import digest
from quantlib.evaluation.language import LanguageResult
from quantlib.evaluation.reference import reference_logprobs
from quantlib.models.rows import LinearGroup
from quantlib.pipeline import measure, predict
from quantlib.pipeline.calibrate import embedding_statistics
from quantlib.pipeline.dense import DenseTrial
from quantlib.pipeline.plan import Budget, allocation_problem
from quantlib.pipeline.run import Run
from quantlib.rounding import RoundingOptions, round_group
from quantlib.search.predict import Example, Ridge
from quantlib.search.predict_graph import Taught, teach
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.solve import solve

BUDGETS_MB = (69.6, 82.8)
"""Of the whole checkpoint."""
EMBEDDING_PART = 8
METHODS = ("ridge", "graph", "rows")
Losses = Mapping[str, Mapping[str, tuple[float, float]]]
Trial = Callable[[Mapping[str, str]], LanguageResult]
"""Weight -> scheme to what that plan loses."""


def prediction_rows(bench: Bench) -> None:
    """The part `prediction`. The bank must hold everything, or it is measured now."""
    run = bench.run
    truth = measure.measure(run)
    done = bench.rows.setdefault("prediction", {})
    if "full" not in done:
        bench.keep("prediction", "full", full_seconds(run))
    for method in METHODS:
        if method not in done:
            losses, seconds = predicted(run, method, done["full"])
            row = {**agreement(truth, losses), "seconds": round(seconds, 1)}
            row["times_faster"] = round(done["full"]["seconds"] / seconds, 2)
            chosen = plans(run, with_losses(truth, losses))
            bench.keep("chosen", method, chosen)
            row["table_loss_ratio"] = loss_ratios(run, truth, chosen)
            bench.keep("prediction", method, row)
    if any("kl" not in done[method] for method in METHODS):
        trial, best = held_out_trial(bench), plans(run, truth)
        for method in METHODS:
            if "kl" not in done[method]:
                found = kl_of_plans(trial, best, bench.rows["chosen"][method])
                bench.keep("prediction", method, {**done[method], "kl": found})
    if "transfer" not in done:
        examples = known_examples(run)
        models = {method: learned(examples, method) for method in ("ridge", "graph")}
        schemes = run.candidates[next(iter(examples))]
        bench.keep("prediction", "transfer", transfer_row(models, schemes))


def full_seconds(run: Run) -> dict[str, Any]:
    """Seconds of measuring everything, by kind of group."""
    blocks = run.model_map.blocks
    found: dict[str, float] = {}
    options = RoundingOptions(run.damping, run.recipe.passes)
    for group in run.model_map.groups_in(blocks[len(blocks) // 2]):
        hessian = measure.ordered_statistics(run, group).matrices[0].hessian
        weights = {name: measure.ordered_weight(run, name) for name in group.members}
        schemes = run.candidates[group.members[0]]
        started = time.process_time()
        round_group(weights, hessian, [s.segments(len(hessian)) for s in schemes], options)
        found[place(group)] = time.process_time() - started
    embedding = next(w for w in run.model_map.weights if w.kind == "embedding")
    statistics = embedding_statistics(run)
    rows = run.source.read(embedding.name).float()
    part = rows[: len(rows) // EMBEDDING_PART]
    layouts = [scheme.segments(embedding.in_features) for scheme in run.candidates[embedding.name]]
    started = time.process_time()
    hessian = measure.embedding_hessian(statistics, True, True)
    round_group({"": part}, hessian, layouts, options)
    found["embedding"] = EMBEDDING_PART * (time.process_time() - started)
    linears = sum(seconds for name, seconds in found.items() if name != "embedding")
    return {"seconds": len(blocks) * linears + found["embedding"], "by_place": found}


def place(group: LinearGroup) -> str:
    """Of a group in its block."""
    return group.name.removeprefix(f"{group.block}.")


def predicted(run: Run, method: str, full: Mapping[str, Any]) -> tuple[Losses, float]:
    """Weight -> scheme -> loss of what a method does not measure, and the seconds that it takes
    with what it measures."""
    linear = [group for group in run.model_map.groups if group.kind == "linear"]
    others = [group for group in run.model_map.groups if group.kind != "linear"]
    losses: dict[str, predict.Scores] = {}
    started = time.process_time()
    for group in others:
        losses |= predict.by_rows(run, group)
    if method == "rows":
        for group in linear:
            losses |= predict.by_rows(run, group)
        return losses, time.process_time() - started
    known = predict.spread_over(linear, predict.SHARE)
    measured = sum(full["by_place"][place(group)] for group in known)
    model = learned(known_examples(run), method)
    for group in linear:
        if group not in known:
            for name, graph in predict.graphs(run, group).items():
                pairs = zip(run.candidates[name], model.predict(graph).tolist(), strict=True)
                losses[name] = {str(scheme): (loss, 0.0) for scheme, loss in pairs}
    return losses, measured + time.process_time() - started


def known_examples(run: Run) -> dict[str, Example]:
    """The measured weights that are learned from."""
    linear = [group for group in run.model_map.groups if group.kind == "linear"]
    found = {}
    for group in predict.spread_over(linear, predict.SHARE):
        for name, graph in predict.graphs(run, group).items():
            entries = [
                run.bank.entry(measure.entry_key(run, name, str(scheme)))
                for scheme in run.candidates[name]
            ]
            losses = torch.tensor([one.extra["loss"] for one in entries], dtype=torch.float64)
            found[name] = Example(graph, losses)
    return found


def learned(examples: dict[str, Example], method: str) -> Ridge | Taught:
    """What a method learns."""
    return Ridge.fit(examples) if method == "ridge" else teach(examples)


def agreement(truth: Sensitivity, losses: Losses) -> dict[str, Any]:
    """How near predictions are, over all entries that were predicted."""
    pairs = {
        (name, scheme): (pair[0], truth.entry(name, scheme).loss["kl"])
        for name, own in losses.items()
        for scheme, pair in own.items()
    }
    return {"weights": len(losses), **compared(pairs)}


def held_out_trial(bench: Bench) -> Trial:
    """What measures a plan on the held-out windows, from the bank, each plan once."""
    trial = DenseTrial(bench.run)
    trial.windows = bench.windows
    trial.reference = reference_logprobs(trial.model, bench.windows)
    known: dict[str, LanguageResult] = {}

    def measured(plan: Mapping[str, str]) -> LanguageResult:
        key = digest(dict(plan))
        if key not in known:
            known[key] = trial.measure(plan)
        return known[key]

    return measured


def plans(run: Run, table: Sensitivity) -> dict[str, dict[str, str]]:
    """Budget in MB -> the plan that is best by a table."""
    found = {}
    for size in BUDGETS_MB:
        budget = Budget(size=f"{size}MB")
        problem = allocation_problem(run.model_map, table, budget)
        picks = solve(problem, budget.in_bytes(run.model_map)).picks
        found[str(size)] = problem.schemes(picks)
    return found


def loss_ratios(
    run: Run, truth: Sensitivity, chosen: Mapping[str, Mapping[str, str]]
) -> dict[str, float]:
    """Budget -> what a plan from predictions loses by the measured table, over the least."""
    problem = allocation_problem(run.model_map, truth, Budget())
    best = plans(run, truth)
    return {
        size: problem.loss(problem.picks(plan)) / problem.loss(problem.picks(best[size]))
        for size, plan in chosen.items()
    }


def kl_of_plans(
    trial: Trial, best: Mapping[str, Mapping[str, str]], chosen: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """True KL of plans from predictions and from measurements, with paired errors."""
    found = []
    for size, plan in chosen.items():
        theirs, ours = (torch.tensor(trial(one).per_window["kl"]) for one in (best[size], plan))
        found.append(
            {
                "budget_mb": float(size),
                "measured_plan": float(theirs.mean()),
                "predicted_plan": float(ours.mean()),
                "ratio": float(ours.sum() / theirs.sum()),
                "ratio_error": ratio_error(ours, theirs),
                "weights_that_differ": sum(best[size][name] != plan[name] for name in plan),
            }
        )
        print(found[-1], flush=True)
    return found


def ratio_error(ours: Tensor, theirs: Tensor) -> float:
    """Standard error of sum(ours) / sum(theirs), of paired windows."""
    ratio = ours.sum() / theirs.sum()
    missed = ours - ratio * theirs
    return float(missed.std() * len(ours) ** 0.5 / theirs.sum())


def with_losses(truth: Sensitivity, losses: Losses) -> Sensitivity:
    """The table with these losses in place of the measured ones."""
    rows = {
        name: {
            scheme: replace(entry, loss={"kl": losses[name][scheme][0]})
            if name in losses
            else entry
            for scheme, entry in row.items()
        }
        for name, row in truth.rows.items()
    }
    return replace(truth, rows=rows)
