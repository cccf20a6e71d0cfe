"""What the engine reads from a configuration, and what it leaves to transformers."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen3MoeConfig

from quantlib.runtime.engine_spec import FAMILIES, EngineSpec, unsupported

from .engine_models import LLAMA3, MODELS, QWEN_WINDOW, WINDOW, YARN, build, config_of


@pytest.mark.parametrize("name", MODELS)
def test_ropes_are_those_of_the_models_of_transformers(name: str) -> None:
    """To the last bit: an angle is a position times a frequency, so an error would grow."""
    model = build(name)
    spec, rotary = EngineSpec.from_config(model.config), model.model.rotary_emb
    kinds = getattr(model.config, "layer_types", None) or [""] * len(spec.layers)
    for layer, kind in zip(spec.layers, kinds):
        prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        rope = spec.ropes[layer.rope]
        assert torch.equal(rope.inverse_frequencies, getattr(rotary, f"{prefix}inv_freq"))
        assert rope.scaling == getattr(rotary, f"{prefix}attention_scaling")


def test_yarn_scales_and_gemma_3_has_two_ropes() -> None:
    """Otherwise the test above would compare ones with ones."""
    assert EngineSpec.from_config(config_of("llama-yarn")).ropes[0].scaling > 1.1
    assert len(EngineSpec.from_config(config_of("gemma3")).ropes) == 2


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_these_tests_is_supported(name: str) -> None:
    assert unsupported(config_of(name)) is None


def test_these_tests_have_a_model_of_every_family() -> None:
    assert {config_of(name).model_type for name in MODELS} == set(FAMILIES)


def test_windows_are_per_layer() -> None:
    def windows(name: str, **changes: Any) -> list[int]:
        return [layer.window for layer in EngineSpec.from_config(config_of(name, **changes)).layers]

    assert windows("llama") == [0, 0]
    assert windows("mistral") == [WINDOW, WINDOW]
    assert windows("mistral", sliding_window=None) == [0, 0]
    assert windows("qwen2") == [0, WINDOW]
    assert windows("qwen2", **(QWEN_WINDOW | {"use_sliding_window": False})) == [0, 0]
    assert windows("gemma2") == [WINDOW, 0]


def test_biases_and_constants_come_from_the_fields_of_the_family() -> None:
    plain = EngineSpec.from_config(config_of("llama"))
    assert not plain.biased
    assert (plain.embedding_scale, plain.attention_scale) == (1.0, 16**-0.5)
    biased = EngineSpec.from_config(config_of("llama-biases")).biased
    assert biased == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    assert EngineSpec.from_config(config_of("qwen2")).biased == {"q_proj", "k_proj", "v_proj"}
    gemma = EngineSpec.from_config(config_of("gemma2"))
    assert (gemma.embedding_scale, gemma.attention_scale) == (8.0, 24**-0.5)
    assert (gemma.attention_softcap, gemma.logit_softcap) == (50.0, 30.0)
    assert gemma.activation == "gelu_tanh"


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"rope_parameters": DYNAMIC}, "rope is of type dynamic"),
        ("llama", {"hidden_act": "relu"}, "no activation relu"),
        ("llama", {"architectures": ["TreeLlamaForCausalLM"]}, "TreeLlamaForCausalLM of its own"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "of its own"),
        ("llama", {"head_dim": 512}, "heads have more than 256 columns"),
        ("llama", {"num_key_value_heads": 3}, "no multiple"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("gemma3", {"use_bidirectional_attention": True}, "see later ones"),
        (
            "llama",
            {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
            "turns 8 of the 16 columns",
        ),
    ],
)
def test_what_the_engine_lacks_is_said(name: str, changes: dict[str, Any], reason: str) -> None:
    assert reason in (unsupported(config_of(name, **changes)) or "nothing")


def test_longrope_and_other_families_go_the_plain_way() -> None:
    long = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    phi = config_of("phi3", rope_parameters=long, original_max_position_embeddings=64)
    assert "rope is of type longrope" in (unsupported(phi) or "")
    assert "qwen3_moe is not one of its families" in (unsupported(Qwen3MoeConfig()) or "")
    assert "gemma3 is not one" in (unsupported(AutoConfig.for_model("gemma3")) or "")


def test_ropes_that_do_not_depend_on_the_length_are_not_refused() -> None:
    assert unsupported(config_of("llama", rope_parameters=LLAMA3)) is None
