"""The wiring of a model is complete, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from quantlib.errors import ModelError
from quantlib.transforms import tables
from quantlib.transforms.binding import wire
from quantlib.transforms.wiring import NORM_KINDS

from .families import BASE, CASES, TIED, make


def test_every_matrix_of_a_block_is_read_or_written_once(case: str) -> None:
    """Readers and writers of all streams are the blocks' matrices, and none is missing."""
    model = make(case)
    wiring = wire(model)
    readers = [r.weight for s in wiring.streams for norm in s.norms for r in norm.readers]
    writers = [writer.weight for stream in wiring.streams for writer in stream.writers]
    assert len(set(readers)) == len(readers)
    assert len(set(writers)) == len(writers)
    assert not set(readers) & set(writers)
    inside = tuple(f"{block}." for block in wiring.blocks)
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1 and n.startswith(inside)}
    assert {n for n in (*readers, *writers) if n.startswith(inside)} == matrices


def test_what_is_named_exists(case: str) -> None:
    model = make(case)
    wiring = wire(model)
    names = set(dict(model.named_parameters(remove_duplicate=False)))
    for stream in wiring.streams:
        matrices = [*stream.writers, *(r for norm in stream.norms for r in norm.readers)]
        parameters = {m.weight for m in matrices} | {m.bias for m in matrices if m.bias}
        parameters |= {norm.weight for norm in stream.norms} | set(stream.tables)
        parameters |= {norm.bias for norm in stream.norms if norm.bias}
        assert parameters <= names
        assert {norm.kind for norm in stream.norms} <= set(NORM_KINDS)
        for module, _ in stream.enters:
            model.get_submodule(module)
    for attention in wiring.attentions:
        model.get_submodule(attention.module)
        rows, columns = attention.values.weight, attention.output.weight
        assert wiring.shapes[rows][0] >= attention.kv_heads * attention.head_dim
        assert wiring.shapes[columns][1] == attention.heads * attention.head_dim
        assert wiring.attention(attention.name) == attention
    for site in wiring.hiddens:
        model.get_submodule(site.module)
        assert wiring.shapes[site.down.weight][-1] == site.width
        assert wiring.hidden(site.name) == site
        assert site.writers
        for writer in site.writers:
            assert writer.weight.startswith(f"{site.name}.")
            assert wiring.shapes[writer.weight][-2] == site.stacked * site.width


def test_grouped_heads_and_fused_linears_are_told() -> None:
    attention = wire(make("phi3")).attentions[0]
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 2, 8)
    assert attention.values.weight == "model.layers.0.self_attn.qkv_proj.weight"
    wide = wire(make("qwen3")).attentions[0]
    assert wide.heads * wide.head_dim == 64  # twice the residual stream


def test_gate_and_up_are_told_apart_or_stacked() -> None:
    found = {case: wire(make(case)).hiddens for case in ("llama", "phi3", "qwen3_moe_some_dense")}
    mlp = "model.layers.0.mlp"
    apart = [f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"]
    for case in ("llama", "qwen3_moe_some_dense"):
        assert [writer.weight for writer in found[case][0].writers] == apart
        assert found[case][0].stacked == 1
    experts = found["qwen3_moe_some_dense"][1]
    assert [writer.weight for writer in experts.writers] == [
        "model.layers.1.mlp.experts.gate_up_proj"
    ]
    assert (found["phi3"][0].stacked, experts.stacked) == (2, 2)


def test_a_hidden_layer_that_its_writers_do_not_fit_is_refused() -> None:
    model = make("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 50, bias=False)
    with pytest.raises(ModelError, match=r"layers\.1 has a hidden layer of 48 channels"):
        wire(model)


def test_a_tied_embedding_is_rotated_online_and_its_final_norm_kept() -> None:
    tied, untied = wire(make("llama_tied")), wire(make("llama"))
    assert (tied.tied, untied.tied) == (True, False)
    assert tied.streams[0].tables == ()
    assert tied.streams[0].enters == (("model.embed_tokens", "output"),)
    assert tied.streams[0].leaves == "model.norm"
    assert untied.streams[0].tables == ("model.embed_tokens.weight",)
    assert untied.streams[0].enters == ()
    assert untied.streams[0].leaves is None
    assert [norm.name for norm in untied.streams[0].norms][-1] == "model.norm"


def test_ties_are_what_the_module_shares_and_not_what_its_config_says() -> None:
    model = make("llama_tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    assert not wire(model).tied


def test_whisper_has_two_streams_and_the_decoder_reads_the_encoder_s() -> None:
    wiring = wire(make("whisper"))
    assert [stream.name for stream in wiring.streams] == ["encoder", "decoder"]
    encoder, decoder = wiring.streams
    assert encoder.enters == (("model.encoder.layers.0", "input"),)
    assert encoder.norms[-1].name == "model.encoder.layer_norm"
    assert [reader.weight for reader in encoder.norms[-1].readers] == [
        f"model.decoder.layers.{index}.encoder_attn.{name}.weight"
        for index in range(2)
        for name in ("k_proj", "v_proj")
    ]
    assert encoder.centred
    assert decoder.centred
    assert [attention.name for attention in wiring.attentions] == [
        "model.encoder.layers.0",
        "model.encoder.layers.1",
        "model.decoder.layers.0",
        "model.decoder.layers.0.encoder_attn",
        "model.decoder.layers.1",
        "model.decoder.layers.1.encoder_attn",
    ]


def test_the_wiring_needs_no_weights() -> None:
    model = make("mixtral")
    assert wire(model.to("meta")) == wire(make("mixtral"))


def test_each_model_type_has_one_table() -> None:
    types = [model_type for family in tables.FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))
    assert {CASES[case][0] for case in CASES} == set(types)


@pytest.mark.parametrize("model_type", ["olmo2", "gpt_neox", "stablelm"])
def test_an_unknown_family_is_refused_in_a_sentence(model_type: str) -> None:
    settings: dict[str, Any] = {**BASE, "num_key_value_heads": 4}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))
    with pytest.raises(ModelError, match=f"in a model of type {model_type}, so its basis cannot"):
        wire(model)


def test_a_parameter_that_no_rule_names_is_refused() -> None:
    model = make("llama")
    model.model.layers[1].mlp.extra = nn.Linear(32, 4)
    with pytest.raises(ModelError, match=r"what model\.layers\.1\.mlp\.extra\.weight"):
        wire(model)


def test_a_linear_that_is_missing_is_named() -> None:
    model = make("llama")
    del model.model.layers[0].self_attn.o_proj
    with pytest.raises(ModelError, match=r"no model\.layers\.0\.self_attn\.o_proj"):
        wire(model)


def test_a_norm_whose_bias_no_reader_takes_is_refused() -> None:
    model = make("whisper")
    model.model.decoder.layers[1].fc1.bias = None
    with pytest.raises(ModelError, match=r"layers\.1\.final_layer_norm has a bias that one of"):
        wire(model)


def test_tied_settings_are_part_of_the_cases() -> None:
    assert TIED["tie_word_embeddings"]
    assert {wire(make(case)).tied for case in CASES} == {True, False}
    assert torch.equal(make("llama").lm_head.weight, make("llama").lm_head.weight)
