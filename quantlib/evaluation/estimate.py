"""A number and how far to trust it.

Every figure quantlib publishes about a model is a mean over windows of text, and windows, not
tokens, are the independent unit: the tokens of one window share a topic, a style and an attention
cache. So a standard error here is always the spread of per-window means divided by the square root
of their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True)
class Estimate:
    """`value` with its `standard_error` (None when one window cannot tell) from `samples`
    independent windows."""

    value: float
    standard_error: float | None
    samples: int

    @staticmethod
    def mean(values: Sequence[float]) -> Estimate:
        """Mean of equally weighted windows; standard error with the unbiased (n - 1) variance."""
        array = np.asarray(values, dtype=np.float64)
        if array.size == 0:
            raise ValueError("the mean of no windows")
        error = float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else None
        return Estimate(float(array.mean()), error, array.size)

    def map(
        self, function: Callable[[float], float], derivative: Callable[[float], float]
    ) -> Estimate:
        """`function(value)`, its error carried by the delta method: se * |derivative(value)|."""
        error = (
            None
            if self.standard_error is None
            else self.standard_error * abs(derivative(self.value))
        )
        return Estimate(function(self.value), error, self.samples)

    def exp(self) -> Estimate:
        """Perplexity of a mean NLL, or a perplexity ratio of a mean difference of NLLs."""
        return self.map(_exp, _exp)

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Two-sided confidence interval by Student's t with `samples - 1` degrees of freedom."""
        if self.standard_error is None:
            return None
        half = float(stdtrit(self.samples - 1, 0.5 + level / 2)) * self.standard_error
        return self.value - half, self.value + half

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "standard_error": self.standard_error, "samples": self.samples}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Estimate:
        error = data["standard_error"]
        return Estimate(
            float(data["value"]), None if error is None else float(error), int(data["samples"])
        )

    def __str__(self) -> str:
        """`0.0849 ± 0.0031`: two significant digits of the error decide how many of the value are
        shown."""
        if not self.standard_error:
            return f"{self.value:.4g}"
        decimals = max(0, 1 - math.floor(math.log10(self.standard_error)))
        return f"{self.value:.{decimals}f} ± {self.standard_error:.{decimals}f}"


def _exp(value: float) -> float:
    """exp that says infinity where a float64 cannot hold the result: a broken model's
    perplexity."""
    return math.exp(value) if value < 709.0 else math.inf
