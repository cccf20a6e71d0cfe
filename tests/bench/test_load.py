"""`bench.load`: one reading and one loading make a ratio, and the worst memory counts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantlib.bench import footprint, load
from quantlib.bench.checkpoints import Schemes, pack_rounded
from quantlib.kernels.cpu import library


def row(read: float, loaded: float, resident: int) -> dict[str, Any]:
    """A footprint whose cold figures are twice the warm ones."""
    found: dict[str, Any] = {"bytes": 10**9, "resident_bytes": resident}
    for state, factor in (("warm", 1), ("cold", 2)):
        found[f"read_s_{state}"] = read * factor / 4
        found[f"keep_s_{state}"] = read * factor
        found[f"load_s_{state}"] = loaded * factor
        found[f"first_token_s_{state}"] = loaded * factor + 1
    return found


def test_ratios_are_those_of_one_round_and_the_most_memory_is_judged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rounds: Iterator[dict[str, Any]] = iter(
        [row(1.0, 1.5, 10**9), row(2.0, 5.0, 2 * 10**9), row(4.0, 6.0, 10**9)]
    )
    turns = []

    def measured(checkpoint: Path, load_first: bool) -> dict[str, Any]:
        turns.append(load_first)
        return next(rounds)

    monkeypatch.setattr(footprint, "measure", measured)
    found = load.measure("m", tmp_path, 3)
    assert turns == [False, True, False]
    assert found["medians"]["warm"]["read_s"] == 0.5
    assert found["medians"]["warm"]["keep_s"] == 2.0
    assert found["medians"]["warm"]["load_s"] == 5.0
    assert found["medians"]["cold"]["first_token_s"] == 11.0
    # 1.5, 2.5 and 1.5: not 5 / 2, the ratio of the medians
    assert found["medians"]["warm"]["reads"] == found["medians"]["cold"]["reads"] == 1.5
    *times, memory = found["targets"]
    assert [target["met"] for target in times] == [True, True]
    assert memory["value"] == pytest.approx((1.1e9 + 150e6) / 2e9)
    assert not memory["met"]


@pytest.mark.skipif(library.load() is None, reason="no compiled kernels")
def test_a_checkpoint_is_read_and_loaded(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack_rounded(tiny_llama(tmp_path / "m"), tmp_path / "p", Schemes("w4g32", "w8g32"))
    monkeypatch.setattr(footprint, "_load_elsewhere", footprint.load_here)
    (found,) = load.measure("tiny", packed, 1)["rows"]
    assert found["bytes"] == sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    for state in load.STATES:
        assert 0 < found[f"load_s_{state}"] < found[f"first_token_s_{state}"]
        assert found[f"read_s_{state}"] > 0
        assert found[f"keep_s_{state}"] > 0
