from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import SearchError
from quantlib.search.calibrate import Calibration


def power_law(sums: np.ndarray, a: float = 0.3, b: float = 1.1) -> np.ndarray:
    return np.exp(a) * sums**b


def probes(
    generator: np.random.Generator, scatter: float, noise: float, count: int = 8
) -> Calibration:
    sums = np.geomspace(0.02, 1.0, count)
    kl = power_law(sums) * np.exp(scatter * generator.normal(size=count))
    measured = kl * (1 + noise * generator.normal(size=count))
    return Calibration.fit(list(zip(sums, measured, noise * measured, strict=True)))


@given(a=st.floats(-2, 2), b=st.floats(0.5, 2))
def test_an_exact_power_law_is_found_exactly(a: float, b: float) -> None:
    sums = np.geomspace(0.01, 1, 6)
    fit = Calibration.fit([(s, k, 0.0) for s, k in zip(sums, power_law(sums, a, b), strict=True)])
    assert fit.intercept == pytest.approx(a, abs=1e-6)
    assert fit.slope == pytest.approx(b, abs=1e-6)
    prediction = fit.predict(0.1)
    assert prediction.value == pytest.approx(math.exp(a) * 0.1**b, rel=1e-6)
    assert prediction.high / prediction.low < 1.01  # exact probes leave a narrow interval


@pytest.mark.parametrize(("scatter", "noise"), [(0.1, 0.02), (0.0, 0.1), (0.2, 0.0), (0.1, 0.1)])
def test_the_interval_contains_95_of_100_new_measurements(scatter: float, noise: float) -> None:
    generator = np.random.default_rng(0)
    inside = 0
    trials = 600
    for _ in range(trials):
        fit = probes(generator, scatter, noise)
        s = float(generator.uniform(0.02, 1.0))
        kl = float(power_law(np.array(s)) * np.exp(scatter * generator.normal()))
        low, high = fit.predict(s)[1:]
        inside += low <= kl * (1 + noise * float(generator.normal())) <= high
    # 95 % of 600 is 570, with a binomial standard deviation of 5.3; the estimate of the lack of fit
    # from eight probes is itself noisy, so the nominal level is met within three of them
    assert 0.92 * trials <= inside <= 0.99 * trials


def test_one_odd_probe_does_not_bend_the_line_but_widens_the_interval() -> None:
    generator = np.random.default_rng(1)
    clean = probes(generator, 0.03, 0.02, count=10)
    odd = list(clean.probes)
    odd[7] = odd[7]._replace(measured=odd[7].measured * 3)
    dirty = Calibration.fit([tuple(probe) for probe in odd])
    least_squares = np.polyfit(*np.log(np.array(odd)[:, :2]).T, 1)[0]
    assert abs(dirty.slope - clean.slope) < 0.5 * abs(least_squares - clean.slope)
    assert math.log(dirty.predict(0.2).value / clean.predict(0.2).value) < 0.1
    ratio = [math.log(fit.predict(0.2).high / fit.predict(0.2).low) for fit in (clean, dirty)]
    assert ratio[1] > 2 * ratio[0]


def test_precise_probes_count_more_than_noisy_ones() -> None:
    exact = [(s, s, 0.001 * s) for s in (0.05, 0.1, 0.2, 0.4, 0.8)]
    noisy = [(s, 1.5 * s, 0.5 * s) for s in (0.1, 0.2, 0.4)]
    assert Calibration.fit(exact + noisy).predict(0.2).value == pytest.approx(0.2, rel=0.02)


def test_the_interval_widens_away_from_the_probes() -> None:
    fit = probes(np.random.default_rng(2), 0.1, 0.02)

    def width(s: float) -> float:
        return math.log(fit.predict(s).high / fit.predict(s).low)

    assert width(0.14) < width(1.0) < width(10.0)
    assert width(0.14) < width(0.02) < width(0.002)


def test_predictions_are_ordered_and_nothing_quantized_loses_nothing() -> None:
    fit = probes(np.random.default_rng(3), 0.1, 0.02)
    for s in (1e-300, 1e-3, 1.0, 1e300):
        low, kl, high = (fit.predict(s)[i] for i in (1, 0, 2))
        assert 0 <= low <= kl <= high
    assert fit.predict(0.0) == (0.0, 0.0, 0.0)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(SearchError, match="finite and not negative"):
            fit.predict(bad)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(0.1, 0.1, 0.0), (0.2, 0.2, 0.0)], "at least three"),
        ([(0.1, 0.1, 0.0)] * 5, "at least three"),
        ([(0.1, 0.1, 0.0), (0.1001, 0.1, 0.0), (0.1002, 0.1, 0.0)], "different predicted loss"),
        ([(0.1, 0.0, 0.0), (0.2, 0.2, 0.0), (0.3, 0.3, 0.0)], "positive"),
        ([(-0.1, 0.1, 0.0), (0.2, 0.2, 0.0), (0.3, 0.3, 0.0)], "positive"),
        ([(0.1, math.nan, 0.0), (0.2, 0.2, 0.0), (0.3, 0.3, 0.0)], "finite"),
        ([(0.1, 0.1, -1.0), (0.2, 0.2, 0.0), (0.3, 0.3, 0.0)], "error >= 0"),
    ],
)
def test_probes_that_cannot_carry_a_line_are_refused(
    points: list[tuple[float, float, float]], message: str
) -> None:
    with pytest.raises(SearchError, match=message):
        Calibration.fit(points)
