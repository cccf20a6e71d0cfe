"""`bench.prefill_w4a4`: its models run as they claim to, and ratios are those of one round."""

from pathlib import Path

import pytest
import torch

from quantlib.bench import prefill_w4a4
from quantlib.bench.checkpoints import LlamaShape
from quantlib.kernels.cpu import library

pytestmark = pytest.mark.skipif(library.load() is None, reason="no compiled kernels")

TINY = LlamaShape("tiny", 2, 64, 96, 4, 2, 32, 160, tied=True)


def test_every_contender_runs_and_the_last_does_all_of_it(tmp_path: Path) -> None:
    found = prefill_w4a4.measure(TINY, 40, rounds=2)
    names = [row["model"] for row in found["rows"]]
    assert names == [one.name for one in prefill_w4a4.contenders(TINY)]
    assert found["rows"][0]["ratio"] == 1.0
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in found["rows"])
    (target,) = found["targets"]
    assert target["value"] == pytest.approx(1 / found["rows"][-1]["ratio"])

    engines = prefill_w4a4.make_engines(TINY, tmp_path, 40)
    prompt = torch.arange(40)
    logits = {name: engine.prefill(prompt) for name, engine in engines.items()}
    assert all(torch.isfinite(each).all() for each in logits.values())
    values = [tuple(each.tolist()) for each in logits.values()]
    assert len(set(values)) == len(values), "every step changes what is computed"


def test_checkpoints_that_are_kept_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prefill_w4a4.make_engines(TINY, tmp_path, 40)
    monkeypatch.setattr(prefill_w4a4, "pack_random", lambda *_: pytest.fail("made again"))
    again = prefill_w4a4.make_engines(TINY, tmp_path, 40)
    prompt = torch.arange(40)
    for name, engine in first.items():
        assert torch.equal(engine.prefill(prompt), again[name].prefill(prompt))


def test_a_ratio_compares_within_a_round() -> None:
    rows = prefill_w4a4.rows_of({"a": [1.0, 2.0, 4.0], "b": [1.1, 2.2, 4.4]})
    assert rows[1]["ratio"] == pytest.approx(1.1)
    assert rows[1]["ratio_quartiles"] == pytest.approx([1.1, 1.1])
    assert rows[1]["ms"] == pytest.approx(2200)
