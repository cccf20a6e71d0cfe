"""The apply stage: a plan becomes a packed checkpoint, assembled from the layer bank.

The tensors that were measured are the tensors that ship; what a predicted table left unrounded
(`predict.py`) is rounded first. With `refine` the plan is first re-rounded block by block
(`reround.py`, of models that are run as a whole `reround_whole.py`); whichever of the two loses
less on held-back windows or records is assembled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.checkpoint.contents import MAP_FILE, map_bytes
from quantlib.checkpoint.provenance import digest, file_sha256
from quantlib.checkpoint.tensorfile import LazyTensor
from quantlib.checkpoint.writer import PLAN_FILE, source_files, write_checkpoint
from quantlib.errors import CheckpointError, UsageError
from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.language import LanguageResult
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import ORDER
from quantlib.models.headers import TORCH_DTYPES
from quantlib.models.modelmap import ModelMap
from quantlib.pipeline.dense import Trials, measured_kl, plan_keys
from quantlib.pipeline.inputs import bank_clips, cache_settings
from quantlib.pipeline.measure import measure_plan
from quantlib.pipeline.modalities import cache_formats, cache_scales, integer_operators
from quantlib.pipeline.parts import baseline
from quantlib.pipeline.predict import KIND
from quantlib.pipeline.reround import reround
from quantlib.pipeline.reround_whole import reround_whole
from quantlib.pipeline.rotate import online_rotation
from quantlib.pipeline.row_blocks import keep_mixtures
from quantlib.pipeline.run import Run
from quantlib.pipeline.task_trials import CLOSE_NUMBERS, TaskTrials
from quantlib.pipeline.whole import check_refined_whole
from quantlib.search.left import keeping_left
from quantlib.search.plan import Plan
from quantlib.search.tasks import Objective


@dataclass(frozen=True)
class Refinement:
    """A plan on held-back windows, assembled from the bank and re-rounded; `kept` says whether the
    latter ships."""

    bank: LanguageResult
    refined: LanguageResult

    @property
    def bank_kl(self) -> float:
        return measured_kl(self.bank).value

    @property
    def refined_kl(self) -> float:
        return measured_kl(self.refined).value

    @property
    def kept(self) -> bool:
        return self.refined_kl < self.bank_kl

    @property
    def shipped(self) -> LanguageResult:
        """The evaluation of what the checkpoint holds."""
        return self.refined if self.kept else self.bank


@dataclass(frozen=True)
class TaskRefinement:
    """The same of a model that is run as a whole: task -> divergence per term on held-back records.

    bank_value, refined_value: what these are together, as the plan's objective combines them.
    """

    bank: Mapping[str, Estimate]
    refined: Mapping[str, Estimate]
    bank_value: float
    refined_value: float

    @staticmethod
    def of(
        bank: Mapping[str, Estimate],
        refined: Mapping[str, Estimate],
        objective: Objective,
        baseline: Mapping[str, float],
    ) -> TaskRefinement:
        """baseline: task -> full-precision loss."""
        values = (
            objective.value({task: loss.value for task, loss in losses.items()}, baseline)
            for losses in (bank, refined)
        )
        return TaskRefinement(bank, refined, *values)

    @property
    def kept(self) -> bool:
        return self.refined_value < self.bank_value

    @property
    def shipped(self) -> Mapping[str, Estimate]:
        """What the checkpoint loses."""
        return self.refined if self.kept else self.bank

    def to_json(self) -> dict[str, Any]:
        """Of what ships: task -> estimate, and the losses before where that was rounded again."""
        found: dict[str, Any] = {"tasks": {t: vars(loss) for t, loss in self.shipped.items()}}
        if self.kept:
            found["before"] = {task: vars(loss) for task, loss in self.bank.items()}
        return found


def apply(
    run: Run, plan: Plan, out: str | Path, *, refine: bool, overwrite: bool = False
) -> tuple[Path, Refinement | TaskRefinement | None]:
    """Write the checkpoint of `plan` to `out`.

    Returns its folder, and what refinement gave when it was asked for. Raises SearchError for a
    plan of another model, CheckpointError when the bank lacks an entry or `out` cannot be written.
    """
    plan.check(run.model_map.fingerprint, run.model_map.weights, run.model_map.groups)
    if refine and run.workload is not None:
        check_refined_whole(run.recipe)
    _check_refinable(plan, refine, run.recipe.learning)
    keys = plan_keys(run, plan.schemes)
    if KIND in plan.provenance:
        measure_plan(run, plan.schemes)
    keep_mixtures(run, plan.schemes)
    _require_entries(run, plan, keys)
    refinement: Refinement | TaskRefinement | None = None
    if refine:
        whole = run.workload is not None
        better, refinement = _refined_whole(run, plan) if whole else _refined(run, plan)
        keys |= better
    model_map = keeping_left(run.model_map, plan)
    packed = {weight.name: plan.schemes[weight.name] for weight in model_map.weights}
    keys = {name: keys[name] for name in packed}
    small = source_files(run.source.path)
    plan_text = plan.to_json()
    recipe = run.recipe.model_dump(mode="json", exclude={"data"})
    hashes = {name: file_sha256(path) for name, path in small.items()}
    operators, kv, scales = integer_operators(run), cache_formats(run), cache_scales(run)
    with run.stage("write", 1) as progress:
        path = write_checkpoint(
            out,
            {**checkpoint_tensors(run, keys, model_map), **scales},
            run.source.config,
            packed,
            {weight.name: weight.shape for weight in model_map.weights},
            clips={name: clips for name, key in keys.items() if (clips := bank_clips(run, key))},
            rotation=online_rotation(run),
            caches=cache_settings(run),
            nonlinear=operators,
            kv=kv,
            files={**small, PLAN_FILE: plan_text.encode(), MAP_FILE: map_bytes(model_map)},
            provenance={"source": run.source_hash, "recipe": recipe},
            identity=digest([run.source_hash, recipe, plan_text, keys, hashes]),
            overwrite=overwrite,
        )
        progress.tick(str(path))
    return path, refinement


def _check_refinable(plan: Plan, refine: bool, learning: int) -> None:
    """Raise UsageError where weights are to be rounded again that have factors beside them, or
    whose codes are to be learned and are in blocks of rows."""
    factored = [n for n, s in plan.schemes.items() if Scheme.parse(s).low_rank is not None]
    if refine and factored:
        raise UsageError(
            f"re-rounding works on weights of one matrix, and {factored[0]} has factors beside it "
            f"({plan.schemes[factored[0]]}): leave out --refine"
        )
    blocked = [n for n, s in plan.schemes.items() if Scheme.parse(s).rows]
    if refine and learning and blocked:
        raise UsageError(
            f"learned rounding works on weights of one matrix, and {blocked[0]} is in blocks of "
            "rows: set learning to 0, or leave out --refine"
        )


def _require_entries(run: Run, plan: Plan, keys: Mapping[str, str]) -> None:
    """Raise CheckpointError when entries that the plan needs are missing or damaged.

    All are looked at, and the damaged ones dropped, so that one more run repairs them together.
    """
    bad = [name for name, key in keys.items() if not run.bank.verify(key)]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise CheckpointError(
            f"in the layer bank of {run.work.path}, {bad[0]} in {plan.schemes[bad[0]]}{more} are "
            "missing or damaged: run quantlib measure (or compress) again with the same options, "
            "it makes only those"
        )


def checkpoint_tensors(
    run: Run, keys: Mapping[str, str], model_map: ModelMap | None = None
) -> dict[str, LazyTensor]:
    """Every tensor of the checkpoint by name, read when it is written: packed weights from the bank
    (`keys`: weight -> bank key), kept parameters from the source.

    model_map: says what is kept, where that is more than the run's.
    """
    tensors: dict[str, LazyTensor] = {}
    for name, key in keys.items():
        tensors |= {name + suffix: value for suffix, value in run.bank.lazy(key).items()}
        if name in run.orders:
            tensors[name + ORDER] = LazyTensor.of(run.orders[name].to(torch.int32))
    for row in (model_map or run.model_map).kept:
        dtype = TORCH_DTYPES[row.dtype]
        read = partial(_read_kept, run, row.name, dtype)
        tensors[row.name] = LazyTensor(dtype, row.shape, read)
    return dict(sorted(tensors.items()))


def _read_kept(run: Run, name: str, dtype: torch.dtype) -> Tensor:
    """A kept parameter in the dtype it had on disk: a rotation computes biases in float32."""
    return run.source.read(name).to(dtype)


def _refined(run: Run, plan: Plan) -> tuple[dict[str, str], Refinement]:
    """Bank keys of the re-rounded weights if they are better (else none), and the comparison."""
    keys = reround(run, plan.schemes)
    trials = Trials(run)
    missing = [chosen for chosen in ({}, keys) if not trials.has(plan.schemes, chosen)]
    with run.stage("compare", len(missing)) as progress:
        for chosen in missing:
            trials.measure(plan.schemes, chosen)
            progress.tick("re-rounded" if chosen else "from the bank")
    refinement = Refinement(trials.measure(plan.schemes), trials.measure(plan.schemes, keys))
    return (keys if refinement.kept else {}), refinement


def _refined_whole(run: Run, plan: Plan) -> tuple[dict[str, str], TaskRefinement]:
    """The same of a model that is run as a whole."""
    keys = reround_whole(run, plan.schemes)
    trials = TaskTrials(run, CLOSE_NUMBERS)
    missing = [chosen for chosen in ({}, keys) if not trials.has(plan.schemes, chosen)]
    with run.stage("compare", len(missing)) as progress:
        for chosen in missing:
            trials.measure(plan.schemes, chosen)
            progress.tick("re-rounded" if chosen else "from the bank")
    refinement = TaskRefinement.of(
        trials.measure(plan.schemes),
        trials.measure(plan.schemes, keys),
        plan.objective,
        {task: baseline(run, task) for task in run.tasks},
    )
    return (keys if refinement.kept else {}), refinement
