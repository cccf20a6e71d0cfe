from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import SearchError
from quantlib.search.calibrate import Calibration
from quantlib.search.sensitivity import Entry, Sensitivity

finite = st.floats(allow_nan=False, allow_infinity=False)
entries = st.builds(
    lambda size, loss, error: Entry(size, {"kl": loss}, {"kl": error}),
    st.integers(1, 10**12),
    finite,
    st.floats(0, 1e300),
)
rows = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.dictionaries(st.sampled_from(["w4g64", "w3", "nvfp4", "bf16"]), entries, min_size=1),
    min_size=1,
    max_size=4,
)


@given(rows=rows)
def test_a_table_survives_its_file_to_the_last_bit(rows: Any) -> None:
    table = Sensitivity("fingerprint", ("kl",), rows, {"data": "abc"})
    again = Sensitivity.from_json(table.to_json())
    assert again == table
    assert again.digest() == table.digest()
    assert list(again.rows) == list(table.rows)


def test_the_file_is_plain_json_with_one_line_for_each_weight_and_scheme(
    table: Sensitivity, tmp_path: Path
) -> None:
    path = tmp_path / "sensitivity.json"
    table.save(path)
    assert Sensitivity.load(path, table.model) == table
    data = json.loads(path.read_text())
    weight, scheme = table.weights[3], "w4g64z"
    cell = data["weights"][weight][scheme]
    entry = table.entry(weight, scheme)
    assert cell == {"bytes": entry.bytes, "kl": entry.loss["kl"], "kl_error": entry.error["kl"]}
    assert data["units"] == {"kl": "nats per token"}
    lines = [line for line in path.read_text().splitlines() if '"kl_error"' in line]
    assert len(lines) == sum(len(row) for row in table.rows.values())


def test_new_probes_do_not_change_the_digest_and_any_entry_does(table: Sensitivity) -> None:
    probed = table.with_calibration(Calibration.fit([(1, 1, 0.1), (2, 2, 0.1), (3, 3, 0.1)]))
    assert probed.digest() == table.digest()
    assert Sensitivity.from_json(probed.to_json()) == probed
    changed = Sensitivity.from_json(table.to_json().replace('"bytes": ', '"bytes": 1', 1))
    assert changed.digest() != table.digest()


def test_a_table_of_another_model_is_refused_by_both_fingerprints(
    table: Sensitivity, tmp_path: Path
) -> None:
    table.save(tmp_path / "s.json")
    with pytest.raises(SearchError, match="measured on another model") as error:
        Sensitivity.load(tmp_path / "s.json", "0123456789abcdef")
    assert "ffffffffffff" in str(error.value)
    assert "0123456789ab" in str(error.value)


def test_asking_for_what_was_not_measured_says_what_was(table: Sensitivity) -> None:
    with pytest.raises(SearchError, match="has no weight 'nothing'"):
        table.entry("nothing", "w4g64")
    with pytest.raises(SearchError, match="it was in w2g32"):
        table.entry(table.weights[0], "fp8")


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return apply


def first_cell(data: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = next(iter(data["weights"].values()))
    return row["w2g32"]


CORRUPTIONS: dict[str, tuple[Callable[[str], str], str]] = {
    "cut short": (lambda text: text[: len(text) // 2], "not valid JSON"),
    "empty": (lambda text: "", "not valid JSON"),
    "a list": (lambda text: "[]", "not a JSON object"),
    "binary": (lambda text: "\x00\x01", "not valid JSON"),
    "deep": (lambda text: '{"a":' * 100_000, "nested too deeply"),
    "another format": (edit(lambda d: d.update(format="quantlib-plan")), "is not a quantlib-sens"),
    "a later version": (edit(lambda d: d.update(version=3)), "version 3"),
    "no model": (edit(lambda d: d.update(model="")), "which model"),
    "model missing": (edit(lambda d: d.pop("model")), "'model' is missing"),
    "unknown key": (edit(lambda d: d.update(weigths={})), "nothing reads 'weigths'"),
    "no weights": (edit(lambda d: d.update(weights={})), "empty"),
    "weights a list": (edit(lambda d: d.update(weights=[])), "must be an object"),
    "a row of nothing": (edit(lambda d: d["weights"].update(extra={})), "extra has no candidate"),
    "bytes negative": (edit(lambda d: first_cell(d).update(bytes=-1)), "positive whole number"),
    "bytes a fraction": (edit(lambda d: first_cell(d).update(bytes=1.5)), "must be a whole number"),
    "bytes true": (edit(lambda d: first_cell(d).update(bytes=True)), "must be a whole number"),
    "loss a text": (edit(lambda d: first_cell(d).update(kl="much")), "must be a number"),
    "loss missing": (edit(lambda d: first_cell(d).pop("kl")), "'kl' is missing"),
    "loss NaN": (edit(lambda d: first_cell(d).update(kl=float("nan"))), "NaN is not a number"),
    "loss overflowing": (edit(lambda d: first_cell(d).update(kl=10**400)), "not finite"),
    "error negative": (edit(lambda d: first_cell(d).update(kl_error=-1)), "standard error"),
    "bad scheme": (
        edit(lambda d: d["weights"].update(x={"w9": {"bytes": 1, "kl": 1, "kl_error": 1}})),
        "'w9' is not a scheme",
    ),
    "scheme in another spelling": (
        edit(lambda d: d["weights"].update(x={"w4a16": {"bytes": 1, "kl": 1, "kl_error": 1}})),
        "must be written 'w4'",
    ),
    "tasks of numbers": (edit(lambda d: d.update(tasks=[1])), "names of the loss columns"),
    "task called bytes": (edit(lambda d: d.update(tasks=["bytes"])), "loss column|missing|reads"),
    "provenance of numbers": (edit(lambda d: d.update(provenance={"data": 3})), "must be a text"),
    "calibration empty": (edit(lambda d: d.update(calibration={"probes": []})), "at least three"),
    "calibration misspelled": (edit(lambda d: d.update(calibration={"probe": []})), "is missing"),
    "a probe of nothing": (
        edit(lambda d: d.update(calibration={"probes": [1]})),
        "a probe must be an object",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupt_table_is_a_sentence_that_names_the_file(
    name: str, table: Sensitivity, tmp_path: Path
) -> None:
    corrupt, message = CORRUPTIONS[name]
    path = tmp_path / "sensitivity.json"
    path.write_text(corrupt(table.to_json()))
    with pytest.raises(SearchError, match=message) as error:
        Sensitivity.load(path)
    assert str(path) in str(error.value)


def test_a_repeated_weight_is_an_error_and_not_the_last_one_wins(table: Sensitivity) -> None:
    text = table.to_json()
    name = json.dumps(table.weights[1])
    with pytest.raises(SearchError, match="appears twice"):
        Sensitivity.from_json(text.replace(json.dumps(table.weights[2]), name))


def test_missing_and_unreadable_files_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="there is no sensitivity table"):
        Sensitivity.load(tmp_path / "none.json")
    with pytest.raises(SearchError, match="cannot be read"):
        Sensitivity.load(tmp_path)
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SearchError, match="cannot be read"):
        Sensitivity.load(tmp_path / "latin.json")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    table: Sensitivity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SearchError, match="No space left"):
        table.save(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.json"]
    with pytest.raises(SearchError, match="cannot write"):
        table.save(tmp_path / "nowhere" / "s.json")
