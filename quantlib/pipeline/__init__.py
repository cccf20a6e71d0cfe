"""The stages in order: inspect, calibrate, measure, search, apply."""

from quantlib.pipeline.compress import Result, compress, open_run

__all__ = ["Result", "compress", "open_run"]
