"""From the sum of predicted losses to the loss one will measure, with an honest interval.

Predicted losses add up single-weight effects measured near the full-precision model. At low bits
the effects interact and the sum is off by a factor that drifts smoothly with its size, so a few
plans are really measured and the line

    log KL = a + b log S

is fitted to them; KL, or the measured increase of whatever loss a task has: every task of a table
has a line of its own. The logarithm makes errors relative, as misjudged sensitivities are. The line
is robust (Huber weights: one odd probe does not bend it); the interval is not (the same odd probe
widens it, because the next plan may be odd too). The scatter around the line is split into the
probes' own standard errors and a real lack of fit tau^2 (Paule and Mandel's estimator, J. Res. NBS
87, 1982), so that noisy probes neither hide nor fake a good fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import t as student_t

from quantlib.errors import SearchError
from quantlib.search import jsonfile

CONFIDENCE = 0.95
HUBER = 1.345
"""Huber's constant: 95 % efficient on normal residuals, bounded influence of the others."""
NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class Probe(NamedTuple):
    """A measured plan: its sum of predicted losses, the KL (or the increase of a task's loss) that
    was measured, and the standard error of that."""

    predicted: float
    measured: float
    error: float


class Prediction(NamedTuple):
    """A loss to expect, in its task's unit, and the 95 % interval a measurement should be in."""

    value: float
    low: float
    high: float


class _Fit(NamedTuple):
    """log KL = coefficients @ (1, log S - center).

    covariance: of the coefficients. scatter: variance of one new measurement around the line.
    quantile:   of Student's t, for the interval.
    """

    coefficients: np.ndarray
    center: float
    covariance: np.ndarray
    scatter: float
    quantile: float


@dataclass(frozen=True)
class Calibration:
    """Measured probes and the line through them; SearchError unless three or more differ."""

    probes: tuple[Probe, ...]

    def __post_init__(self) -> None:
        for probe in self.probes:
            if not all(math.isfinite(value) for value in probe) or probe.error < 0:
                raise SearchError(
                    f"calibration probe {tuple(probe)}: all numbers must be finite, the error >= 0"
                )
            if probe.predicted <= 0 or probe.measured <= 0:
                raise SearchError(
                    f"calibration probe {tuple(probe)}: predicted and measured loss must be "
                    "positive; measure plans that lose something"
                )
        sums = [probe.predicted for probe in self.probes]
        if len(set(sums)) < 3 or max(sums) < 1.01 * min(sums):
            raise SearchError(
                f"{len(sums)} calibration probes that are so few or so alike cannot carry a line "
                "and its error: measure at least three plans of different predicted loss"
            )

    @staticmethod
    def fit(points: list[tuple[float, float, float]]) -> Calibration:
        """A calibration from (predicted sum, measured KL, standard error of the measurement) of
        several plans."""
        return Calibration(tuple(Probe(*map(float, point)) for point in points))

    @property
    def intercept(self) -> float:
        """`a` of log KL = a + b log S."""
        return float(self._fit.coefficients[0] - self._fit.coefficients[1] * self._fit.center)

    @property
    def slope(self) -> float:
        """`b` of log KL = a + b log S; 1 where single-weight losses simply add up."""
        return float(self._fit.coefficients[1])

    def predict(self, predicted: float) -> Prediction:
        """Loss expected of a plan whose predicted losses sum to `predicted`, with its 95 %
        prediction interval.

        The interval is for a measurement with the probes' median standard error. A sum of exactly 0
        means that nothing was quantized: 0 and no interval. Raises SearchError for a negative or
        non-finite sum.
        """
        if not (math.isfinite(predicted) and predicted >= 0):
            raise SearchError(
                f"a plan's predicted loss is {predicted}: it must be finite and not negative"
            )
        if predicted == 0:
            return Prediction(0.0, 0.0, 0.0)
        fit = self._fit
        row = np.array([1.0, math.log(predicted) - fit.center])
        middle = float(row @ fit.coefficients)
        half = fit.quantile * math.sqrt(fit.scatter + float(row @ fit.covariance @ row))
        return Prediction(*(_exp(value) for value in (middle, middle - half, middle + half)))

    @cached_property
    def _fit(self) -> _Fit:
        return _fit_line(np.array(self.probes, dtype=np.float64))

    def to_dict(self) -> dict[str, Any]:
        return {"probes": [probe._asdict() for probe in self.probes]}

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str) -> Calibration:
        where = f"{source}, calibration"
        jsonfile.check_keys(data, {"probes"}, set(), where)
        probes = []
        for probe in jsonfile.field(data, "probes", list, where):
            if not isinstance(probe, dict):
                raise SearchError(
                    f"{where}: a probe must be an object with predicted, measured and error"
                )
            jsonfile.check_keys(probe, set(Probe._fields), set(), where)
            probes.append(
                Probe(*(jsonfile.field(probe, name, float, where) for name in Probe._fields))
            )
        try:
            return Calibration(tuple(probes))
        except SearchError as error:
            raise SearchError(f"{where}: {error}") from error


def _exp(value: float) -> float:
    """exp without overflow: three probes can leave an interval wider than a float."""
    return math.exp(value) if value < 700 else math.inf


def _fit_line(points: np.ndarray) -> _Fit:
    """Fit the line to `points` [n, 3]: predicted, measured, standard error.

    Reweighted least squares: the line's weights use a scatter from the median residual, which an
    odd probe cannot inflate; the interval uses the whole scatter.
    """
    x, y = np.log(points[:, 0]), np.log(points[:, 1])
    # delta method: the standard error of log KL; the floor keeps the weights of exact probes finite
    noise = np.maximum(points[:, 2] / points[:, 1], 1e-3) ** 2
    center = float(x.mean())
    design = np.stack([np.ones_like(x), x - center], axis=1)
    free = len(x) - 2
    weight = 1 / noise
    coefficients = np.zeros(2)
    for _ in range(100):
        previous = coefficients
        coefficients = _estimator(design, weight) @ y
        if np.abs(coefficients - previous).max() <= 1e-10:
            break
        residual = np.abs(y - design @ coefficients)
        typical = (NORMAL_MAD * float(np.median(residual))) ** 2 * len(x) / free
        variance = noise + max(0.0, typical - float(np.median(noise)))
        huber = np.minimum(1.0, HUBER * np.sqrt(variance) / np.maximum(residual, 1e-300))
        weight = huber / variance
    estimator = _estimator(design, weight)
    lack = _lack_of_fit((y - design @ coefficients) ** 2, noise, free)
    covariance = (estimator * (noise + lack)) @ estimator.T
    scatter = lack + float(np.median(noise))
    quantile = float(student_t.ppf(0.5 + CONFIDENCE / 2, free))
    return _Fit(coefficients, center, covariance, scatter, quantile)


def _estimator(design: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The matrix [2, n] that maps observations to the weighted least-squares coefficients."""
    weighted = design.T * weight
    return np.linalg.solve(weighted @ design, weighted)


def _lack_of_fit(squares: np.ndarray, noise: np.ndarray, free: int) -> float:
    """tau^2 >= 0 for which sum r^2 / (noise + tau^2) is the degrees of freedom, or 0 below it."""

    def excess(lack: float) -> float:
        return float((squares / (noise + lack)).sum()) - free

    if excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, float(squares.sum()) / free + 1e-12))
