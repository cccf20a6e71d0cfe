"""The comparison of searches: measured plans, evolved scores and tables, on files made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer

from quantlib.bench import evolved, plans_measured, search, search_others
from quantlib.bench.plans_measured import Measured, Subject, as_rows, budgets_of, plan_of
from quantlib.bench.search_plot import save_plot
from quantlib.errors import DataError
from quantlib.search.evolve import Settings
from quantlib.search.problem import Choice, Item, Problem
from quantlib.search.proxies import LAYER, Layers
from quantlib.search.rank import qualities
from quantlib.search.sensitivity import Entry, Sensitivity

SCHEMES = ("w2g64", "w4g64", "w8g64")
WEIGHTS, PLANS = 8, 60


def written(folder: Path, name: str, seed: int) -> None:
    """A file of measured plans whose losses are sums of what the table predicts, with 1 % noise."""
    generator = np.random.default_rng(seed)
    rows, layers = {}, {}
    for index in range(WEIGHTS):
        energy = float(generator.lognormal(0, 1))
        layers[f"w{index}"] = {c: float(generator.lognormal(0, 0.3)) for c in LAYER}
        layers[f"w{index}"] |= {"weight_energy": energy, "parameters": 1000.0}
        rows[f"w{index}"] = {
            s: Entry(125 * int(s[1]), {"kl": energy * 4.0 ** -int(s[1])}, {"kl": 0.0})
            for s in SCHEMES
        }
    table = Sensitivity("m" * 64, ("kl",), rows)
    plans = []
    for number in range(PLANS):
        schemes = tuple(generator.choice(SCHEMES, WEIGHTS).tolist())
        loss = sum(rows[f"w{i}"][s].loss["kl"] for i, s in enumerate(schemes))
        noisy = loss * float(generator.lognormal(0, 0.01))
        plans.append(Measured(1000 * (number % 3), schemes, noisy, 0.01 * noisy, 0.5))
    found = as_rows(Subject(name, "kl", "KL"), table, Layers("m" * 64, {"kl": layers}), plans)
    (folder / f"plans_{name}.json").write_text(json.dumps(found))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    written(tmp_path, "smollm2", 0)
    written(tmp_path, "dinov2", 1)
    return tmp_path


def test_measured_plans_come_back_as_they_were_written(folder: Path) -> None:
    plans = plans_measured.load("smollm2", folder)
    assert plans.plans.shape == (PLANS, WEIGHTS)
    assert set(plans.budgets.tolist()) == {0, 1000, 2000}
    # the table's own prediction ranks them, as they were made of it
    assert plans_measured.known_scores(plans)["measured"]["all"] > 0.99
    assert (plans.weights[plans.plans] == np.arange(WEIGHTS)).all()
    with pytest.raises(DataError, match="were not measured"):
        plans_measured.load("dinov3", folder)
    file = folder / "plans_smollm2.json"
    data = json.loads(file.read_text())
    for change, said in (
        ({"columns": ["rows"]}, "other statistics"),
        ({"plans": ["1 x 2 3"]}, "damaged"),
    ):
        file.write_text(json.dumps(data | change))
        with pytest.raises(DataError, match=said):
            plans_measured.load("smollm2", folder)


def test_plans_fit_their_budget_and_are_the_same_every_time() -> None:
    generator = np.random.default_rng(0)
    items = tuple(
        Item(
            f"w{index}",
            (f"w{index}",),
            tuple(
                Choice(s, 125 * int(s[1]), float(generator.lognormal()) * 4.0 ** -int(s[1]))
                for s in SCHEMES
            ),
        )
        for index in range(24)
    )
    problem = Problem(items)
    assert budgets_of(problem) == sorted(set(budgets_of(problem)))
    for number in (0, 1, 38, 39, plans_measured.PLANS - 1):
        budget, picks = plan_of(problem, number)
        assert problem.bytes(picks) <= budget
        assert plan_of(problem, number) == (budget, picks)
    assert plan_of(problem, 0)[1] != plan_of(problem, 2)[1]


def test_a_formula_evolved_on_one_model_is_judged_on_the_other_and_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deap", reason="DEAP is the extra `evolve`")
    monkeypatch.setattr(evolved.record, "RESULTS", folder)
    subjects = [plans_measured.load(name, folder) for name in ("smollm2", "dinov2")]
    settings = Settings(population=20, children=20, generations=3)
    found = evolved.results(subjects, 1, settings, folder)
    assert len(found["rows"]) == 4
    for row in found["rows"]:
        other = "dinov2" if row["evolved_on"] == "smollm2" else "smollm2"
        assert row["unseen"][other]["all"] > 0.8  # the truth is noise times energy, a seed of all
    evolved.keep_best(found["rows"], settings, folder)
    kept = search.evolved_elsewhere("dinov2", folder)
    assert list(kept) == ["evolved on smollm2"]
    values = kept["evolved on smollm2"].evaluate(subjects[1].columns)
    assert qualities(subjects[1].scores(values), subjects[1])["all"] > 0.8


def rows_of(losses: dict[str, list[float]]) -> list[dict[str, object]]:
    return [
        {"method": name, "budget": 1000, "bytes": 990, "samples": s, "minutes": 0.5, "note": ""}
        | search.loss_of(s)
        for name, s in losses.items()
    ]


def test_differences_are_paired_and_tables_name_every_search(tmp_path: Path) -> None:
    samples = {"exact, measured": [1.0, 3.0, 2.0], "uniform": [1.1, 3.1, 2.1]}
    rows = search.with_differences(rows_of(samples))
    uniform = rows[1]
    assert uniform["against_exact"] == pytest.approx(5.0)  # 0.1 of 2.0
    assert uniform["against_error"] == pytest.approx(0.0, abs=0.01)  # samples differ, pairs do not
    assert uniform["error"] == pytest.approx(1 / np.sqrt(3), rel=1e-6)
    task = {"unit": "KL", "parameters": 2000, "rows": rows}
    text = search.table(task)
    assert "4.00 bits" in text
    assert "| uniform | 2.1 ± 0.6 (+5 ± 0 %) | 0.5 |" in text
    save_plot(task, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "uniform" in drawn
    assert "MB on disk" in drawn


def test_tables_and_plots_are_of_what_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search.record, "RESULTS", folder)
    others = search_others.other_rows()
    monkeypatch.setattr(search, "other_rows", lambda: others)
    with pytest.raises(typer.Exit):
        search.main(None, None, None, True)
    rows = search.with_differences(rows_of({"exact, measured": [1.0, 3.0]}))
    task = {"unit": "KL", "parameters": 2000, "rows": rows}
    search.record.write(search.RESULT, {"tasks": {"dinov2": task}})
    search.main(None, None, None, True)
    assert "| exact, measured | 2 ± 1 |" in capsys.readouterr().out
    drawn = {file.name: file.read_text() for file in folder.glob("*.svg")}
    assert "MB on disk" in drawn["search_dinov2.svg"]
    assert "fliqs-mixed" in drawn["search_fashion_resnet_trained.svg"]
    assert "search_smollm2_linears_rows.svg" in drawn
    with pytest.raises(typer.Exit):
        search.main(["smollm2"], None, None, True)


def test_rows_of_other_benchmarks_join_when_they_are_there(tmp_path: Path) -> None:
    assert search_others.other_rows(tmp_path) == []
    graph = {
        "method": "graph",
        "true_bits": 2.25,
        "kl": 0.5,
        "kl_error": 0.02,
        "search_seconds": 90,
    }
    trained = {
        "network": "vit",
        "method": "fliqs-int",
        "over_int4": {"mean": 0.5, "half_width": None, "on_pictures": 0.25},
        "bits_product": 16.0,
        "seconds": 120,
    }
    (tmp_path / search_others.GRAPH).write_text(json.dumps({"columns": [graph]}))
    linears = {**graph, "method": "rows", "rounding": "gptq", "kl": 0.3}
    plain = {**linears, "method": "known", "kl": 0.9}
    otherwise = {**linears, "method": "layers", "rounding": "descent"}
    rows_file = {"rows": [linears, plain, otherwise]}
    (tmp_path / search_others.ROWS).write_text(json.dumps(rows_file))
    resumed = {**trained, "method": "csq", "seconds": None}
    resumed["over_int4"] = {"mean": -1.0, "half_width": 0.75, "on_pictures": 0.25}
    int4 = {"network": "vit", "method": "int4", "bits_product": 16.0, "seconds": 60}
    strange = {**int4, "network": "resnet", "method": "e2m1"}  # no network that int4 was run on
    comparison = [int4, trained, resumed, strange]
    (tmp_path / search_others.TRAINED).write_text(json.dumps({"comparison": comparison}))
    rows = search_others.other_rows(tmp_path)
    assert [row["method"] for row in rows] == ["rows", "known", "graph", "int4", "fliqs-int", "csq"]
    assert [row["minutes"] for row in rows] == [1.5, 1.5, 1.5, 1.0, 2.0, None]
    assert [row["error"] for row in rows[3:]] == [None, 0.25, 0.75], "of one network: of pictures"
    text = search.others_table(rows)
    told = "-1 ± 0.75 points of accuracy over uniform INT4"
    assert f"| fashion vit, trained | csq | 16 weight bits x input bits | {told} |  |" in text
    assert "0.5 ± 0.039 KL" in text, "a standard error of 0.02"
    assert "| 0 points of accuracy over uniform INT4 |" in text, "what the others are beside"
    assert search_others.other_rows(), "the committed files are read"
    (tmp_path / search_others.TRAINED).write_text("{}")
    with pytest.raises(DataError, match="does not have the rows"):
        search_others.other_rows(tmp_path)
