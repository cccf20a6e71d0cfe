"""Swap search: exchanges of bytes between weights, judged on true KL with weights substituted from
the bank.

Every trial is remembered in the work directory (`dense.Trials`), so a search that was killed walks
through its trials again in no time and goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantlib.checkpoint.disk import atomic_write_json
from quantlib.pipeline.dense import Trials, measured_kl
from quantlib.pipeline.run import Run
from quantlib.search.plan import Plan
from quantlib.search.problem import Problem
from quantlib.search.refine import Refined, refine

TRIALS_FILE = "swaps.json"


def swap(run: Run, plan: Plan, problem: Problem) -> Refined:
    """Try `recipe.swaps` exchanges on the probe windows; the trials are written to the work
    directory."""
    trials = Trials(run)
    with run.stage("swap", run.recipe.swaps + 1) as progress:

        def evaluate(candidate: Plan) -> Sequence[float]:
            result = trials.measure(candidate.schemes)
            progress.tick(f"KL {measured_kl(result).value:.4f}")
            return result.per_window["kl"]

        generator = torch.Generator().manual_seed(run.recipe.seed)
        found = refine(plan, problem, evaluate, run.recipe.swaps, generator)
    atomic_write_json(run.work.path / TRIALS_FILE, [row.to_dict() for row in found.trials])
    return found
