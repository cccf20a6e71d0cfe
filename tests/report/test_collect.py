"""From the stages' own objects to report data: sums agree, and what was not made is left out."""

import dataclasses

import pytest

from quantlib.evaluation.language import LanguageResult
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.report import MeasuredPoint, ReportData, render
from quantlib.report.collect import collect
from quantlib.search.build import build_problem
from quantlib.search.calibrate import Calibration
from quantlib.search.pareto import pareto_front
from quantlib.search.plan import Plan
from quantlib.search.sensitivity import Entry, Sensitivity
from quantlib.search.solve import solve

SCHEMES = {"w2g32z": 2.6, "w4g32z": 4.6, "w6g32z": 6.7}
PROBES = [(0.01, 0.012, 0.001), (0.1, 0.11, 0.01), (0.5, 0.6, 0.02), (1.0, 1.3, 0.05)]
FIXED = 3000


@pytest.fixture(scope="module")
def modelmap(tmp_path_factory, tiny_llama):
    return ModelMap.from_source(Source.open(tiny_llama(tmp_path_factory.mktemp("source"))))


@pytest.fixture(scope="module")
def table(modelmap):
    def entry(weight, bits):
        loss = 0.02 * 4.0 ** (2 - bits) * (1 + len(weight.name) % 5)
        return Entry(round(weight.parameters * bits / 8), {"kl": loss}, {"kl": loss / 10})

    rows = {
        weight.name: {scheme: entry(weight, bits) for scheme, bits in SCHEMES.items()}
        for weight in modelmap.weights
    }
    del rows[modelmap.weights[0].name]["w2g32z"]
    return Sensitivity(modelmap.fingerprint, ("kl",), rows, {}, {"kl": Calibration.fit(PROBES)})


@pytest.fixture(scope="module")
def problem(modelmap, table):
    return build_problem(table, modelmap.weights, fixed_bytes=FIXED)


@pytest.fixture(scope="module")
def plan(problem, table):
    budget = (problem.bytes(problem.smallest()) + problem.bytes(problem.best())) // 2
    return Plan.from_solution(problem, solve(problem, budget), calibrations=table.calibrations)


@pytest.fixture(scope="module")
def evaluation(data):
    return LanguageResult.from_json(data.evaluation)


@pytest.fixture(scope="module")
def collected(modelmap, plan, table, problem, evaluation):
    return collect(
        modelmap,
        plan,
        title="tiny",
        sensitivity=table,
        front=pareto_front(problem, calibration=table.calibration),
        evaluation=evaluation,
        others=[MeasuredPoint("uniform", plan.bytes, 0.2, 0.01)],
        timings={"inspect": 1.0, "search": 2.0},
        provenance={"quantlib": "0.1.0"},
    )


def test_bytes_add_up(collected, modelmap, plan):
    assert collected.bytes_before == modelmap.nbytes == sum(r.before for r in collected.components)
    assert collected.bytes_after == plan.bytes
    weights = sum(row.bytes_after for row in collected.weights)
    assert weights == plan.bytes - FIXED
    kept = sum(row.nbytes for row in modelmap.kept)
    assert sum(row.after for row in collected.components) == weights + kept


def test_every_weight_has_its_scheme_bits_and_error(collected, modelmap, plan, table):
    assert [row.name for row in collected.weights] == [w.name for w in modelmap.weights]
    for row in collected.weights:
        assigned = plan.weights[row.name]
        assert (row.scheme, row.loss) == (assigned.scheme, assigned.loss)
        assert row.error == table.entry(row.name, row.scheme).error["kl"]
        assert row.bits == pytest.approx(SCHEMES[row.scheme], abs=0.01)


def test_sensitivity_is_shown_in_a_scheme_that_every_weight_has(collected, table):
    assert collected.sensitivity.scheme in ("w4g32z", "w6g32z")
    assert set(collected.sensitivity.loss) == set(table.weights)


def test_prediction_front_and_measurement_come_from_the_search(collected, plan, evaluation):
    low, high = plan.predicted["kl_low"], plan.predicted["kl_high"]
    assert collected.predicted == (plan.predicted["kl"], low, high)
    assert collected.predicted_sum == plan.loss
    chosen = [point for point in collected.measured if point.chosen]
    assert [(point.bytes, point.loss) for point in chosen] == [(plan.bytes, evaluation.kl.value)]
    losses = [point.loss for point in collected.front]
    assert losses == sorted(losses, reverse=True)
    assert all(point.low < point.loss < point.high for point in collected.front)
    assert len(collected.probes) == len(PROBES)


def test_a_plan_alone_makes_a_report(modelmap, plan):
    bare = collect(modelmap, dataclasses.replace(plan, predicted={}, budget=None), title="bare")
    assert bare.sensitivity is None
    assert bare.predicted is None
    assert bare.probes == bare.front == bare.measured == ()
    assert "Bits in model.layers" in render(bare)


def test_the_collected_report_renders_and_survives_json(collected):
    assert ReportData.from_json(collected.to_json()) == collected
    text = render(collected)
    assert "Predicted against measured" in text
    assert "gap to the LP bound" in text
