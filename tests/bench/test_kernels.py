"""`bench kernels`: rows say what was measured, and a missing peer is a sentence, not an error."""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from quantlib.bench import kernels, roofs
from quantlib.bench.peers import linear, torch_dense
from quantlib.bench.peers.linear import Bind, LinearPeer, PeerMissing
from quantlib.cli import console
from quantlib.kernels.cpu import library

PLAN = kernels.Plan(shapes=((96, 160),), schemes=("w3g128", "w4g64z5s5"), tokens=(1, 8), rounds=2)


def absent(rows: int, columns: int) -> Bind:
    raise PeerMissing("absent is not installed: run `make peers`")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of everything, one peer that is there and one that is not."""
    monkeypatch.setattr(linear, "MAX_COPIES", 2)
    monkeypatch.setattr(roofs, "READ_BYTES", 1 << 20)
    present = LinearPeer("torch float32", 32, lambda n, k: torch_dense.prepare("float32", n, k))
    monkeypatch.setattr(kernels, "peers", lambda: [present, LinearPeer("absent", 4, absent)])


def test_a_row_for_every_scheme_and_number_of_tokens(small: None) -> None:
    found = kernels.run(PLAN)
    rows = found["rows"]
    assert [(r["scheme"], r["M"]) for r in rows] == [
        (scheme, tokens) for tokens in PLAN.tokens for scheme in PLAN.schemes
    ]
    for row in rows:
        assert (row["op"], row["N"], row["K"]) == ("linear", 96, 160)
        assert list(row["peers"]) == ["torch float32"] == [row["best_peer"]]
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["ms"] <= high < math.inf
        assert row["roof_share"] == pytest.approx(row["roof_ms"] / row["ms"])
        assert row["times_as_fast"] == {"torch float32": row["ratio"]}
        assert 0 < row["ratio"] < math.inf
        assert row["speed_of_w4g128"] is None  # no such row to compare with
    assert set(found["roofs"]) == {"read_gb_per_s", "multiply_gop_per_s"}
    assert found["peers_missing"] == {"absent, 96x160": "absent is not installed: run `make peers`"}


def test_without_any_peer_there_is_nothing_to_compare(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "peers", lambda: [LinearPeer("absent", 4, absent)])
    row = kernels.run(kernels.Plan(((32, 64),), ("w8g128",), (1,), 1))["rows"][0]
    assert (row["peers"], row["best_peer"], row["ratio"]) == ({}, None, None)


def test_the_roof_is_that_of_the_packed_bytes() -> None:
    """40 bytes at 10 bytes a second and 2 * 3 * 4 * 5 operations at 1000: reading takes longer."""
    measured = roofs.Measured(10.0, 1000.0)
    times, base = [7000.0, 8000.0, 9000.0], [14000.0, 8000.0, 18000.0]
    row = kernels._row("w4g128", (4, 5), 3, times, {}, base, 40, measured)
    assert row["roof_ms"] == pytest.approx(4000.0)
    assert row["roof_share"] == pytest.approx(0.5)
    assert row["speed_of_w4g128"] == pytest.approx(2.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`measured("--quick")`: main with a stand-in for the measurement; what was kept."""

    def call(*arguments: str) -> list[str]:
        kept: list[str] = []
        monkeypatch.setattr(kernels, "run", lambda plan: result(plan))
        monkeypatch.setattr(kernels.record, "write", lambda name, _: kept.append(name))
        monkeypatch.setattr(kernels.record, "of_kernels", "{}_avx".format)
        kernels.main(arguments)
        return kept

    return call


def result(plan: kernels.Plan) -> dict[str, Any]:
    times = [1.0, 2.0, 3.0]
    measured = roofs.Measured(1e9, 0.0)
    rows = [
        kernels._row("w4g128", (4096, 4096), tokens, times, peers, times, 8, measured)
        for tokens, peers in ((1, {"torch float32": [4.0, 8.0, 12.0]}), (8, {}))
    ]
    judged = kernels.of_kernels(rows, {"torch float32": 32})
    return {
        "threads": plan.rounds,
        "roofs": measured.to_json(),
        "peers_missing": {"onnx": "onnx [is] not there"},
        "targets": [target.to_json() for target in judged],
        "rows": rows,
    }


def test_json_is_one_document(
    measured: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured("--json", "--quick") == []
    found = json.loads(capsys.readouterr().out)
    assert {"rows", "roofs", "targets", "peers_missing", "threads"} == set(found)
    assert found["threads"] == kernels.QUICK.rounds


def test_only_a_full_run_is_kept(measured: Callable[..., list[str]]) -> None:
    assert measured() == ["kernels_avx"]


def test_a_result_is_named_after_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded, suffix in ((SimpleNamespace(isa="avx2"), "avx2"), (None, "reference")):
        monkeypatch.setattr(library, "load", lambda loaded=loaded: loaded)
        assert kernels.record.of_kernels("kernels") == f"kernels_{suffix}"


def test_the_table_shows_rows_targets_and_who_is_missing(
    measured: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    measured("--quick")
    printed = capsys.readouterr().out
    assert "torch float32 8.000" in printed
    assert "none" in printed, "a row without peers"
    assert "met    w4g128 4096x4096 M=1: speed against the best peer 4.00, wanted 1.6" in printed
    assert "missed w4g128 4096x4096 M=1: share of the read bandwidth 0.00, wanted 0.9" in printed
    assert "onnx [is] not there" in printed


def test_wide_tables_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Console(width=console._WIDE, record=True, highlight=False)
    kernels.show(result(kernels.QUICK), made)
    assert "…" not in made.export_text()
