"""What proxies know of a model's layers (`search.proxies`), read off the statistics that
calibration left, and kept beside them.

    layers.json        statistics of every weight in a few numbers, for every task

Nothing is rounded and no model runs: the weights are read once, a group at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantlib.calibration.statistics import EmbeddingStatistics, GroupStatistics
from quantlib.checkpoint.disk import atomic_write_text
from quantlib.models.rows import LinearGroup, Weight
from quantlib.pipeline import parts
from quantlib.pipeline.calibrate import embedding_statistics
from quantlib.pipeline.measure import ordered_statistics, ordered_weight
from quantlib.pipeline.opening import reopen_run
from quantlib.pipeline.plan import TASK
from quantlib.pipeline.run import Progress, Run
from quantlib.search import jsonfile
from quantlib.search.proxies import Layers, Use, layer_row, read_score, rescored
from quantlib.search.sensitivity import Sensitivity

LAYERS_FILE = "layers.json"


def layers_of(run: Run) -> Layers:
    """The statistics of every weight of a calibrated run."""
    groups = run.model_map.groups
    order = {weight.name: index for index, weight in enumerate(run.model_map.weights)}
    rows: dict[str, dict[str, dict[str, float]]] = {task: {} for task in run.tasks}
    with run.stage("layers", len(groups)) as progress:
        for group in groups:
            for task, name, uses in _uses(run, group):
                matrices = ordered_weight(run, name)
                stacked = matrices if matrices.dim() == 3 else matrices[None]
                depth = order[name] / max(1, len(order) - 1)
                rows[task][name] = layer_row(list(zip(stacked, uses, strict=True)), depth)
            progress.tick(group.name)
    ordered = {task: {name: found[name] for name in order} for task, found in rows.items()}
    return Layers(run.model_map.fingerprint, ordered, {"statistics": run.statistics_hash})


def load_layers(work: Path, table: Sensitivity, progress: Progress | None = None) -> Layers:
    """The layers' statistics of a work directory, made first if they are not there, or of other
    calibration. Raises as `reopen_run` where they have to be made."""
    file = work / LAYERS_FILE
    wanted = table.provenance.get("statistics")
    if file.exists():
        found = Layers.from_json(jsonfile.read_text(file, "layers' statistics"), str(file))
        if found.model == table.model and found.provenance.get("statistics") == wanted:
            return found
    with reopen_run(work, with_data=True, progress=progress) as run:
        made = layers_of(run)
    atomic_write_text(file, made.to_json())
    return made


def scored_by(
    score: str, work: Path, table: Sensitivity, progress: Progress | None = None
) -> Sensitivity:
    """The table of a work directory with the losses that a score predicts (`proxies.read_score`):
    as it is for "measured"."""
    expression = read_score(score)
    if expression is None:
        return table
    return rescored(table, load_layers(work, table, progress), expression)


Uses = list[list[Use]]
"""Of a weight: for every matrix, each use that is made of it."""


def _uses(run: Run, group: LinearGroup) -> list[tuple[str, str, Uses]]:
    """(task, weight, uses) of a group's members in every task."""
    members = [run.model_map.weight(name) for name in group.members]
    if group.kind in ("embedding", "head"):
        found: Mapping[str, EmbeddingStatistics] = (
            {TASK: embedding_statistics(run)}
            if run.workload is None
            else parts.embedding_parts(run, group.name)
        )
        return [(t, w.name, [_embedding_uses(w, s)]) for t, s in found.items() for w in members]
    if run.workload is None:
        of_text = ordered_statistics(run, group)
        return [(TASK, w.name, _linear_uses(w, of_text, run.windows.numel())) for w in members]
    streams = parts.group_parts(run, group.name)
    return [
        (task, weight.name, _linear_uses(weight, own, parts.summary(run, task).terms))
        for task, own in streams.items()
        for weight in members
    ]


def _linear_uses(weight: Weight, statistics: GroupStatistics, terms: int) -> Uses:
    """As `scoring` prices them: per term of the task's loss. A matrix that the task never runs has
    inputs of zero."""
    rows, columns = weight.shape[-2:]
    found = []
    for matrix in statistics.matrices:
        share = matrix.tokens / terms
        fisher = matrix.fisher.get(weight.name)
        hessian = matrix.hessian if len(matrix.hessian) else torch.zeros(columns, columns)
        found.append([Use(hessian, (torch.ones(rows) if fisher is None else fisher) * share)])
    return found


def _embedding_uses(weight: Weight, statistics: EmbeddingStatistics) -> list[Use]:
    """As a head, and as a table that is looked up (`search.scores.embedding_score`)."""
    found = []
    if weight.kind == "head" or weight.head is not None:
        found.append(Use(statistics.head_input, statistics.variance))
    if weight.kind == "embedding":
        lookups: Tensor = statistics.frequency / max(statistics.tokens, 1)
        found.append(Use(torch.diag(statistics.gradient), lookups))
    return found
