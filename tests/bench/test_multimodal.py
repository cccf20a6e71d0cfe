"""The multimodal benchmark: methods differ in one thing, rows are measured once, and the table says
who is better."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from quantlib.bench import artifacts, comparisons, multimodal, record
from quantlib.bench.comparisons import (
    ABLATIONS,
    LANGUAGE_ONLY,
    REFINED,
    UNIFORM,
    WHOLE,
    Bed,
    request,
    tasks_of,
    write_chosen,
)
from quantlib.bench.multimodal import Row, measured, rows_of, state_of
from quantlib.bench.multimodal_measure import Judging, compressed, guarded, opened, sparing
from quantlib.bench.multimodal_table import by_task, compared, points_lost, table
from quantlib.calibration.records import GENERATION, QUESTION, TEXT, read_records
from quantlib.checkpoint.reader import read_layout
from quantlib.checkpoint.writer import PLAN_FILE
from quantlib.errors import DataError, SearchError, UsageError
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.pipeline import bytecount
from quantlib.pipeline.compress import measured_table, recipe_for
from quantlib.pipeline.plan import Budget, search
from quantlib.search.plan import Plan

from ..models.stacked_models import build, save
from ..pipeline import whole_models

NO_GENERATION, TEXT_ONLY, UNWEIGHTED, ONE_TASK = ABLATIONS


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    """A tiny random Janus with records of every kind it reads."""
    folder = tmp_path_factory.mktemp("bed")
    save(build("janus"), folder / "model")
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    rows = [
        {"text": "a red three"},
        {"image": "a.png", "question": "what digit ?", "answer": "three", "id": 7},
        {"prompt": "a red three", "target": "a.png"},
    ]
    for name in ("calibration", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Bed("tiny", lambda: folder, (4.0, 6.0), 4.0, "w4g32zs4")


def test_the_whole_model_keeps_nothing_and_reads_every_record(bed: Bed, tmp_path: Path) -> None:
    asked = request(WHOLE, bed.folder(), tmp_path)
    assert asked.kept == ()
    assert asked.data == bed.folder() / "calibration.jsonl"
    assert not any(tmp_path.iterdir())


def test_language_only_keeps_what_is_no_language_model(bed: Bed, tmp_path: Path) -> None:
    asked = request(LANGUAGE_ONLY, bed.folder(), tmp_path)
    assert "vision_tower" in asked.kept
    assert "generation_head" in asked.kept
    assert not set(asked.kept) & set(comparisons.WORDS)
    assert asked.data == bed.folder() / "calibration.jsonl", "the same data"
    assert asked.unread == (), "and the same statistics: it only spends the bytes elsewhere"


def test_without_generation_its_components_are_unread_and_rounded_plainly(
    bed: Bed, tmp_path: Path
) -> None:
    asked = request(NO_GENERATION, bed.folder(), tmp_path)
    assert {record.kind for record in read_records(asked.data)} == {TEXT, QUESTION}
    assert "generation_head" in asked.unread
    assert "vision_tower" not in asked.unread
    assert asked.kept == ()
    assert request(dataclasses.replace(NO_GENERATION, plain=False), bed.folder(), tmp_path).kept


def test_text_alone_runs_only_words(bed: Bed, tmp_path: Path) -> None:
    asked = request(TEXT_ONLY, bed.folder(), tmp_path)
    assert [record.kind for record in read_records(asked.data)] == [TEXT]
    assert set(asked.unread) == set(request(LANGUAGE_ONLY, bed.folder(), tmp_path).kept)


def test_one_task_leaves_the_others_out_of_the_objective(bed: Bed, tmp_path: Path) -> None:
    tasks = tasks_of(Source.open(bed.folder() / "model"), read_records(bed.folder() / "test.jsonl"))
    assert len(tasks) > 2
    weights = request(ONE_TASK, bed.folder(), tmp_path).objective(tasks).weights
    assert weights == dict.fromkeys(tasks[1:], 0.0)
    assert not request(WHOLE, bed.folder(), tmp_path).objective(tasks).weights


def test_chosen_records_find_their_media_elsewhere(bed: Bed, tmp_path: Path) -> None:
    records = read_records(bed.folder() / "test.jsonl")
    write_chosen(records, tmp_path / "deep" / "chosen.jsonl")
    again = read_records(tmp_path / "deep" / "chosen.jsonl")
    for was, now in zip(records, again, strict=True):
        assert (now.kind, now.text, now.answer, now.extra) == (
            was.kind,
            was.text,
            was.answer,
            was.extra,
        )
        assert (now.media is None) == (was.media is None)
        assert now.media is None or now.media.samefile(was.file)


def test_a_method_without_a_record_is_refused(bed: Bed, tmp_path: Path) -> None:
    only_pictures = comparisons.Method("none", "", kinds=("speech",))
    with pytest.raises(DataError, match="has no record of kind"):
        request(only_pictures, bed.folder(), tmp_path)


# -- rows ------------------------------------------------------------------------------------------


def test_rows_are_every_budget_and_seed_once(bed: Bed) -> None:
    kinds = {TEXT, QUESTION, GENERATION}
    rows = rows_of(bed, ("budgets", "ablations"), 2, kinds)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    # Two methods at two budgets, and four ablations at the middle one, of two seeds.
    assert len(rows) == 2 * (2 * 2 + 4)
    with pytest.raises(UsageError, match="unknown part 'speed'"):
        rows_of(bed, ("speed",), 1, kinds)


def test_ablations_that_change_nothing_are_left_out() -> None:
    """Sound alone has no text to calibrate on, no generation to leave out, and a single task."""
    rows = rows_of(multimodal.BEDS["speech"], ("ablations", "further"), 1, {"speech"})
    assert [row.method for row in rows] == [WHOLE, UNWEIGHTED, UNIFORM, REFINED]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Row]:
    """Rows that were really measured; cache and result files lie in folders of the test."""
    done: list[Row] = []

    def measure(row: Row, judging: Judging) -> dict[str, Any]:
        done.append(row)
        return {"bytes": 1, "figures": []}

    monkeypatch.setattr(artifacts, "folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(multimodal, "_measure", measure)
    return done


def written(bed: Bed) -> dict[str, Any]:
    """The bed's result file."""
    found: dict[str, Any] = json.loads(record.path_of(f"multimodal_{bed.name}").read_text())
    return found


def test_a_row_is_measured_once_until_its_data_change(bed: Bed, counted: list[Row]) -> None:
    row = Row(bed, WHOLE, 4.0, 0)
    few, many = Judging(bed, 10), Judging(bed, 20)
    first = measured(row, few)
    assert measured(row, few) == first
    assert len(counted) == 1
    measured(Row(bed, WHOLE, 4.0, 1), few)
    measured(row, many)
    assert len(counted) == 3, "another seed, and more test records"
    measured(row, many, again=True)
    assert len(counted) == 4
    test = bed.folder() / "test.jsonl"
    before = test.read_text()
    test.write_text(before + json.dumps({"text": "more"}) + "\n")
    try:
        measured(row, many)
    finally:
        test.write_text(before)
    assert len(counted) == 5


def test_the_result_file_has_every_row_that_is_kept(
    bed: Bed, counted: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One seed measured after another, and each budget by itself: nothing is lost between."""
    monkeypatch.setitem(multimodal.BEDS, "tiny", bed)
    multimodal.main("tiny", ["budgets"], 1, [4.0], 10)
    first = written(bed)["rows"]
    assert len(first) == 2
    multimodal.main("tiny", ["budgets"], 2, [6.0], 10)
    kept = [(row["method"], row["bits"], row["seed"]) for row in written(bed)["rows"]]
    assert len(kept) == len(set(kept)) == 6
    assert {bits for _, bits, _ in kept} == {4.0, 6.0}
    assert all(row in written(bed)["rows"] for row in first)
    assert all(row["date"] and row["machine"] for row in first), "rows may be of several machines"


def test_a_run_that_is_stopped_leaves_its_rows_in_the_result_file(
    bed: Bed, counted: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_the_second(row: Row, judging: Judging) -> dict[str, Any]:
        if row.method == LANGUAGE_ONLY:
            raise KeyboardInterrupt
        return {"bytes": 1, "figures": []}

    monkeypatch.setitem(multimodal.BEDS, "tiny", bed)
    monkeypatch.setattr(multimodal, "_measure", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        multimodal.main("tiny", ["budgets"], 1, [4.0], 10)
    assert [row["method"] for row in written(bed)["rows"]] == [WHOLE.name]


def test_another_machine_goes_on_where_the_result_file_is(
    bed: Bed, counted: list[Row], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its cache is empty and its processor another one: a row whose model, data and settings are
    the same is not measured again, and one that has become stale is."""
    monkeypatch.setitem(multimodal.BEDS, "tiny", bed)
    multimodal.main("tiny", ["budgets"], 1, [4.0], 10)
    first = written(bed)["rows"]
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(record, "machine", lambda: "another")
    multimodal.main("tiny", ["budgets"], 2, [4.0], 10)
    assert [row.seed for row in counted] == [0, 0, 1, 1]
    assert written(bed)["rows"][:2] == first
    assert {row["machine"] for row in written(bed)["rows"][2:]} == {"another"}
    shutil.rmtree(tmp_path / "cache")
    newer = dataclasses.replace(bed, version=bed.version + 1)
    monkeypatch.setitem(multimodal.BEDS, "tiny", newer)
    multimodal.main("tiny", ["budgets"], 1, [4.0], 10)
    assert len(counted) == 6
    assert [row["seed"] for row in written(bed)["rows"]] == [0, 0]
    assert [row["seed"] for row in written(bed)["stale_rows"]] == [1, 1]


def test_the_result_file_is_read_once_for_all_rows_and_again_when_it_is_another(
    bed: Bed, counted: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(multimodal.BEDS, "tiny", bed)
    multimodal.main("tiny", ["budgets"], 2, [4.0], 10)
    path, reads, read = record.path_of("multimodal_tiny"), [], multimodal.read_json
    monkeypatch.setattr(multimodal, "read_json", lambda p: (reads.append(p), read(p))[1])
    rows = [Row(bed, WHOLE, 4.0, seed) for seed in range(4)]
    states = ["measured", "measured", "missing", "missing"]
    assert [state_of(row, 10) for row in rows] == states
    assert reads.count(path) <= 1
    for row in rows:
        row.file.unlink(missing_ok=True)
    assert [state_of(row, 10) for row in rows] == states
    assert reads.count(path) <= 1
    path.write_text('{"rows": []}')
    assert [state_of(row, 10) for row in rows] == ["missing"] * 4
    assert reads.count(path) <= 2


def test_a_damaged_result_file_is_not_written_over(
    bed: Bed, counted: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = record.path_of("multimodal_tiny")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    monkeypatch.setitem(multimodal.BEDS, "tiny", bed)
    with pytest.raises(typer.Exit):
        multimodal.main("tiny", ["budgets"], 1, [4.0], 10)
    assert path.read_text() == "{"
    assert not counted


def test_rows_of_an_older_method_are_stale(
    bed: Bed,
    counted: list[Row],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are listed as such, and a run measures them again without being asked to."""
    monkeypatch.setitem(multimodal.BEDS, "tiny", bed)
    row = Row(bed, WHOLE, 4.0, 0)
    assert state_of(row, 10) == "missing"
    measured(row, Judging(bed, 10))
    assert state_of(row, 10) == "measured"
    newer = dataclasses.replace(bed, version=bed.version + 1)
    monkeypatch.setitem(multimodal.BEDS, "tiny", newer)
    row = dataclasses.replace(row, bed=newer)
    assert state_of(row, 10) == "stale"
    multimodal.main("tiny", ["budgets"], 1, [4.0], 10, only_list=True)
    assert capsys.readouterr().out.splitlines() == [
        "stale     whole-4-0",
        "missing   language-model-only-4-0",
    ]
    measured(row, Judging(bed, 10))
    assert len(counted) == 2


def test_stale_rows_stay_in_the_result_file_and_are_compared_with_nothing(
    bed: Bed, counted: list[Row]
) -> None:
    raised = dataclasses.replace(bed, version=bed.version + 1)
    older, newer = Row(raised, WHOLE, 4.0, 0), Row(raised, WHOLE, 4.0, 1)
    measured(Row(bed, WHOLE, 4.0, 0), Judging(bed, 10))
    measured(newer, Judging(raised, 10))
    multimodal.write_results(raised, [older, newer], 10)
    assert [row["seed"] for row in written(raised)["rows"]] == [1]
    assert [row["seed"] for row in written(raised)["stale_rows"]] == [0]


def test_a_damaged_row_is_measured_again(bed: Bed, counted: list[Row]) -> None:
    row = Row(bed, WHOLE, 4.0, 0)
    measured(row, Judging(bed, 10))
    row.file.write_text("{")
    measured(row, Judging(bed, 10))
    assert len(counted) == 2


def test_a_budget_that_nothing_fits_is_a_row_that_says_so(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise SearchError("the least that is possible is 9 MB")

    monkeypatch.setattr(artifacts, "folder", lambda: tmp_path)
    monkeypatch.setattr(multimodal, "compressed", refuse)
    row = Row(bed, LANGUAGE_ONLY, 4.0, 0)
    assert measured(row, Judging(bed, 10))["infeasible"].endswith("is 9 MB")


QUICK = {
    "windows": 4,
    "probe_windows": 2,
    "probes": 0,
    "passes": 0,
    "schemes": ["w4g32zs4", "w8g32zs6"],
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bed with a tiny random LLaVA, and records of text and pictures."""
    folder = tmp_path_factory.mktemp("llava")
    whole_models.save("llava_dinov2", folder / "model")
    whole_models.records("llava_dinov2", folder).rename(folder / "calibration.jsonl")
    shutil.copy(folder / "calibration.jsonl", folder / "test.jsonl")
    return folder


def test_a_row_is_compressed_and_judged(
    llava: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through the real pipeline and evaluation: the file is within its budget, the figures are of
    every task, the checkpoint is gone, and too small a budget is a row, too."""
    monkeypatch.setattr(artifacts, "folder", lambda: tmp_path / "cache")
    bed = Bed("tiny", lambda: llava, (20.0,), 20.0, "w4g32zs4")
    row = Row(bed, dataclasses.replace(WHOLE, recipe=QUICK), 20.0, 0)
    with Judging(bed, 3) as judging:
        found = measured(row, judging)
        assert found["true_bits"] <= 20.0
        assert found["kept_in_16_bits"] == []
        assert {figure["task"] for figure in found["figures"]} == {"text", "answer"}
        assert json.loads(row.file.read_text()) == found
        assert not list(row.folder().glob(".out-*"))
        small = measured(dataclasses.replace(row, bits=1.0), judging)
        assert "infeasible" in small
        assert "figures" not in small
        language = dataclasses.replace(LANGUAGE_ONLY, recipe=QUICK)
        other = measured(dataclasses.replace(row, method=language, bits=30.0), judging)
        again = dataclasses.replace(REFINED, recipe={**QUICK, **REFINED.recipe})
        asked = request(again, llava, tmp_path / "records")
        refined = compressed(asked, bed, row.folder(), tmp_path / "refined", 20.0, 0)
    assert len(list(row.folder().glob("work-*"))) == 1, "one calibration serves all methods"
    assert refined.nbytes == found["bytes"]
    assert "vision_tower" in other["kept_in_16_bits"]
    assert other["bytes"] > found["bytes"], "the tower as it was: its file has 32 bits"


def test_no_task_loses_more_than_with_bits_for_the_language_model_alone(
    llava: Path, tmp_path: Path
) -> None:
    """By prediction, at the same size: at most the smallest share of it that a plan can keep. And
    where the language model alone cannot be made so small, nothing is asked."""
    leaving = {**QUICK, "schemes": [*QUICK["schemes"], "w2g32z4s4", "f32"]}
    recipe = recipe_for(Budget(), data=str(llava / "calibration.jsonl"), **leaving)
    with opened(llava / "model", tmp_path / "work", recipe) as run:
        table = measured_table(run)
        others = {w.component for w in run.model_map.weights} - {*comparisons.WORDS}
        words, theirs = sparing(run, table, others)
        fixed = 8 * bytecount.fixed_bytes(words.model_map, 1 << 40) / run.model_map.parameters
        budget = Budget(bits=fixed + 4)
        impossible = 1e-9
        guard = guarded(run, table, budget, (impossible, 0.9, 1.0))
        language, _, _ = search(words.model_map, theirs, budget)
        plan, problem, solution = search(run.model_map, table, guard)
        losses = problem.task_losses(solution.picks)
        assert set(guard.task_limits) == set(table.tasks)
        for task, limit in guard.task_limits.items():
            spent = sum(theirs.entry(n, s).loss[task] for n, s in language.schemes.items())
            assert limit == pytest.approx(0.9 * spent, rel=1e-9, abs=0)
            assert losses[task] <= limit * (1 + 1e-9)
        assert plan.bytes <= budget.in_bytes(run.model_map)
        assert guarded(run, table, budget, (impossible,)) == budget
        small = Budget(bits=fixed / 2)
        assert guarded(run, table, small, (1.0,)) == small


def test_what_no_record_runs_is_rounded_plainly(llava: Path, tmp_path: Path) -> None:
    """With text alone nothing is known of the tower: its weights are the nearest of their format,
    and the whole checkpoint still fits the budget that `whole` has."""
    method = dataclasses.replace(TEXT_ONLY, recipe=QUICK)
    asked = request(method, llava, tmp_path)
    assert "vision_tower" in asked.unread
    bed = Bed("tiny", lambda: llava, (20.0,), 20.0, "w4g32zs4")
    packed = compressed(asked, bed, tmp_path, tmp_path / "out", 20.0, 0)
    assert packed.kept == ()
    plan = Plan.load(tmp_path / "out" / PLAN_FILE, Source.open(llava / "model").fingerprint)
    weights = ModelMap.from_source(Source.open(llava / "model")).weights
    assert set(plan.schemes) == {weight.name for weight in weights}
    tower = next(w for w in weights if w.component == "vision_tower" and w.kind == "linear")
    assert plan.schemes[tower.name] == "w4g32zs4"
    original = Source.open(llava / "model").read(tower.name).float()
    segments = Scheme.parse("w4g32zs4").segments(tower.in_features)
    stored = read_layout(tmp_path / "out").quantized(tower.name)
    assert torch.equal(dequantize(stored), dequantize(quantize_rtn(original, segments)))


# -- the table -------------------------------------------------------------------------------------


def row(method: str, seed: int, **values: float) -> dict[str, Any]:
    figures = [
        {
            "task": "answer",
            "name": name,
            "better": "higher" if name == "right" else "lower",
            "model": {"value": value},
            "reference": {"value": 0.9} if name == "right" else None,
        }
        for name, value in values.items()
    ]
    return {"method": method, "bits": 4.0, "seed": seed, "figures": figures}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        row("whole", 0, KL=0.1, right=0.9),
        row("whole", 1, KL=0.3, right=0.8),
        row("language model only", 0, KL=0.4, right=0.95),
        {"method": "text only", "bits": 4.0, "seed": 0, "infeasible": "at least 9 MB"},
    ]


def test_means_and_winners_follow_from_the_rows(rows: list[dict[str, Any]]) -> None:
    divergence, right = compared(rows)
    assert divergence["mean"] == {
        "whole": 0.2,
        "language model only": 0.4,
        "text only": None,
    }
    assert divergence["range"]["whole"] == [0.1, 0.3]
    assert divergence["seeds"] == {"whole": 2, "language model only": 1, "text only": 0}
    assert divergence["whole_is_better"] == {"language model only": True, "text only": None}
    assert right["whole_is_better"]["language model only"] is False
    assert (divergence["reference"], right["reference"]) == (None, 0.9)


def test_the_table_has_a_line_for_every_figure(rows: list[dict[str, Any]]) -> None:
    lines = table(compared(rows)).splitlines()
    assert lines[0] == "4 bits  answer: KL  whole 0.2  language model only 0.4  text only -"
    assert lines[1].endswith("(full precision 0.9)")


def test_tasks_are_won_by_seeds_that_are_closer_to_full_precision() -> None:
    def pair(seed: int, mine: float, theirs: float) -> list[dict[str, Any]]:
        named = {"KL per token (nats)": mine, "right": 0.9}
        other = {"KL per token (nats)": theirs, "right": 0.8}
        return [row("whole", seed, **named), row("language model only", seed, **other)]

    (entry,) = by_task([*pair(0, 0.1, 0.4), *pair(1, 0.3, 0.3), *pair(2, 0.5, 0.3)])
    assert (entry["closer"], entry["as close"], entry["farther"]) == (1, 1, 1)
    assert entry["whole"] == pytest.approx(0.3)
    assert entry["language model only"] == pytest.approx(1 / 3)
    alone = [row("whole", 0, **{"KL per token (nats)": 0.1})]
    assert by_task(alone) == []
    lacking = {"method": "language model only", "bits": 4.0, "seed": 0, "infeasible": "no"}
    (entry,) = by_task([*alone, lacking])
    assert entry["whole"] == 0.1
    assert entry["language model only"] is entry["closer"] is entry["farther"] is None


@pytest.mark.parametrize(("error", "sure"), [(0.05, 1), (0.15, 0), (None, 1)])
def test_a_seed_is_surely_farther_beyond_two_standard_errors(
    error: float | None, sure: int
) -> None:
    """0.5 against 0.3: the error of the difference is 0.07 or 0.21."""
    pair = [
        row(method, 0, **{"KL per token (nats)": value})
        for method, value in (("whole", 0.5), ("language model only", 0.3))
    ]
    for one in pair:
        one["figures"][0]["model"]["standard_error"] = error
    (entry,) = by_task(pair)
    assert (entry["farther"], entry["surely farther"]) == (1, sure)


def test_points_are_of_shares_and_positive_where_something_was_lost() -> None:
    rows = [
        row("whole", seed, **{"answers right": value}) for seed, value in ((0, 0.85), (1, 0.93))
    ]
    for one in rows:
        one["figures"][0] |= {"better": "higher", "reference": {"value": 0.9}}
    (entry,) = points_lost(compared(rows))
    assert entry == {
        "bits": 4.0,
        "task": "answer",
        "figure": "answers right",
        "points": pytest.approx(1.0),
    }
    assert points_lost(compared([row("whole", 0, right=0.9)])) == []


def test_the_command_refuses_a_bed_it_does_not_know() -> None:
    with pytest.raises(typer.Exit) as caught:
        multimodal.main("smell", None, 1, None, 10)
    assert caught.value.exit_code == 2
