"""What the work directory beside a checkpoint (`OUT.work`) knows of it: records it can be judged on
where nobody gives others, and what its parts are predicted to lose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantlib.calibration.records import is_records
from quantlib.checkpoint.writer import PLAN_FILE
from quantlib.errors import QuantlibError, UsageError
from quantlib.pipeline import workfiles
from quantlib.pipeline.compress import default_work
from quantlib.pipeline.opening import reopen_run
from quantlib.pipeline.shares import Shares, load_shares
from quantlib.report.task_rows import component_rows


@dataclass(frozen=True)
class HeldBack:
    """data: a file of records. chosen: the `Record.where` of those in it that no stream of the
    calibration has seen."""

    data: str
    chosen: frozenset[str]


def held_back(out: Path, against: Path | None = None) -> HeldBack:
    """The records that were held back when the checkpoint `out` was made. The search has seen what
    plans lose on them, so records of one's own are the better judges.

    against: where its model lies now; where it was measured, by default. Raises UsageError, which
    asks for --data, when the work directory is not there, cannot be used, or is of a model that was
    calibrated on text.
    """
    try:
        with reopen_run(default_work(out), model=against, with_data=True, reading=True) as run:
            data, workload = run.recipe.data, run.workload
    except QuantlibError as error:
        raise UsageError(
            "--data is missing, and which records calibration held back is not known "
            f"({error}): give a .jsonl file of records with --data"
        ) from error
    if workload is None or not is_records(data):
        raise UsageError(
            f"--data is missing, and {out} was calibrated on text, of which nothing is held back "
            "for this: give a text that it has not seen with --data"
        )
    chosen = [record.where for records in workload.held_back.values() for record in records]
    return HeldBack(data, frozenset(chosen))


def component_losses(out: Path) -> dict[str, dict[str, float]]:
    """Component -> task -> what the checkpoint `out` is predicted to lose by it, in nats (KL) of a
    single task, as a fraction of the full-precision loss of each of several.

    Raises a QuantlibError when the work directory is not there, or is of another checkpoint.
    """
    work = default_work(out)
    known = workfiles.load_model(work)
    table = workfiles.load_table(work, known.model_map)
    plan = workfiles.load_plan(out / PLAN_FILE, known.model_map, table)
    rows = component_rows(known.model_map, plan, table)
    return {row.name: dict(row.losses) for row in rows if row.losses}


def component_decisions(out: Path) -> dict[str, Shares]:
    """Component -> whose calibration data decided how it was rounded; {} of a model that was
    calibrated on text alone, and where there is no work directory beside the checkpoint `out`.

    Raises CheckpointError for a damaged file.
    """
    return load_shares(default_work(out))
