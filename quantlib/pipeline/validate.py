"""Exchanges between weights judged on true KL (`search.refine`) by several processes at once.

    trials.log         every plan that was measured or waits, as a journal (`search.trials`)

Workers read the work directory beside the process that has it open, substitute weights from the
layer bank, and measure the windows that `--swaps` measures, too. Each computes with the same number
of threads, whatever their number, so the same plan is found.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantlib.calibration.data import windows_sha256
from quantlib.errors import UsageError
from quantlib.pipeline.dense import DenseTrial
from quantlib.pipeline.opening import reopen_run
from quantlib.pipeline.run import Progress, Run
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem
from quantlib.search.ray_trials import RayPool
from quantlib.search.refine import Refined, refine_in_rounds
from quantlib.search.trials import LocalPool, Measure, Pool, ProcessPool, Schemes, TrialJournal

TRIALS_FILE = "trials.log"
WIDTH = 8
"""Exchanges that are drawn before any of them is measured: a fixed number, as the result depends on
it, and must not on the number of workers."""
THREADS = 1
"""Of every worker."""


def validate(
    work: Path,
    plan: Plan,
    problem: Problem,
    trials: int,
    *,
    workers: int = 1,
    ray: str | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Try `trials` exchanges on a plan of the work directory `work`, `workers` at a time.

    ray: address of a Ray cluster whose workers measure. A plan that was measured before is not
    measured again. Raises UsageError for models that are not a language model alone.
    """
    with reopen_run(work, with_data=True, progress=progress) as run:
        if run.workload is not None:
            raise UsageError(
                "--validate measures KL on text, and this model has other parts too: leave it out"
            )
        generator = torch.Generator().manual_seed(run.recipe.seed)
        with (
            _pool(run, work, workers, ray) as pool,
            run.stage("validate", trials + 1) as stage,
        ):

            def evaluate(plans: Sequence[Plan]) -> list[list[float]]:
                found = pool.measure([one.schemes for one in plans])
                for losses in found:
                    stage.tick(f"KL {sum(losses) / len(losses):.4f}")
                return found

            return refine_in_rounds(plan, problem, evaluate, trials, generator, width=WIDTH)


def _pool(run: Run, work: Path, workers: int, ray: str | None) -> AbstractContextManager[Pool]:
    path = work / TRIALS_FILE
    journal = TrialJournal(path, settings(run))
    if ray is not None:
        return RayPool(journal, ray, workers, partial(opened, str(work.absolute())))
    if workers > 1:
        command = [sys.executable, "-P", "-m", "quantlib.pipeline.trial_worker", str(work)]
        return ProcessPool(journal, workers, lambda name: [*command, name])
    return nullcontext(LocalPool(journal, _as_workers(measure_in(run))))


def settings(run: Run) -> dict[str, Any]:
    """Everything that a trial's result depends on besides the plan."""
    return {
        "model": run.source_hash,
        "bank": run.rounding_hash,
        "windows": windows_sha256(run.probe_windows),
        "kv": run.recipe.kv,
        "threads": THREADS,
    }


def opened(work: str) -> Measure:
    """What measures plans in a process of its own, which it leaves with THREADS threads."""
    run = ExitStack().enter_context(reopen_run(work, with_data=True, reading=True))
    torch.set_num_threads(THREADS)
    return measure_in(run)


def measure_in(run: Run) -> Measure:
    """What measures plans of a run; the model is loaded with the first."""
    dense: list[DenseTrial] = []

    def measure(schemes: Schemes) -> list[float]:
        if not dense:
            dense.append(DenseTrial(run))
        return dense[0].measure(schemes).per_window["kl"]

    return measure


def _as_workers(measure: Measure) -> Measure:
    """In this process, with as many threads as a worker has."""

    def measured(schemes: Schemes) -> Sequence[float]:
        before = torch.get_num_threads()
        torch.set_num_threads(THREADS)
        try:
            return measure(schemes)
        finally:
            torch.set_num_threads(before)

    return measured
