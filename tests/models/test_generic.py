"""Decoders without a table: the walk finds their groups, and reports what it does not recognise."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn
from transformers import PreTrainedModel

from quantlib.errors import ModelError
from quantlib.models import modelmap, skeleton
from quantlib.models.conversion import derive_disk_rules
from quantlib.models.families import MIXTRAL_EXPERT_PARTS, QWEN_EXPERT_PARTS
from quantlib.models.generic import derive_family
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.models.tables import find

Saved = Callable[..., Path]
Tiny = Callable[..., PreTrainedModel]


def rule_names(model: PreTrainedModel) -> dict[str, bool]:
    return {rule.name: rule.fused for rule in derive_family(model).groups}


def test_models_without_a_table_are_walked(walked_case: str, saved: Saved) -> None:
    assert find(walked_case) is None
    model_map = ModelMap.from_source(Source.open(saved(walked_case)))
    assert model_map.generic
    assert {"embedding", "head"} <= {weight.kind for weight in model_map.weights}


def test_where_there_is_a_table_the_walk_finds_the_same(
    text_case: str, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables were written by hand, the walk was not: each checks the other."""
    source = Source.open(saved(text_case))
    by_table = ModelMap.from_source(source)
    assert not by_table.generic
    monkeypatch.setattr(modelmap, "find", lambda _model_type: None)
    by_walk = ModelMap.from_source(source)
    assert by_walk.generic
    assert by_walk.weights == by_table.weights
    assert by_walk.groups == by_table.groups
    assert [kept.name for kept in by_walk.kept] == [kept.name for kept in by_table.kept]


def test_the_walk_groups_by_name_only_where_names_tell(tiny: Tiny) -> None:
    assert rule_names(tiny("gpt_neox")) == {
        "attention.query_key_value": False,
        "attention.dense": False,
        "mlp.dense_h_to_4h": False,
        "mlp.dense_4h_to_h": False,
    }
    assert rule_names(tiny("phi")) == {
        "self_attn.qkv": True,
        "self_attn.dense": False,
        "mlp.fc1": False,
        "mlp.fc2": False,
    }


def test_projections_of_different_widths_do_not_read_one_input(tiny: Tiny) -> None:
    model = tiny("stablelm")
    for layer in model.model.layers:
        layer.self_attn.k_proj = nn.Linear(20, 16, bias=False)
    assert rule_names(model) == {
        "self_attn.q_proj": False,
        "self_attn.k_proj": False,
        "self_attn.v_proj": False,
        "self_attn.o_proj": False,
        "mlp.gate_up": True,
        "mlp.down_proj": False,
    }


def test_cross_attention_reads_two_inputs(tiny: Tiny) -> None:
    model = tiny("stablelm")
    for layer in model.model.layers:
        layer.encoder_attn = layer.self_attn
        del layer.self_attn
    assert "encoder_attn.qkv" not in rule_names(model)
    assert {"encoder_attn.q_proj", "encoder_attn.k_proj"} <= rule_names(model).keys()


def test_a_matrix_the_walk_does_not_know_is_reported(saved: Saved) -> None:
    """GPT-2 stores its matrices transposed, in a module that is no nn.Linear."""
    source = Source.open(saved("stablelm"))
    folder = source.path.parent / "gpt2"
    config = skeleton.from_config({"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2})
    assert config.config.model_type == "gpt2"
    model = type(config)(config.config)
    model.save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"8 tensors have no rule: transformer\.h\.0\.attn\.c_attn"
    ):
        ModelMap.from_source(Source.open(folder))
    allowed = ModelMap.from_source(Source.open(folder), allow_unclaimed=("*.c_*.weight",))
    assert allowed.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_transposed_experts_are_reported(tiny: Tiny) -> None:
    model = tiny("olmoe")
    assert "mlp.experts.gate_up_proj" in rule_names(model)
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = True
    assert "mlp.experts.gate_up_proj" not in rule_names(model)


def test_a_model_without_blocks_is_refused(tiny: Tiny) -> None:
    model = tiny("stablelm")
    model.model.layers = nn.Identity()
    with pytest.raises(ModelError, match="no repeated blocks"):
        derive_family(model)


@pytest.mark.parametrize(
    ("model_type", "parts"), [("mixtral", MIXTRAL_EXPERT_PARTS), ("qwen3_moe", QWEN_EXPERT_PARTS)]
)
def test_disk_rules_derived_from_transformers_agree_with_the_tables(
    model_type: str, parts: tuple[object, ...]
) -> None:
    derived = [
        (rule.parameter.removeprefix("mlp."), [part.removeprefix("mlp.") for part in rule.parts])
        for rule in derive_disk_rules(model_type).experts
    ]
    table = find(model_type)
    assert table is not None
    assert table.disk.experts == parts
    assert derived == [
        (rule.parameter.removeprefix("mlp."), [part.removeprefix("mlp.") for part in rule.parts])
        for rule in table.disk.experts
    ]


def test_a_model_type_nobody_knows_has_plain_names() -> None:
    rules = derive_disk_rules("nobody_knows")
    assert (rules.renames, rules.experts) == ((), ())
