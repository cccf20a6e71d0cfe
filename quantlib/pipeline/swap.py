"""Swap search: exchanges of bytes between weights, judged on true KL with weights substituted from the bank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantlib.checkpoint.disk import atomic_write_json
from quantlib.pipeline.dense import DenseTrial
from quantlib.pipeline.run import Run
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem
from quantlib.search.refine import Refined, refine

TRIALS_FILE = "swaps.json"


def swap(run: Run, plan: Plan, problem: Problem) -> Refined:
    """Try `recipe.swaps` exchanges on the probe windows; the trials are written to the work directory."""
    with run.stage("swap", run.recipe.swaps + 1) as progress:
        trial = DenseTrial(run)

        def evaluate(candidate: Plan) -> Sequence[float]:
            per_window = trial.measure(candidate.schemes).per_window["kl"]
            progress.tick(f"KL {sum(per_window) / len(per_window):.4f}")
            return per_window

        generator = torch.Generator().manual_seed(run.recipe.seed)
        found = refine(plan, problem, evaluate, run.recipe.swaps, generator)
    atomic_write_json(run.work.path / TRIALS_FILE, [row.to_dict() for row in found.trials])
    return found
