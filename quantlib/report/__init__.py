"""The HTML report: one self-contained file that shows what was decided, why, and how well it
went."""

from quantlib.report.data import (
    ComponentRow,
    FrontPoint,
    MeasuredPoint,
    ProbePoint,
    ReportData,
    SensitivityMap,
    WeightRow,
)
from quantlib.report.render import render, write_report

__all__ = [
    "ComponentRow",
    "FrontPoint",
    "MeasuredPoint",
    "ProbePoint",
    "ReportData",
    "SensitivityMap",
    "WeightRow",
    "render",
    "write_report",
]
