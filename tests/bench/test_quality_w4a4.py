"""The table of methods: rows are kept as they come, and not measured twice."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from quantlib.bench import quality_w4a4 as bench
from quantlib.bench import record
from quantlib.bench.w4a4.bits import Bits
from quantlib.bench.w4a4.methods import Quantized
from quantlib.bench.w4a4.subjects import Subject
from quantlib.errors import UsageError

BITS = Bits(4.5, 4.375, 4.4, 4.375, 5.2, 4.5)


class Constant(Subject):
    """A subject whose figures are what the model is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.original = 0.0

    def run(self, model: Any) -> None: ...

    def quick(self, model: Any) -> float:
        return 0.0

    def figures(self, model: Any) -> dict[str, float]:
        return {"kl": model, "perplexity": 10 + model}


def method(subject: Subject, seed: int) -> Quantized:
    """What a plug is."""
    return Quantized(0.1 * (seed + 1), BITS, {"alpha": 0.5})


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "open_subject", lambda model, *_: Constant(model))
    return tmp_path / "quality_w4a4.json"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    here = [str(Path(__file__).parent), *sys.path]
    monkeypatch.setattr(sys, "path", here)
    plug = f"ours={Path(__file__).stem}:method"
    monkeypatch.setattr(sys, "argv", ["quality_w4a4", "--plug", plug, *arguments])
    bench.main()


def test_rows_carry_bits_figures_and_seeds_and_a_summary_their_spread(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--model", "plain", "--method", "ours")
    written = json.loads(results.read_text())
    assert [row["seed"] for row in written["rows"]] == [0, 1, 2]
    assert written["rows"][0]["bits"]["weight_codes"] == 4.375
    assert written["rows"][0]["notes"] == {"alpha": 0.5}
    line = written["summary"][0]
    assert line["kl"]["mean"] == pytest.approx(0.2)
    assert "kl_of_resq" not in line
    assert written["models"]["plain"]["figures"]["perplexity"] == 10
    # Student's t with two degrees of freedom: 4.3027 times 0.1 / sqrt(3).
    assert line["kl"]["interval"] == pytest.approx([0.2 - 0.24841, 0.2 + 0.24841], abs=1e-4)
    assert "plain    ours" in capsys.readouterr().out


def test_the_summary_compares_with_resq_on_the_same_model() -> None:
    rows = [
        {"model": model, "method": method, "seed": 0, "bits": {"weights": 4.5}, "kl": kl}
        for model, method, kl in (("a", "resq", 0.4), ("a", "ours", 0.1), ("b", "ours", 0.1))
    ]
    found = {(line["model"], line["method"]): line for line in bench.summarise(rows)}
    assert found["a", "ours"]["kl_of_resq"] == pytest.approx(0.25)
    assert "kl_of_resq" not in found["b", "ours"]


def test_what_is_there_is_not_measured_again(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "--model", "plain", "--method", "ours", "--seeds", "1")
    first = results.read_text()
    monkeypatch.setattr(bench, "open_subject", lambda *_: pytest.fail("opened again"))
    run(monkeypatch, "--model", "plain", "--method", "ours", "--seeds", "1")
    assert json.loads(results.read_text())["rows"] == json.loads(first)["rows"]


def test_two_processes_keep_each_other_s_rows(results: Path) -> None:
    settings = {"windows": 24}
    one, other = (bench.Results("quality_w4a4", settings, fresh=False) for _ in range(2))
    row = {"bits": BITS.to_json(), "kl": 0.1, "perplexity": 10.0, "seed": 0}
    one.add(row | {"model": "plain", "method": "a"})
    other.add(row | {"model": "rotated", "method": "a"})
    one.add(row | {"model": "plain", "method": "b"})
    rows = json.loads(results.read_text())["rows"]
    assert [(r["model"], r["method"]) for r in rows] == [
        ("plain", "a"),
        ("rotated", "a"),
        ("plain", "b"),
    ]


def test_all_that_shares_a_folder_runs_before_the_folder_goes(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[tuple[str, str]] = []
    names = ("quantlib", "quantlib_strict")
    monkeypatch.setattr(bench, "OURS", dict.fromkeys(names, method))
    monkeypatch.setattr(bench.ours, "FOLDERS", dict.fromkeys(names, "resq"))
    monkeypatch.setattr(bench.ours, "forget", lambda *what: gone.append(what))
    both = ("--method", "quantlib", "--method", "quantlib_strict")
    run(monkeypatch, "--model", "plain", "--method", "quantlib", "--seeds", "2")
    assert not gone
    run(monkeypatch, "--model", "plain", *both, "--seeds", "2")
    rows = json.loads(results.read_text())["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("quantlib", 0),
        ("quantlib", 1),
        ("quantlib_strict", 0),
        ("quantlib_strict", 1),
    ]
    assert gone == [("plain", "resq")], "with the last of the rows, and once"


def test_other_settings_do_not_overwrite_a_table(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ("--model", "plain", "--method", "ours", "--seeds", "1")
    run(monkeypatch, *plain)
    before = results.read_text()
    with pytest.raises(SystemExit, match="name another file with --out"):
        run(monkeypatch, *plain, "--windows", "4")
    assert results.read_text() == before
    run(monkeypatch, *plain, "--windows", "4", "--out", "other")
    assert json.loads((results.parent / "other.json").read_text())["settings"]["calibration"] == 4
    run(monkeypatch, *plain, "--windows", "4", "--fresh")
    assert len(json.loads(results.read_text())["rows"]) == 1


def test_a_model_that_cannot_be_had_is_left_out_with_a_sentence(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> Subject:
        raise bench.assets.AssetUnavailable("apt-get could not download it")

    monkeypatch.setattr(bench, "open_subject", refuse)
    run(monkeypatch, "--model", "whisper", "--method", "ours")
    assert "whisper is left out: apt-get could not download it" in capsys.readouterr().out


def test_unknown_methods_and_plugs_are_refused(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="no method guess: use rtn"):
        run(monkeypatch, "--method", "guess")
    with pytest.raises(UsageError, match="NAME=MODULE:FUNCTION"):
        bench.plug("ours=nowhere.at.all:f")
    with pytest.raises(UsageError, match="NAME=MODULE:FUNCTION"):
        bench.plug("ours")


def test_ablations_are_measured_where_outliers_are() -> None:
    def names(model: str) -> set[str]:
        return {name for name, _, _ in bench.runs(model, [], {}, 1, True)}

    assert "resq_no_a" in names("aligned")
    assert "resq_no_a" not in names("plain")
    asked = {name for name, _, _ in bench.runs("plain", ["resq_no_a"], {}, 1, True)}
    assert asked == {"resq_no_a"}


def test_rows_can_be_measured_again_one_by_one(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = iter(range(1, 9))
    monkeypatch.setattr(bench, "OURS", {"quantlib": lambda *_: Quantized(next(counted), BITS, {})})
    both = ("--model", "plain", "--method", "quantlib", "--seeds", "2")
    run(monkeypatch, *both)
    run(monkeypatch, *both)
    run(monkeypatch, *both, "--seeds", "1", "--again")
    rows = {row["seed"]: row["kl"] for row in json.loads(results.read_text())["rows"]}
    assert rows == {0: 3, 1: 2}


def test_whisper_has_more_seeds(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--model", "whisper", "--model", "plain", "--method", "ours")
    rows = json.loads(results.read_text())["rows"]
    seeds = {name: [r["seed"] for r in rows if r["model"] == name] for name in ("whisper", "plain")}
    assert seeds == {"whisper": [0, 1, 2, 3, 4], "plain": [0, 1, 2]}
