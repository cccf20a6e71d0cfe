"""The apply stage: a plan becomes a packed checkpoint, assembled from the layer bank.

Nothing is rounded here: the tensors that were measured are the tensors that ship. With `refine` the plan is first re-rounded
block by block (`reround.py`); whichever of the two loses less on held-back windows is assembled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quantlib.checkpoint.provenance import digest
from quantlib.checkpoint.tensorfile import LazyTensor
from quantlib.checkpoint.workdir import WorkDir
from quantlib.checkpoint.writer import PLAN_FILE, source_files, write_checkpoint
from quantlib.errors import CheckpointError
from quantlib.evaluation.language import LanguageResult
from quantlib.pipeline.dense import DenseTrial
from quantlib.pipeline.measure import entry_key
from quantlib.pipeline.reround import reround, reround_inputs
from quantlib.pipeline.run import Run
from quantlib.search.plan import Plan

COMPARISON = "refined"


@dataclass(frozen=True)
class Refinement:
    """A plan on held-back windows, assembled from the bank and re-rounded; `kept` says whether the latter ships."""

    bank: LanguageResult
    refined: LanguageResult

    @property
    def bank_kl(self) -> float:
        return _kl(self.bank)

    @property
    def refined_kl(self) -> float:
        return _kl(self.refined)

    @property
    def kept(self) -> bool:
        return self.refined_kl < self.bank_kl

    @property
    def shipped(self) -> LanguageResult:
        """The evaluation of what the checkpoint holds."""
        return self.refined if self.kept else self.bank


def _kl(result: LanguageResult) -> float:
    if result.kl is None:
        raise CheckpointError("a plan was measured without a reference model: delete the work directory's journal")
    return result.kl.value


def apply(
    run: Run, plan: Plan, out: str | Path, *, refine: bool, overwrite: bool = False
) -> tuple[Path, Refinement | None]:
    """Write the checkpoint of `plan` to `out`. Returns its folder, and what refinement gave when it was asked for."""
    plan.check(run.source.fingerprint, run.model_map.weights)
    keys = {name: entry_key(run, name, scheme) for name, scheme in plan.schemes.items()}
    refinement = None
    if refine:
        better, refinement = _refined(run, plan)
        keys |= better
    with run.stage("write", 1) as progress:
        path = write_checkpoint(
            out,
            checkpoint_tensors(run, keys),
            run.source.config,
            plan.schemes,
            {weight.name: weight.shape for weight in run.model_map.weights},
            files={**source_files(run.source.path), PLAN_FILE: plan.to_json().encode()},
            provenance={"source": run.source_hash, "recipe": run.recipe.model_dump(mode="json", exclude={"data"})},
            identity=digest([run.source_hash, keys]),
            overwrite=overwrite,
        )
        progress.tick(str(path))
    return path, refinement


def checkpoint_tensors(run: Run, keys: Mapping[str, str]) -> dict[str, Tensor | LazyTensor]:
    """Every tensor of the checkpoint by name: packed weights from the bank, kept parameters from the source."""
    tensors: dict[str, Tensor | LazyTensor] = {}
    for name, key in keys.items():
        tensors |= {name + suffix: value for suffix, value in run.bank.lazy(key).items()}
    for row in run.model_map.kept:
        tensors[row.name] = run.source.read(row.name)
    return dict(sorted(tensors.items()))


def _refined(run: Run, plan: Plan) -> tuple[dict[str, str], Refinement]:
    """Bank keys of the re-rounded weights if they are better (else none), and the comparison. Remembered in the journal."""
    keys = reround(run, plan.schemes)
    unit = WorkDir.key(COMPARISON, inputs=reround_inputs(run, plan.schemes), windows=digest(run.probe_windows.tolist()))
    if not run.work.has(unit):
        with run.stage("compare", 2) as progress:
            trial = DenseTrial(run)
            results = {}
            for label, chosen in (("bank", {}), ("refined", keys)):
                results[label] = trial.measure(plan.schemes, chosen).to_json()
                progress.tick(label)
            run.work.commit(unit, COMPARISON, {}, results)
    values = run.work.unit(unit).values
    refinement = Refinement(*(LanguageResult.from_json(values[label]) for label in ("bank", "refined")))
    return (keys if refinement.kept else {}), refinement
