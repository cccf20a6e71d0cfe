"""The comparison of choices: what joins, what stays, and what a gain is."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from quantlib.bench import choices, record
from quantlib.bench.choices import FAMILIES, Bench, _chosen, _gain, _restricted, kept, main
from quantlib.formats import Scheme
from quantlib.recipe import NATIVE_SCHEMES, Recipe
from quantlib.search.plan import Assignment, Plan
from quantlib.search.sensitivity import Entry, Sensitivity


def test_every_family_adds_candidates_of_its_own() -> None:
    names = [name for family in FAMILIES.values() for name in family]
    assert len(set(names)) == len(names)
    for name in names:
        assert str(Scheme.parse(name)) == name
        assert name not in NATIVE_SCHEMES
    kinds = ("linear", "embedding")
    for family in FAMILIES.values():
        recipe = Recipe.create(data="x", schemes=(*NATIVE_SCHEMES, *family))
        assert any(set(family) & set(recipe.candidates(kind)) for kind in kinds)


def test_a_table_is_restricted_to_default_candidates_and_what_is_allowed() -> None:
    allowed = FAMILIES["factors"][0]
    entry = Entry(10, {"kl": 1.0}, {"kl": 0.1})
    schemes = (NATIVE_SCHEMES[0], allowed, FAMILIES["exponents"][0])
    table = Sensitivity("model", ("kl",), {"w": dict.fromkeys(schemes, entry)})
    assert list(_restricted(table, (allowed,)).rows["w"]) == [NATIVE_SCHEMES[0], allowed]
    assert list(_restricted(table, ()).rows["w"]) == [NATIVE_SCHEMES[0]]


def test_a_gain_is_paired_by_window() -> None:
    base = {"windows": [1.0, 3.0, 2.0], "kl": 2.0}
    found = _gain(base, {"windows": [0.5, 2.5, 1.5]})
    assert found == {"value": 0.5, "error": 0.0, "relative": 0.25}


def test_only_what_joined_is_counted() -> None:
    rows = {"a": Assignment("w4g64", 1, 0.0), "b": Assignment("w4g64+r4", 1, 0.0)}
    assert _chosen(Plan("model", rows), ("w4g64+r4",)) == {"w4g64+r4": 1}


def test_rows_of_other_budgets_stay_in_the_result_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "machine", lambda: "one")

    def write(rows: list[dict[str, Any]], windows: int = 6) -> list[dict[str, Any]]:
        document = kept(rows, windows, 256)
        record.write("choices", document)
        found: list[dict[str, Any]] = document["rows"]
        return found

    write([{"bits": 2.5, "family": "rows", "kl": 1.0}, {"bits": 3.0, "family": "rows", "kl": 0.5}])
    monkeypatch.setattr(record, "machine", lambda: "another")
    found = write([{"bits": 3.0, "family": "rows", "kl": 0.4}])
    assert [(row["bits"], row["kl"], row["machine"]) for row in found] == [
        (2.5, 1.0, "one"),
        (3.0, 0.4, "another"),
    ]
    assert len(write([{"bits": 3.5, "family": "none", "kl": 0.2}])) == 3
    assert len(write([{"bits": 3.5, "family": "none", "kl": 0.2}], windows=8)) == 1, (
        "figures of other windows are not comparable"
    )


def test_seeds_stand_beside_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row from before there were seeds is of seed 0, and another seed does not replace it."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def row(relative: float, **seed: int) -> dict[str, Any]:
        gain = {"value": 0.1, "error": 0.01, "relative": relative}
        return {"bits": 2.5, "family": "all", "kl": 1.0, "gain": gain, **seed}

    record.write("choices", kept([row(0.2), {"bits": 2.5, "family": "none", "kl": 1.0}], 6, 256))
    record.write("choices", kept([row(0.4, seed=1)], 6, 256))
    document = kept([row(0.3, seed=1)], 6, 256)
    assert [one["gain"]["relative"] for one in document["rows"] if "gain" in one] == [0.3, 0.2]
    (found,) = document["over_seeds"]
    assert (found["bits"], found["family"], found["seeds"]) == (2.5, "all", [1, 0])
    assert found["relative"]["mean"] == pytest.approx(0.25)
    # Student's t of one degree of freedom, times the standard error of two
    assert found["relative"]["half_width"] == pytest.approx(12.706 * 0.05, rel=1e-3)


def test_all_together_are_averaged_only_where_the_same_families_joined(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def row(seed: int, *joined: str) -> dict[str, Any]:
        gain = {"value": 0.1, "error": 0.01, "relative": 0.1 * seed}
        return {"bits": 2.5, "family": "all", "seed": seed, "gain": gain, "joined": list(joined)}

    rows = [row(0, "rows", "factors"), row(1, "factors", "rows"), row(2, "rows", "linears")]
    (found,) = kept(rows, 6, 256)["over_seeds"]
    assert found["seeds"] == [0, 1]


def test_a_further_seed_is_measured_apart_and_all_families_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its plans are not taken for those of seed 0: they are measured in a folder of its own."""
    monkeypatch.setattr(choices.assets, "fetch_smollm2", lambda: tmp_path)
    monkeypatch.setattr(choices.assets, "wikipedia_text", lambda part: tmp_path / part)
    monkeypatch.setattr(choices, "open_run", lambda *_: nullcontext())
    monkeypatch.setattr(choices, "calibrate", lambda run: None)
    monkeypatch.setattr(choices, "measure", lambda run: None)
    monkeypatch.setattr(Bench, "_row", lambda self, trial, table, bits, family, _: {"is": family})
    (tmp_path / "choices.json").write_text('{"a plan of seed 0": {"kl": [1.0]}}')
    first, second = (Bench(tmp_path, ("rows", "factors"), seed=seed) for seed in (0, 1))
    assert (first.recipe.seed, second.recipe.seed) == (0, 1)
    assert (first.work, second.work) == (tmp_path, tmp_path / "seed-1")
    assert first.known
    assert not second.known
    alone = second.rows((2.5, 3.0), measured=False, joint=True)
    assert [row["is"] for row in alone] == ["none", "all", "none", "all"]
    every = second.rows((2.5,), measured=False)
    assert [row["is"] for row in every] == ["none", "rows", "factors", "all"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--family", "colums"], "'colums' (choose from "),
        (["--family", "rows", "--joint"], "--joint needs two families or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: list[str],
    told: str,
) -> None:
    monkeypatch.setattr(choices, "Bench", None)  # refused before anything is opened
    monkeypatch.setattr(sys, "argv", ["choices", "--work", "x", *asked])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert told in said
    assert all(family in said for family in FAMILIES), "the known ones are named"
