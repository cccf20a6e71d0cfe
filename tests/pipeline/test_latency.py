"""The cost of every weight in every scheme: really measured, on a tiny model. No time is
asserted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from quantlib.errors import UsageError
from quantlib.kernels import timing
from quantlib.kernels.cpu import stopwatch as products
from quantlib.models.modelmap import ModelMap
from quantlib.models.rows import Weight
from quantlib.models.source import Source
from quantlib.pipeline.compress import Result
from quantlib.pipeline.latency import costs_for, measured_ms
from quantlib.pipeline.latency_models import changes_of
from quantlib.pipeline.run import Silent
from quantlib.recipe import Recipe
from quantlib.runtime import stopwatch
from quantlib.runtime.engine_spec import EngineSpec
from quantlib.search.latency import LatencyBudget

SCHEMES = ("w2g32z4s4", "w4g32", "w8g64zs6")
DECODE, PREFILL = "decode_ms@8", "prefill_ms@600"
BOTH = LatencyBudget(("decode=1s@8", "prefill=9s@600"), 1, "int8")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of this test's own, and few repetitions."""
    folder = tmp_path / "timing"
    monkeypatch.setattr(timing, "table_folder", lambda: folder)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "PASSES", 2)
    monkeypatch.setattr(stopwatch, "ROUNDS", 2)
    monkeypatch.setattr(products, "footprint", lambda: 1 << 16)
    return folder


class Said(Silent):
    """Progress that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stages: list[tuple[str, int]] = []
        self.ticks = 0

    def start(self, stage: str, total: int) -> None:
        self.stages.append((stage, total))

    def tick(self, message: str = "") -> None:
        self.ticks += 1

    def say(self, message: str) -> None:
        self.said.append(message)


def test_every_weight_has_a_price_in_every_scheme(llama: Path, quick: Path) -> None:
    model_map = ModelMap.from_source(Source.open(llama))
    said = Said()
    costs = costs_for(model_map, llama, SCHEMES, BOTH, said)
    assert costs is not None
    assert set(costs.costs) == set(costs.fixed) == {DECODE, PREFILL}
    for prices in costs.costs.values():
        assert set(prices) == {(w.name, s) for w in model_map.weights for s in SCHEMES}
        assert all(0 < ms < math.inf for ms in prices.values())
    assert all(ms >= 0 for ms in costs.fixed.values())
    assert "1 thread" in costs.machine
    assert "int8" in costs.machine
    # as many ticks as were announced: the bar ends where it should
    assert said.ticks == sum(total for _, total in said.stages) > 0
    assert said.said == []


def _kind(weight: Weight) -> str:
    """The name of its group in a block."""
    return weight.group.removeprefix(weight.block or "")


def test_weights_of_one_shape_cost_the_same_and_a_long_prompt_more(
    llama: Path, quick: Path
) -> None:
    model_map = ModelMap.from_source(Source.open(llama))
    costs = costs_for(model_map, llama, SCHEMES, BOTH, Silent())
    assert costs is not None
    linear = [w for w in model_map.weights if w.kind == "linear"]
    for first in linear:
        for second in linear:
            if first.shape == second.shape and _kind(first) == _kind(second):
                for cost in costs.costs:
                    row = costs.costs[cost]
                    assert row[first.name, "w4g32"] == row[second.name, "w4g32"]
    table = json.loads(next(quick.iterdir()).read_text())["ms"]
    assert any(key.endswith("M=512") for key in table), "a prompt is read in pieces of 512"
    assert not any(key.endswith("M=600") for key in table)


def test_nothing_is_measured_twice_and_a_damaged_table_once_more(llama: Path, quick: Path) -> None:
    model_map = ModelMap.from_source(Source.open(llama))
    first = costs_for(model_map, llama, SCHEMES, BOTH, Silent())
    said = Said()
    assert costs_for(model_map, llama, SCHEMES, BOTH, said) == first
    assert said.ticks == 0
    file = next(quick.iterdir())
    file.write_text(file.read_text()[:-20])
    again = Said()
    assert costs_for(model_map, llama, SCHEMES, BOTH, again) is not None
    assert again.ticks > 0
    assert [message for message in again.said if "measured again" in message] == again.said
    assert len(again.said) == 1


def test_without_a_latency_nothing_is_timed(llama: Path, quick: Path) -> None:
    model_map = ModelMap.from_source(Source.open(llama))
    assert costs_for(model_map, llama, SCHEMES, LatencyBudget(), Silent()) is None
    assert not quick.exists()


def test_wide_columns_and_rounded_inputs_are_timed_as_they_run(llama: Path, quick: Path) -> None:
    model_map = ModelMap.from_source(Source.open(llama))
    as_schemes_say = LatencyBudget(("decode=1s@8",), 1, None)
    schemes = ("w4g32", "w4g32a4zh8/8", "w8g32a8g128")
    assert costs_for(model_map, llama, schemes, as_schemes_say, Silent()) is not None
    keys = [key.split() for key in json.loads(next(quick.iterdir()).read_text())["ms"]]
    timed = {(key[0], key[2]) for key in keys if key[0] != "model"}
    assert timed == {("exact", "w4g32"), ("int8", "w4g32h8/8"), ("int8g128", "w8g32")}


@pytest.mark.parametrize(
    ("mode", "timed"),
    [
        ("int8g128", {"w4g32": "int8g128", "w4g32a4zg32h8/4": "int8g128"}),
        ("fast", {"w4g32": "int8g128", "w4g32a4zg32h8/4": "int8g32"}),
        ("exact", {"w4g32": "exact", "w4g32a4zg32h8/4": "exact"}),
    ],
)
def test_inputs_are_timed_in_the_mode_that_is_asked_for(
    llama: Path, quick: Path, mode: str, timed: dict[str, str]
) -> None:
    model_map = ModelMap.from_source(Source.open(llama))
    budget = LatencyBudget(("decode=1s@8",), 1, mode)
    assert costs_for(model_map, llama, tuple(timed), budget, Silent()) is not None
    keys = [key.split() for key in json.loads(next(quick.iterdir()).read_text())["ms"]]
    found = {(key[0], key[2]) for key in keys if key[0] != "model"}
    columns = {"w4g32": "w4g32", "w4g32a4zg32h8/4": "w4g32h8/4"}
    assert found == {(inputs, columns[scheme]) for scheme, inputs in timed.items()}


def test_matrices_that_read_one_input_are_timed_as_one_and_charged_by_their_rows(
    llama: Path, quick: Path
) -> None:
    model_map = ModelMap.from_source(Source.open(llama))
    costs = costs_for(model_map, llama, SCHEMES, BOTH, Silent())
    assert costs is not None
    keys = [key.split() for key in json.loads(next(quick.iterdir()).read_text())["ms"]]
    timed = {key[1] for key in keys if key[0] != "model"}
    weights = model_map.weights_in(model_map.blocks[0])
    rows = {
        group: sum(w.out_features for w in weights if w.group == group)
        for group in {w.group for w in weights}
    }
    assert {f"{rows[w.group]}x{w.in_features}" for w in weights} <= timed
    for one in weights:
        for other in weights:
            if one.group == other.group:
                prices = [
                    costs.costs[DECODE][w.name, "w4g32"] / w.out_features for w in (one, other)
                ]
                assert prices[0] == pytest.approx(prices[1])


def models_in(folder: Path) -> set[str]:
    """The random models that a cache knows, by shape and schemes."""
    keys = json.loads(next(folder.iterdir()).read_text())["ms"]
    return {" ".join(key.split()[1:3]) for key in keys if key.startswith("model")}


def test_what_a_recipe_does_while_a_model_runs_is_in_the_fixed_part(
    llama: Path, quick: Path
) -> None:
    model_map = ModelMap.from_source(Source.open(llama))
    decode = LatencyBudget(("decode=1s@8",), 1, "int8")
    plain, resq = Recipe(data="unused"), Recipe(data="unused", rotation="pca", kv="int4")
    for recipe in (None, plain, resq):
        assert costs_for(model_map, llama, SCHEMES, decode, Silent(), recipe) is not None
    # three by lot for the plain one, of which the recipe without anything is another name
    assert len(models_in(quick)) == 6


def test_a_recipe_s_bases_and_cache_are_those_of_its_checkpoints() -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    spec = EngineSpec.from_config(LlamaConfig(**config, num_attention_heads=4, vocab_size=96))
    found = changes_of(Recipe(data="unused", rotation="pca", kv="int8/int4"), spec, own_head=False)
    assert found.residual is not None
    assert found.residual.shape == (64, 64)
    assert {str(cache) for cache in found.caches.values()} == {"int8/int4"}
    assert {turn.size for turn in found.hidden.values()} == {96}
    assert set(found.key_bases) == {0, 1}
    fused = changes_of(Recipe(data="unused", rotation="pca", kv="5.2"), spec, own_head=True)
    assert fused.residual is None
    assert {str(cache) for cache in fused.caches.values()} == {"int4"}
    plain = changes_of(Recipe(data="unused"), spec, own_head=False)
    assert (plain.residual, plain.key_bases, plain.hidden) == (None, {}, {})


def test_inputs_that_the_engine_does_not_round_are_refused_in_a_sentence(
    llama: Path, quick: Path
) -> None:
    model_map = ModelMap.from_source(Source.open(llama))
    with pytest.raises(UsageError, match=r"in w4g32amxfp8 \(inputs in .*leave that scheme out"):
        costs_for(model_map, llama, ("w4g32", "w4g32amxfp8"), BOTH, Silent())


def test_a_model_that_the_engine_does_not_run_is_told_why(
    llama: Path, quick: Path, tmp_path: Path
) -> None:
    model_map = ModelMap.from_source(Source.open(llama))
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu6"}))
    with pytest.raises(UsageError, match="does not run this one: it has no activation relu6"):
        costs_for(model_map, tmp_path, SCHEMES, BOTH, Silent())


def test_a_compressed_model_is_within_its_latency_as_predicted_and_timed_for_real(
    squeeze: Callable[..., Result], quick: Path
) -> None:
    changes: dict[str, Any] = {"refine": False, "threads": 1, "mode": "int8", "probes": 0}
    loose = squeeze(**changes, size=None, latency=("decode=9s@8",))
    assert loose.plan.budget is None
    assert loose.plan.limits == {DECODE: 9000.0}
    assert set(loose.latency) == {DECODE}
    assert 0 < loose.latency[DECODE] < 1e4
    predicted = loose.plan.predicted[DECODE]
    assert 0 < predicted < 1e4
    again = measured_ms(loose.path, [DECODE, PREFILL], 1, "int8")
    assert set(again) == {DECODE, PREFILL}
    assert (loose.work / "latency.json").is_file()
