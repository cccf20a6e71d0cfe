"""The HTML report: one self-contained file that shows what was decided, why, and how well it
went."""

from quantlib.report.data import (
    ComponentRow,
    FrontPoint,
    LatencyPoint,
    LatencyRow,
    MeasuredPoint,
    ProbePoint,
    ReportData,
    SensitivityMap,
    TradeOff,
    WeightRow,
)
from quantlib.report.render import render, write_report

__all__ = [
    "ComponentRow",
    "FrontPoint",
    "LatencyPoint",
    "LatencyRow",
    "MeasuredPoint",
    "ProbePoint",
    "ReportData",
    "SensitivityMap",
    "TradeOff",
    "WeightRow",
    "render",
    "write_report",
]
