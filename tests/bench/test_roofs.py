"""The roofs: what the compiled functions measure is a speed, and the larger time counts."""

import pytest

from quantlib.bench import roofs
from quantlib.bench.roofs import Measured, Roofs


def test_the_roof_is_the_longer_of_reading_and_multiplying() -> None:
    machine = Measured(read_bytes_per_s=1e9, operations_per_s=1e12)
    assert machine.seconds(1_000_000, 1e6) == pytest.approx(1e-3)
    assert machine.seconds(1000, 1e10) == pytest.approx(1e-2)


def test_an_unknown_peak_leaves_the_reads_as_roof() -> None:
    machine = Measured(read_bytes_per_s=2e9, operations_per_s=0.0)
    assert machine.seconds(1_000_000, 1e15) == pytest.approx(5e-4)
    assert machine.to_json() == {"read_gb_per_s": 2.0, "multiply_gop_per_s": None}


@pytest.mark.parametrize("threads", [1, 3])
def test_both_speeds_are_measured(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """A megabyte that three threads cannot share evenly: the size is rounded down."""
    monkeypatch.setattr(roofs, "READ_BYTES", 1_000_000)
    measure = Roofs(threads)
    measure()
    found = measure.take()
    # Wide enough for threads that wait for a processor.
    assert 1e5 < found.read_bytes_per_s < 1e14
    assert found.operations_per_s == 0 or 1e5 < found.operations_per_s < 1e14


def test_a_measurement_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "READ_BYTES", 1 << 20)
    measure = Roofs(1)
    speeds = iter([1e9, 3e9, 2e9, 8e9])
    monkeypatch.setattr(measure, "_read", lambda *_: next(speeds))
    for _ in range(3):
        measure()
    assert measure.take().read_bytes_per_s == 2e9
    assert measure.take().read_bytes_per_s == 8e9, "the earlier ones are gone; one is made"
    assert measure.best.read_bytes_per_s == 8e9
