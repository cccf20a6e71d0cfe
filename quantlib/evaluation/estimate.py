"""A number and how far to trust it.

Every figure quantlib publishes about a model is an average over windows of text, or over samples
(questions, pictures, utterances), and those, not tokens, are the independent unit: the tokens of
one window share a topic, a style and an attention cache. So the standard error of a mean is the
spread of per-window means divided by the square root of their number. What is no plain mean, as a
word error rate or a distance of two sets, is computed again on samples drawn with replacement (the
bootstrap, Efron 1979), and its standard error is the spread of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

DRAWS = 400
"""Resamples of a bootstrap: its standard errors are then right to 4 %."""


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

    @staticmethod
    def ratio(
        numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0
    ) -> Estimate:
        """Sum over samples / sum over samples, its error by the bootstrap.

        Denominators (tokens, words, ones for a mean) are positive.
        """
        above = np.asarray(numerators, dtype=np.float64)
        below = np.asarray(denominators, dtype=np.float64)
        count = above.size
        if count == 0:
            raise ValueError("the mean of no samples")
        value = float(above.sum() / below.sum())
        if count < 2:
            return Estimate(value, None, count)
        # How often each sample is drawn: one row of counts per resample.
        generator = np.random.default_rng(seed)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=DRAWS)
        found = (drawn @ above) / (drawn @ below)
        return Estimate(value, float(np.std(found, ddof=1)), count)

    @staticmethod
    def ratio_change(
        numerators: Sequence[float],
        reference: Sequence[float],
        denominators: Sequence[float],
        *,
        seed: int = 0,
    ) -> Estimate:
        """What the ratio is more than the reference's on the same samples; paired, so its error is
        smaller than that of either."""
        more = [ours - theirs for ours, theirs in zip(numerators, reference, strict=True)]
        return Estimate.ratio(more, denominators, seed=seed)

    @staticmethod
    def bootstrap(
        statistic: Callable[[NDArray[np.int64]], float],
        samples: int,
        *,
        seed: int = 0,
        draws: int = DRAWS,
    ) -> Estimate:
        """`statistic(numbers of samples)` of all samples, its error from resampled ones."""
        generator = np.random.default_rng(seed)
        value = statistic(np.arange(samples))
        if samples < 2:
            return Estimate(float(value), None, samples)
        found = [statistic(generator.integers(samples, size=samples)) for _ in range(draws)]
        return Estimate(float(value), float(np.std(found, ddof=1)), samples)

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
