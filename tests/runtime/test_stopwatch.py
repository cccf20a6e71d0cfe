"""Random models of a shape, and what is read from their times. No time is asserted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, LlamaConfig

from quantlib.formats.scheme import Scheme
from quantlib.kernels.cpu import stopwatch as products
from quantlib.kernels.layouts import TiledWeight
from quantlib.runtime import stopwatch
from quantlib.runtime.engine import Engine
from quantlib.runtime.engine_spec import EngineSpec
from quantlib.runtime.engine_weights import plan_of
from quantlib.runtime.stopwatch import Fit, draw, latencies, random_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def llama() -> EngineSpec:
    return EngineSpec.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True))


# -- the line ------------------------------------------------------------------------------------


@given(
    fixed=st.floats(0.1, 10), factor=st.floats(0.6, 1.9), low=st.floats(1, 5), high=st.floats(7, 20)
)
def test_a_line_is_found_again(fixed: float, factor: float, low: float, high: float) -> None:
    fit = Fit.through([low, high], [fixed + factor * low, fixed + factor * high])
    assert math.isclose(fit.fixed, fixed, rel_tol=1e-6, abs_tol=1e-6)
    assert math.isclose(fit.factor, factor, rel_tol=1e-6)


@given(slope=st.floats(0.7, 1.7), error=st.floats(-0.05, 0.05))
def test_every_model_counts_by_its_relative_error(slope: float, error: float) -> None:
    """Three models, the middle one beside the line: by as much as before its share of it."""
    sums = [2.0, 4.0, 8.0]
    totals = [1 + slope * one for one in sums]
    totals[1] *= 1 + error
    fit = Fit.through(sums, totals)
    errors = [(fit.fixed + fit.factor * s) / t - 1 for s, t in zip(sums, totals, strict=True)]
    # the least squares of relative errors leave none across the fixed part or the factor
    assert math.isclose(sum(e / t for e, t in zip(errors, totals, strict=True)), 0, abs_tol=1e-9)
    moments = (e * s / t for e, s, t in zip(errors, sums, totals, strict=True))
    assert math.isclose(sum(moments), 0, abs_tol=1e-9)
    # and no more than the line without the middle one: its error is error / (1 + error)
    assert max(map(abs, errors)) <= abs(error) * 1.06 + 1e-9


def test_products_that_hardly_differ_count_as_they_are() -> None:
    fit = Fit.through([100.0, 101.0], [150.0, 149.0])
    assert fit.factor == 1.0
    assert fit.fixed == pytest.approx(49.0, rel=0.01)


def test_a_model_faster_than_its_products_has_nothing_fixed() -> None:
    fit = Fit.through([10.0, 10.5], [8.0, 8.4])
    assert fit.fixed == 0.0
    assert fit.factor == pytest.approx(0.8)
    assert Fit.through([4.0], [5.0]) == Fit(1.0, 1.0)


def test_a_disturbed_measurement_cannot_turn_the_line_around() -> None:
    fit = Fit.through([1.0, 10.0], [20.0, 10.0])
    assert fit.factor == stopwatch.FACTORS[0]
    assert fit.fixed > 0


# -- random models -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w4g32", "w2g64z4s4", "mxfp4", "w8a8", "w4g32a4zg16h8/4"])
def test_a_random_model_runs_and_its_numbers_are_finite(llama: EngineSpec, scheme: str) -> None:
    model = random_model(llama, scheme, own_head=False)
    assert model.head is model.embedding
    logits = Engine(model, capacity=8).prefill([1, 2, 3])
    assert logits.shape == (96,)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8g128", "w4g32a4zh8/4", "w8"])
def test_a_random_model_rounds_its_inputs_as_the_scheme_says(
    llama: EngineSpec, scheme: str
) -> None:
    model = random_model(llama, scheme, own_head=False)
    for layer in model.layers:
        for linear in (*layer.qkv, layer.o, *layer.gate_up, layer.down):
            assert linear.activations == Scheme.parse(scheme).activations(linear.shape[1])


def test_a_family_with_more_parts_has_them_too() -> None:
    config = Gemma2Config(**SIZES, query_pre_attn_scalar=16, sliding_window=8)
    model = random_model(EngineSpec.from_config(config), "w4g32", own_head=True)
    assert model.head is not model.embedding
    assert model.layers[0].ffn_out_norm is not None
    assert torch.isfinite(Engine(model, capacity=16).prefill(list(range(12)))).all()


def test_layers_beyond_the_caches_share_their_weights(
    llama: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = replace(llama, layers=llama.layers * 4)
    alone = random_model(deep, "w4g32", own_head=False)
    assert len({id(layer.down.weight) for layer in alone.layers}) == 16
    monkeypatch.setattr(products, "footprint", lambda: 1)
    shared = random_model(deep, "w4g32", own_head=False)
    assert len({id(layer.down.weight) for layer in shared.layers}) == 2
    assert shared.layers[0].down.weight is shared.layers[2].down.weight
    assert shared.layers[0].down.weight is not shared.layers[1].down.weight


def test_schemes_are_drawn_from_each_matrix_s_own_and_always_alike(llama: EngineSpec) -> None:
    plan = plan_of(llama, own_head=False)
    candidates = {
        name: ("w8g32",) if name.endswith("down_proj.weight") else ("w2g32", "w4g32", "w6g32")
        for name in plan.matrices
    }
    drawn = draw(plan, candidates)
    assert drawn == draw(plan, candidates)
    assert all(drawn[name] in candidates[name] for name in plan.matrices)
    assert len({drawn[name] for name in plan.matrices if "q_proj" in name}) > 1
    model = random_model(llama, drawn, own_head=False)
    for index, layer in enumerate(model.layers):
        scheme = Scheme.parse(drawn[f"model.layers.{index}.self_attn.o_proj.weight"])
        assert isinstance(layer.o.weight, TiledWeight)
        assert layer.o.weight.segments == scheme.segments(64)
    assert torch.isfinite(Engine(model, capacity=8, mode="int8").prefill([1, 2, 3])).all()


def test_drawn_layers_beyond_the_caches_repeat(
    llama: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "footprint", lambda: 1)
    plan = plan_of(replace(llama, layers=llama.layers * 2), own_head=False)
    drawn = draw(plan, dict.fromkeys(plan.matrices, ("w2g32", "w3g32", "w4g32", "w8g32")))
    layers = [
        tuple(scheme for name, scheme in drawn.items() if f".{index}." in name)
        for index in range(8)
    ]
    assert layers == layers[:2] * 4
    assert len(set(layers)) == 2


def test_a_matrix_that_is_kept_is_one_in_the_model_too(llama: EngineSpec) -> None:
    plan = plan_of(llama, own_head=False)
    schemes = {name: "bf16" if "embed" in name else "w4g32" for name in plan.matrices}
    model = random_model(llama, schemes, own_head=False)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert torch.isfinite(Engine(model, capacity=8).prefill([1, 2, 3])).all()


# -- running models ------------------------------------------------------------------------------


def test_models_take_turns_and_every_latency_is_measured(
    llama: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "ROUNDS", 2)
    models = {scheme: random_model(llama, scheme, own_head=False) for scheme in ("w2g32", "w8g32")}
    costs = ("decode_ms@5", "prefill_ms@12", "decode_ms@3")
    ticks: list[str] = []
    found = latencies(models, costs, "int8", 1, ticks.append)
    assert ticks == ["w2g32", "w8g32"] * 2
    assert set(found) == set(models)
    for row in found.values():
        assert set(row) == set(costs)
        assert all(0 < ms < math.inf for ms in row.values())


def test_every_token_is_decoded_at_the_context_it_was_asked_for(
    llama: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    real = Engine.decode_best

    def counted(self, ids, sequences=None):
        lengths.append(self.lengths[0])
        return real(self, ids, sequences)

    monkeypatch.setattr(Engine, "decode_best", counted)
    model = {"it": random_model(llama, "w4g32", own_head=False)}
    latencies(model, ("decode_ms@7", "decode_ms@2"), None, 1)
    assert set(lengths) == {7, 2}
    assert len(lengths) == stopwatch.ROUNDS * 2 * (stopwatch.STEPS + 1)
