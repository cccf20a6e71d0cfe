"""The component table, the tasks and the pictures of a report say what the data says."""

import base64
import dataclasses
import io

import pytest
from PIL import Image

from quantlib.errors import DataError
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.report import ReportData, render, tables
from quantlib.report.collect import collect
from quantlib.report.data import ComponentRow, KeptRow, ShareRow, TaskRow
from quantlib.search.build import build_problem
from quantlib.search.calibrate import Calibration
from quantlib.search.plan import Plan
from quantlib.search.sensitivity import Entry, Sensitivity
from quantlib.search.solve import solve
from quantlib.search.tasks import COMBINED, Objective

from .test_report import Page

SCHEMES = {"w2g32": 2.5, "w4g32": 4.5, "w8g32": 8.5}
BASELINE = {"text": 2.0, "image": 0.5}
PROBES = [(0.01, 0.02, 1e-4), (0.1, 0.2, 1e-3), (1.0, 2.0, 1e-2)]


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def estimate(value, error=0.01):
    return {"value": value, "standard_error": error, "samples": 20}


SUITE = {
    "suite": "multimodal",
    "records": {"image": 20},
    "skipped": ["speech has no records"],
    "figures": [
        {
            "task": "text",
            "name": "NLL per token (nats)",
            "better": "lower",
            "model": estimate(2.1),
            "reference": estimate(2.0),
            "change": estimate(0.1, 0.002),
        },
        {
            "task": "text",
            "name": "KL per token (nats)",
            "better": "lower",
            "model": estimate(0.09),
            "reference": None,
            "change": None,
        },
    ],
    "images": [
        {"prompt": "a <red> three", "before": png("red"), "after": png("maroon")},
        {"prompt": "a blue one", "before": None, "after": png("blue")},
    ],
}


@pytest.fixture(scope="module")
def modelmap(tmp_path_factory, tiny_llama):
    return ModelMap.from_source(Source.open(tiny_llama(tmp_path_factory.mktemp("source"))))


@pytest.fixture(scope="module")
def table(modelmap):
    """Text suffers everywhere, images from the embedding alone."""

    def entry(weight, bits):
        loss = 0.01 * 4.0 ** (2 - bits)
        losses = {"text": loss, "image": loss * (weight.kind == "embedding")}
        return Entry(round(weight.parameters * bits / 8), losses, {"text": loss / 10, "image": 0.0})

    rows = {w.name: {s: entry(w, bits) for s, bits in SCHEMES.items()} for w in modelmap.weights}
    probes = {"text": Calibration.fit(PROBES)}
    return Sensitivity(modelmap.fingerprint, ("text", "image"), rows, {}, probes, baseline=BASELINE)


@pytest.fixture(scope="module", params=["sum", "minmax"])
def plan(request, modelmap, table):
    objective = Objective({"image": 3.0}, request.param)
    problem = build_problem(table, modelmap.weights, fixed_bytes=0, objective=objective)
    budget = (problem.bytes(problem.smallest()) + problem.bytes(problem.best())) // 2
    solution = solve(problem, budget)
    return Plan.from_solution(
        problem, solution, calibrations=table.calibrations, baseline=table.baseline
    )


@pytest.fixture(scope="module")
def collected(modelmap, table, plan):
    return collect(modelmap, plan, title="both", sensitivity=table, suite=SUITE)


def test_losses_of_components_add_up_to_those_of_the_tasks(collected, plan, table):
    for task in table.tasks:
        parts = sum(row.losses.get(task, 0.0) for row in collected.components)
        whole = sum(table.entry(name, row.scheme).loss[task] for name, row in plan.weights.items())
        assert parts == pytest.approx(whole / BASELINE[task])


def test_a_task_is_shown_with_its_calibrated_loss_and_what_was_measured(collected, plan):
    text, image = collected.tasks
    assert text.predicted == pytest.approx(plan.predicted["text"])
    assert (text.low, text.high) == (plan.predicted["text_low"], plan.predicted["text_high"])
    assert (text.measured, text.error) == (0.09, 0.01), "the KL, not the NLL"
    assert (image.low, image.measured) == (None, None)
    assert (text.weight, image.weight) == (1.0, 3.0)
    for row in collected.tasks:
        assert row.increase == pytest.approx(plan.predicted[f"increase:{row.name}"])


def test_the_sum_of_the_page_is_what_was_minimised(collected, plan, table):
    raw = {
        task: sum(table.entry(n, row.scheme).loss[task] for n, row in plan.weights.items())
        for task in table.tasks
    }
    levels = {task: raw[task] / BASELINE[task] * (3 if task == "image" else 1) for task in raw}
    minimised = max if plan.objective.balance == "minmax" else sum
    assert collected.predicted_sum == pytest.approx(minimised(levels.values()))
    assert collected.unit == "relative increase"
    assert plan.task == COMBINED


def test_everything_kept_is_named_with_its_reason(collected, modelmap):
    assert sum(row.bytes for row in collected.kept) == sum(row.nbytes for row in modelmap.kept)
    assert sum(row.count for row in collected.kept) == len(modelmap.kept)
    assert all(row.reason for row in collected.kept)
    text = Page(render(collected)).text
    assert "layers.*.input_layernorm" in text


def test_pictures_stand_side_by_side_and_come_from_the_page_itself(collected):
    text = render(collected)
    page = Page(text)
    sources = [attributes["src"] for attributes in page.attributes("img")]
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "a &lt;red&gt; three" in text
    assert "http" not in text.lower()
    assert "+0.1000 ± 0.0020" in page.text
    assert "speech has no records" in page.text


def test_the_data_survives_json(collected):
    assert ReportData.from_json(collected.to_json()) == collected


@pytest.mark.parametrize(
    "picture", ["no base64!", base64.b64encode(b"<svg onload=x>").decode(), 'x" onerror="', 3]
)
def test_a_picture_that_is_none_is_refused(collected, picture):
    bad = {**SUITE, "images": [{"prompt": "x", "before": None, "after": picture}]}
    with pytest.raises(DataError, match="evaluate again"):
        render(dataclasses.replace(collected, suite=bad))


@pytest.mark.parametrize(
    "change", [{"figures": [{}]}, {"figures": 3}, {"records": []}, {"images": [{}]}]
)
def test_a_damaged_evaluation_is_a_sentence(collected, change):
    with pytest.raises(DataError, match="evaluate again"):
        render(dataclasses.replace(collected, suite={**SUITE, **change}))


def test_a_measurement_outside_its_interval_is_marked():
    row = TaskRow("text", "nats per token", 1.0, 2.0, 0.1, 0.05, 0.2, 0.5, 0.01)
    page = render(ReportData("t", 10, 5, 10, tasks=(row,), balance="minmax"))
    assert "outside the predicted 0.0500 to 0.200" in page
    assert "minimised the largest" in page


def test_a_component_that_is_all_kept_says_so():
    data = ReportData(
        "t",
        100,
        60,
        100,
        components=(ComponentRow("vision", 50, 10, 25, {"w4g32": 20}), ComponentRow("vq", 50, 50)),
        kept=(KeptRow("vq", "decoder.*.weight", 4, 50, "F32", "no data reached it"),),
    )
    made = tables.components(data)
    assert made is not None
    first, second = made.rows
    assert first == ("vision", "25", "50 B", "10 B", "16.7 %", "16.00 → 3.20", "w4g32 100 %")
    assert second[-1] == "left as it is"
    assert "no data reached it" in render(data)


def test_whose_data_decided_is_shown_before_and_after_weighting():
    rows = (
        ShareRow("language_model", "modality", "text", 0.1, 0.75),
        ShareRow("language_model", "modality", "image", 0.9, 0.25),
        ShareRow("vision_tower", "stream", "answer", 1.0, 1.0),
    )
    data = ReportData("t", 100, 60, 100, shares=rows)
    made = tables.shares(data)
    assert made is not None
    assert [row[2:] for row in made.rows] == [
        ("text", "10.0 %", "75.0 %"),
        ("image", "90.0 %", "25.0 %"),
    ]
    assert "of the weight" in Page(render(data)).text
    assert tables.shares(dataclasses.replace(data, shares=rows[2:])) is None
    assert ReportData.from_json(data.to_json()) == data
