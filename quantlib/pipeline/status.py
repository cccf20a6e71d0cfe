"""How far a run is: what a continued run says before it goes on."""

from __future__ import annotations

from quantlib.pipeline.calibrate import calibrated_groups
from quantlib.pipeline.measure import measured_groups
from quantlib.pipeline.run import Run


def already_there(run: Run) -> str:
    """`statistics and 84 of 121 groups`; empty when nothing of this run was done before."""
    total = len(run.model_map.groups)
    calibrated, wanted = calibrated_groups(run)
    measured = measured_groups(run)
    parts = []
    if calibrated:
        whole = calibrated == wanted
        units = "groups" if run.workload is None else "streams"
        parts.append("statistics" if whole else f"statistics of {calibrated} of {wanted} {units}")
    elif _began_calibration(run):
        parts.append("the beginning of the calibration")
    if measured:
        parts.append(f"{measured} of {total} groups")
    return " and ".join(parts)


def _began_calibration(run: Run) -> bool:
    mine = f"hidden/{run.statistics_hash[:12]}."
    return any(name.startswith(mine) for unit in run.work.units("hidden") for name in unit.files)
