"""The report is complete, stands alone, says what the data says, and escapes foreign names."""

import dataclasses
import errno
import json
import re
from html.parser import HTMLParser

import pytest

from quantlib.errors import CheckpointError, DataError
from quantlib.report import (
    MeasuredPoint,
    ProbePoint,
    ReportData,
    WeightRow,
    curves,
    render,
    words,
    write_report,
)
from quantlib.search.calibrate import Calibration

EMPTY = {field.name: field.default for field in dataclasses.fields(ReportData)}
VOID = {"meta", "input", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """Tags, their attributes and their text; raises when tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, text):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(text.strip())

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(filter(None, self.words))


@pytest.fixture(scope="module")
def text(data):
    return render(data)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def undrawn(data):
    """The same report without pictures, for what only words say: drawing takes most of the time."""
    drawn = ("components", "weights", "sensitivity", "front", "measured", "others", "probes")
    return dataclasses.replace(data, **{part: EMPTY[part] for part in drawn})


# -- whole page ----------------------------------------------------------------------------------


def test_every_section_and_picture_is_there(page):
    sections = [attributes["id"] for attributes in page.attributes("section")]
    parts = ["bits", "bytes", "quality", "evaluation", "weights", "provenance"]
    assert sections == ["components", *parts]
    for title in (
        "Bits in model.layers",
        "Sensitivity of model.layers",
        "Bytes per component",
        "Schemes in use",
        "Loss against size",
        "Predicted against measured",
    ):
        assert title in page.text
    assert len(page.attributes("svg")) == 6


def test_nothing_comes_from_outside(text, page):
    assert "http" not in text.lower()
    assert "@import" not in text
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", text))


def test_the_same_data_gives_the_same_bytes(data, text):
    assert render(data) == text


def test_ids_are_unique_and_every_reference_has_its_target(text, page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text)) <= set(ids)


def test_every_picture_is_described_for_those_who_do_not_see_it(data, page):
    labels = [attributes["aria-label"] for attributes in page.attributes("svg")]
    assert all(len(label) > 40 for label in labels)
    most = max(data.weights, key=lambda row: row.bits)
    assert f"{most.bits:.2f} for {most.name}" in labels[0]
    worst = max(data.sensitivity.loss, key=data.sensitivity.loss.get)
    assert worst in labels[1]


def test_colours_follow_the_theme(text):
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink)" in svg
    assert "var(--accent)" in svg
    assert not re.search(r"#(0\d)\1\1", svg), "a stand-in colour was left"
    assert "DejaVu" not in svg, "figures take the page's font"
    assert "prefers-color-scheme: dark" in text


def test_the_page_has_a_title_and_fits_a_phone(page):
    assert "Invented-135M · quantlib report" in page.text
    names = {attributes.get("name"): attributes for attributes in page.attributes("meta")}
    assert "width=device-width" in names["viewport"]["content"]


# -- numbers -------------------------------------------------------------------------------------


def test_the_headline_is_the_data(data, page):
    ratio = data.bytes_before / data.bytes_after
    assert f"{ratio:.1f} times smaller" in page.text
    assert f"{8 * data.bytes_after / data.parameters:.2f} bits for each" in page.text
    assert f"{100 * data.bytes_after / data.budget_bytes:.1f} % of the budget" in page.text
    values = data.evaluation["per_window"]["kl"]
    assert f"{sum(values) / len(values):.4f}" in page.text


def test_a_measurement_outside_its_prediction_is_said_in_plain_sight(undrawn, page):
    assert "inside the predicted 0.0631 (0.0545 to 0.0731)" in page.text
    optimist = render(dataclasses.replace(undrawn, predicted=(0.02, 0.01, 0.03)))
    assert 'class="note bad">outside the predicted 0.0200 (0.0100 to 0.0300)' in optimist


def test_a_file_over_its_budget_is_marked(undrawn):
    text = render(dataclasses.replace(undrawn, budget_bytes=undrawn.bytes_after // 2))
    assert re.search(r'class="note bad">(199|200)\.\d % of the budget', text)
    assert "width: 100.0%" in text, "the meter is full, not overflowing"


def test_every_weight_has_its_row(data, text):
    rows = re.findall(
        r"<tr>\s*<th scope=\"row\">(.*?)</tr>", text[text.index('id="table"') :], re.DOTALL
    )
    assert len(rows) == len(data.weights)
    for row, weight in zip(rows, data.weights, strict=True):
        assert row.startswith(weight.name.removesuffix(".weight"))
        assert weight.scheme in row
        assert f'data-v="{weight.bytes_after}"' in row
        assert f'data-v="{weight.loss}"' in row


def test_grid_numbers_are_the_true_bits(data, text):
    grid = re.search(r"Bits in model.layers.*?</svg>", text, re.DOTALL).group()
    shown = sorted(re.findall(r">(\d\.\d\d)<", grid))
    inside = [row for row in data.weights if row.block is not None]
    assert shown == sorted(f"{row.bits:.2f}" for row in inside)
    assert f"embed_tokens · {data.weights[0].bits:.2f}" in grid


# -- missing and odd parts -----------------------------------------------------------------------

PARTS = (
    "predicted_sum",
    "evaluation",
    "components",
    "weights",
    "sensitivity",
    "front",
    "measured",
    "others",
    "probes",
    "budget_bytes",
)


@pytest.mark.parametrize("part", PARTS)
def test_any_part_may_be_missing(data, part):
    assert Page(render(dataclasses.replace(data, **{part: EMPTY[part]}))).tags


@pytest.mark.parametrize("part", ["predicted", "timings", "facts", "provenance"])
def test_any_of_the_words_may_be_missing(undrawn, part):
    assert Page(render(dataclasses.replace(undrawn, **{part: EMPTY[part]}))).tags


def test_a_bare_report_has_a_headline_and_no_empty_sections():
    page = Page(render(ReportData("m", 1000, 250, 500)))
    assert "4.0 times smaller" in page.text
    assert not page.attributes("section")
    assert not page.attributes("script")
    assert not page.attributes("svg")


def test_one_window_shows_numbers_without_errors(undrawn):
    one = {name: values[:1] for name, values in undrawn.evaluation["per_window"].items()}
    single = {**undrawn.evaluation, "per_window": one}
    text = render(dataclasses.replace(undrawn, evaluation=single))
    assert "±" not in Page(text).text.replace("± error", "").replace("± is one standard", "")


def test_probes_that_carry_no_line_are_still_shown(data):
    few = (ProbePoint(0.1, 0.11), ProbePoint(0.2, 0.19))
    assert "too few or too alike" in render(dataclasses.replace(data, probes=few))


def test_the_chosen_point_is_on_the_front_even_where_nothing_was_measured(data):
    """A ring, at the plan's own prediction, else at the calibrated sum of its losses."""
    plan = dataclasses.replace(data, measured=(), others=())
    line = Calibration.fit([(p.predicted, p.measured, p.error) for p in data.probes])
    for predicted, loss in (
        (data.predicted, data.predicted[0]),
        (None, line.predict(data.predicted_sum).value),
    ):
        picture = curves.pareto(dataclasses.replace(plan, predicted=predicted))
        assert "this plan, predicted" in [label for _, label, _ in picture.key]
        assert f"predicted to lose {words.number(loss)} at" in picture.svg
    unknown = curves.pareto(dataclasses.replace(plan, predicted=None, predicted_sum=None))
    assert "this plan, predicted" not in [label for _, label, _ in unknown.key]


def test_a_measurement_is_shown_beside_its_sum_where_no_probes_were(data):
    picture = curves.predictions(dataclasses.replace(data, probes=()))
    assert [label for _, label, _ in picture.key] == ["this model", "measured = predicted"]
    assert "No probe plans were measured" in picture.caption
    assert curves.predictions(dataclasses.replace(data, probes=(), measured=())) is None


def test_error_bars_larger_than_the_value_stay_on_the_axis(data):
    wide = (MeasuredPoint("wide", data.bytes_after, 0.05, error=0.2),)
    text = render(dataclasses.replace(data, others=wide))
    assert not re.search(r' d="[^"]*(nan|inf)', text)


def test_a_lossless_plan_does_not_break_a_logarithmic_axis(data):
    free = tuple(dataclasses.replace(point, loss=0.0) for point in data.front[-2:])
    lossless = MeasuredPoint("free", data.bytes_before, -1e-9, 1e-9, chosen=True)
    text = render(dataclasses.replace(data, front=data.front[:-2] + free, measured=(lossless,)))
    assert not re.search(r' d="[^"]*(nan|inf)', text)
    assert "Loss against size" in text
    nothing = dataclasses.replace(data, front=free, measured=(lossless,), others=())
    assert "Loss against size" not in render(nothing)


def test_a_scheme_that_a_weight_was_not_measured_in_leaves_its_cell_empty(data):
    loss = dict(data.sensitivity.loss)
    del loss[data.weights[0].name], loss[data.weights[3].name]
    sparse = dataclasses.replace(data.sensitivity, loss=loss)
    assert "embed_tokens · –" in render(dataclasses.replace(data, sensitivity=sparse))


def test_names_are_text_and_never_markup(data):
    evil = '</svg><script>alert("x")</script> $\\frac{1}{2}$ & \'"'
    weights = tuple(
        dataclasses.replace(row, name=row.name + evil, scheme=row.scheme + evil)
        for row in data.weights
    )
    components = tuple(dataclasses.replace(row, name=evil) for row in data.components)
    text = render(
        dataclasses.replace(
            data,
            title=evil,
            weights=weights,
            components=components,
            others=(MeasuredPoint(evil, data.bytes_after, 0.1),),
            facts=((evil, evil),),
            provenance=((evil, evil),),
        )
    )
    page = Page(text)
    assert len(page.attributes("script")) == 1
    assert "<script>alert" not in text
    assert evil in page.text, "the name is there, as text"


# -- files ---------------------------------------------------------------------------------------


def test_report_data_survives_json(data):
    assert ReportData.from_json(json.loads(json.dumps(data.to_json()))) == data


@pytest.mark.parametrize(
    "damage",
    [{"surprise": 1}, {"weights": [{"name": "x"}]}, {"weights": ["x"]}, {"predicted": 3}],
)
def test_damaged_report_data_is_a_sentence(data, damage):
    with pytest.raises(DataError, match="write the report again"):
        ReportData.from_json({**data.to_json(), **damage})


def test_writing_is_all_or_nothing(undrawn, tmp_path, monkeypatch):
    path = write_report(undrawn, tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8") == render(undrawn)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write_report(undrawn, path)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_weights_without_predictions_have_no_loss_columns(data):
    bare = tuple(dataclasses.replace(row, loss=None, error=None) for row in data.weights)
    page = Page(render(dataclasses.replace(data, weights=bare, sensitivity=None)))
    assert len([tag for tag, _ in page.tags if tag == "button"]) == 7


def test_parameters_are_counted_from_shapes():
    row = WeightRow("x", "c", None, "experts", (8, 4, 6), "w4", 4.0, 0, 0)
    assert row.parameters == 192
