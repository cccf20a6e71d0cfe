"""The two classifiers: small, mapped completely, and trained on what they should be."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from quantlib.bench import record, trained_search
from quantlib.bench.beds import fashion_networks
from quantlib.bench.beds.fashion import FASHION
from quantlib.bench.beds.fashion_networks import (
    BATCH,
    NETWORKS,
    SHIFT,
    SIDE,
    Pictures,
    answers,
    classification,
    likeness,
    normalised,
    pictures,
    varied,
)
from quantlib.bench.seeds import interval
from quantlib.bench.trained_search import ENTRIES, Row
from quantlib.bench.trained_table import as_hex, compared, from_hex, paired, table
from quantlib.errors import DataError
from quantlib.pipeline.trained import Trainable
from quantlib.search.trained.layers import Layers, Space, decisions
from quantlib.search.trained.numbers import space_of


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a small data set in the real one's form: 5,040 pictures, 20 of them to train."""
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / FASHION.name
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 5020), ("t10k", 30)):
        labels = torch.randint(0, 10, (count,), generator=generator, dtype=torch.uint8)
        pixels = torch.randint(0, 99, (count, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        pixels += (labels * 15)[:, None, None]  # a kind is a brightness
        for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            data = gzip.compress(head + values.numpy().tobytes(), 1)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(data)
    return cache


def test_the_splits_do_not_overlap(cache: Path) -> None:
    sizes = {name: len(pictures(name, cache)) for name in ("train", "held_out", "test")}
    assert sizes == {"train": 20, "held_out": 5000, "test": 30}
    with pytest.raises(DataError, match="no 'dev'"):
        pictures("dev", cache)


@pytest.mark.parametrize(("name", "weights", "decided"), [("resnet", 16, 16), ("vit", 20, 14)])
def test_every_parameter_of_a_network_has_its_row(
    tmp_path: Path, name: str, weights: int, decided: int
) -> None:
    network = NETWORKS[name]
    network.drawn(0).save_pretrained(tmp_path / "model")
    trainable = Trainable.open(tmp_path / "model")
    found = trainable.model_map
    assert found.parameters >= sum(p.numel() for p in network.build().parameters())
    assert len(found.weights) == weights
    space = Space(decisions(found.weights, space_of("int-s")))
    assert len(space.numbers) == decided
    widths = network.widths(trainable, (0.5, 1.0))
    assert len(widths) == {"resnet": 3, "vit": 1}[name]
    assert Space(space.numbers, widths).widths == widths, "about weights that have a format"
    layers = Layers(trainable.model, space)
    example = torch.zeros(1, 1, SIDE, SIDE)
    products = layers.count_products(lambda: trainable.model(pixel_values=example))
    assert 1e5 < sum(products.values()) < 2e6
    assert all(p.requires_grad for p in trainable.model.parameters())


def test_a_seed_draws_a_network() -> None:
    for network in NETWORKS.values():
        first, again, other = (network.drawn(seed).state_dict() for seed in (0, 0, 1))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)


def test_pictures_are_varied_by_shifts_and_mirrors() -> None:
    dot = torch.zeros(200, SIDE, SIDE, dtype=torch.uint8)
    dot[:, 10, 8] = 255
    moved = varied(normalised(dot), torch.Generator().manual_seed(0))
    places = {tuple((image[0] > 0).nonzero()[0].tolist()) for image in moved}
    rows = range(10 - SHIFT, 10 + SHIFT + 1)
    mirrored = SIDE - 1 - 8
    columns = {c + by for c in (8, mirrored) for by in range(-SHIFT, SHIFT + 1)}
    assert places <= {(r, c) for r in rows for c in columns}
    assert len(places) > 30  # of 50
    assert bool((moved.amax((1, 2, 3)) == normalised(dot).amax()).all())


def test_the_task_counts_right_answers(cache: Path) -> None:
    data, model = pictures("held_out", cache), NETWORKS["vit"].drawn(0)
    outcome = classification(data)(model, 0, torch.Generator().manual_seed(0))
    assert outcome.quality * BATCH == pytest.approx(round(outcome.quality * BATCH))
    assert outcome.loss.requires_grad
    few = Pictures(data.pixels[:7], data.labels[:7])
    with torch.no_grad():
        expected = model.eval()(pixel_values=few.pixels).logits.argmax(1) == few.labels
    assert torch.equal(answers(model, few, batch=3), expected)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_likeness_is_to_the_network_before(name: str, cache: Path) -> None:
    """Nothing is unlike itself, and rounding moves a network further the coarser it is."""
    data, network = pictures("held_out", cache), NETWORKS[name]
    task = likeness(network.drawn(0).train(), data)

    def judged(scale: float) -> float:
        model = network.drawn(0).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + scale)
        outcome = task(model, 0, torch.Generator().manual_seed(0))
        assert outcome.loss.requires_grad
        assert outcome.quality == -float(outcome.loss.detach())
        return outcome.quality

    assert judged(0.0) == pytest.approx(0.0, abs=1e-6)
    assert judged(0.5) < judged(0.1) < -1e-6


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_what_ships_answers_as_what_was_trained(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search on each network, to the packed checkpoint: not one answer changes."""
    monkeypatch.setattr(trained_search.artifacts, "folder", lambda: tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(trained_search, "BEFORE", {"resnet": 10, "vit": 10})
    monkeypatch.setattr(trained_search, "STEPS", 12)
    monkeypatch.setattr(trained_search, "BATCHES", 1)
    short = {n: replace(s, delay=2, settle=3) for n, s in trained_search.SEARCHES.items()}
    monkeypatch.setattr(trained_search, "SEARCHES", short)
    monkeypatch.setattr(
        trained_search, "pictures", lambda split: fashion_networks.pictures(split, cache)
    )
    for method in (
        "fliqs-mixed",
        "fliqs-float-8th",
        "csq",
        "fliqs-int-width",
        "exact-alike",
        "random",
    ):
        row = Row(NETWORKS[name], ENTRIES[method], 0)
        found = trained_search.measured(row)
        assert found["checkpoint"] is not None
        assert found["checkpoint"]["changed"] == 0
        assert found["checkpoint"]["bytes"] <= found["checkpoint"]["planned_bytes"]
        allowed = 32 if method.endswith("8th") else 16
        assert found["bits_product"] <= allowed * (1 + 1e-9)
        assert trained_search.measured(row) == found, "rows are made once"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Rows that were really trained; cache and result file lie in folders of the test."""
    done: list[str] = []

    def measure(row: Row, source: Path) -> dict[str, Any]:
        done.append(row.name)
        right = torch.rand(40, generator=torch.Generator().manual_seed(len(done))) < 0.8
        accuracy = float(right.float().mean())
        figures = {"began_with": source.name, "accuracy": accuracy, "pictures": 40}
        return {**figures, "right": as_hex(right), "bits_product": 16.0}

    monkeypatch.setattr(trained_search.artifacts, "folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(trained_search, "trained_before", lambda _, seed: Path(f"drawn-{seed}"))
    monkeypatch.setattr(trained_search, "_measure", measure)
    return done


def written() -> dict[str, Any]:
    """The result file."""
    found: dict[str, Any] = json.loads(record.path_of("search_trained").read_text())
    return found


def test_another_machine_goes_on_where_the_result_file_is(
    counted: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its cache is empty: rows whose settings are the same are not made again, and differences are
    still taken picture by picture."""
    trained_search.main(["vit"], ["int4", "e2m1"], 1, 0, False, False)
    first = written()
    shutil.rmtree(tmp_path / "cache")
    trained_search.main(["vit"], ["int4", "e2m1"], 2, 0, False, False)
    assert counted == ["vit-int4-0", "vit-e2m1-0", "vit-int4-1", "vit-e2m1-1"]
    assert [row for row in written()["rows"] if row["seed"] == 0] == first["rows"]
    monkeypatch.setattr(trained_search, "STEPS", 7)
    trained_search.main(["vit"], ["int4"], 1, 0, False, False)
    assert counted[4:] == ["vit-int4-0"], "other settings"
    assert len(written()["rows"]) == 4


def test_rows_whose_answers_were_not_kept_stay_and_count(
    counted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As result files were written once: without keys and answers."""

    def listed() -> list[list[str]]:
        capsys.readouterr()
        trained_search.main(["vit"], ["int4", "full"], 1, 0, False, True)
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    trained_search.main(["vit"], ["int4", "e2m1"], 2, 0, False, False)
    old = written()
    assert listed() == [["there", "vit-int4-0"], ["missing", "vit-full-0"]]
    bare = [{k: v for k, v in row.items() if k not in NEW_FIGURES} for row in old["rows"]]
    record.path_of("search_trained").write_text(json.dumps({**old, "rows": bare}))
    shutil.rmtree(tmp_path / "cache")
    assert listed()[0] == ["older", "vit-int4-0"]
    trained_search.main(["vit"], ["full"], 1, 2, False, False)
    again = written()
    by_name = {entry["method"]: entry for entry in again["comparison"]}
    before = {entry["method"]: entry for entry in old["comparison"]}
    assert by_name["e2m1"] == before["e2m1"], "what was told with answers is kept"
    trained_search.main(["vit"], ["int4", "e2m1"], 1, 2, False, False)
    found = next(e for e in written()["comparison"] if e["method"] == "e2m1")
    rows = {(row["method"], row["seed"]): row["accuracy"] for row in written()["rows"]}
    differences = [rows["e2m1", seed] - rows["int4", seed] for seed in range(3)]
    assert found["seeds"] == [0, 1, 2]
    assert found["over_int4"]["mean"] == pytest.approx(100 * sum(differences) / 3)
    students = interval([100 * value for value in differences])["half_width"]
    assert students is not None
    assert found["over_int4"]["half_width"] == pytest.approx(
        max(students, found["over_int4"]["on_pictures"])
    )


NEW_FIGURES = ("key", "right", "began_with", "date", "machine")


def test_rows_are_paired_only_where_they_began_with_the_same_network() -> None:
    def row(method: str, machine: str) -> dict[str, Any]:
        named = {"network": "n", "method": method, "seed": 0, "began_with": machine}
        figures = {"accuracy": 0.5, "pictures": 8, "right": "f0"}
        return {**named, **figures, "bits_product": 16.0, "seconds": 1}

    apart = compared([row("int4", "one"), row("fliqs", "another")])
    together = compared([row("int4", "one"), row("fliqs", "one")])
    assert "over_int4" not in apart[1]
    assert together[1]["over_int4"]["mean"] == 0


def test_a_damaged_result_file_is_not_written_over(counted: list[str]) -> None:
    path = record.path_of("search_trained")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(typer.Exit):
        trained_search.main(["vit"], ["int4"], 1, 0, False, False)
    assert path.read_text() == "{"
    assert not counted


def test_intervals_are_students() -> None:
    assert interval([1.0]) == {"mean": 1.0, "half_width": None}
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["half_width"] == pytest.approx(4.3027 / 3**0.5, rel=1e-4)  # a table's t, 2 degrees


def test_answers_are_kept_to_the_picture() -> None:
    right = torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.8
    assert np.array_equal(from_hex(as_hex(right), 1003), right.numpy())


def test_differences_are_taken_within_a_seed_picture_by_picture() -> None:
    def row(method: str, seed: int, right: list[bool]) -> dict[str, Any]:
        answers = {"right": as_hex(torch.tensor(right)), "pictures": len(right)}
        accuracy = sum(right) / len(right)
        named = {"network": "n", "method": method, "seed": seed, "accuracy": accuracy}
        return named | answers | {"bits_product": 16.0, "seconds": 1}

    rows = [
        row("int4", 0, [True, False] * 20),
        row("int4", 1, [True] * 40),
        row("fliqs", 0, [True, False] * 18 + [True] * 4),
        row("fliqs", 2, [True] * 36 + [False] * 4),
    ]
    figures = compared(rows)
    (fliqs,) = [entry for entry in figures if entry["method"] == "fliqs"]
    assert fliqs["over_int4"]["mean"] == pytest.approx(5)  # 2 of 40 pictures
    assert fliqs["over_int4"]["half_width"] is None  # one seed has both
    deviation = (0.05 * 0.95 * 40 / 39) ** 0.5
    assert fliqs["over_int4"]["on_pictures"] == pytest.approx(196 * deviation / 40**0.5, rel=1e-3)
    assert "over_full" not in fliqs
    assert "| n | fliqs | 16.00 | 72.50 ±" in table(figures)


@pytest.mark.parametrize(
    ("by_seed", "by_picture", "noise"), [(0.0, 0.0, 1.0), (0.5, 0.0, 0.2), (0.0, 2.0, 0.2)]
)
def test_intervals_hold_what_they_say(by_seed: float, by_picture: float, noise: float) -> None:
    """Of 400 repetitions 95 % contain the truth, 0, whatever varies; more where nothing but noise
    does, as the interval is never shorter than that over pictures alone."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        differences = by_seed * generator.standard_normal((4, 1))
        differences = differences + by_picture * generator.standard_normal((1, 50))
        differences = differences + noise * generator.standard_normal((4, 50))
        found = paired(differences.mean(1).tolist(), differences)
        assert found["mean"] is not None
        assert found["half_width"] is not None
        inside += abs(found["mean"]) <= found["half_width"]
    assert 0.925 * 400 <= inside < 400  # 95 % less 2.3 standard errors; intervals end somewhere
