"""Every parameter is in exactly one row, and whatever fits nowhere is an error that names it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from quantlib.errors import ModelError
from quantlib.models import modelmap
from quantlib.models.families import Family, KeptRule, linears
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.models.tables import FAMILIES, find

Saved = Callable[..., Path]
Tiny = Callable[..., PreTrainedModel]
Edit = Callable[..., Path]


def test_every_parameter_is_in_exactly_one_row(case: str, tiny: Tiny, saved: Saved) -> None:
    model = tiny(case)
    source = Source.open(saved(case))
    model_map = ModelMap.from_source(source)
    rows = model_map.coverage()
    parameters = dict(model.named_parameters())
    assert sorted(row.name for row in rows) == sorted(parameters)
    assert {row.name: row.shape for row in rows} == {n: p.shape for n, p in parameters.items()}
    assert model_map.parameters == sum(p.numel() for p in parameters.values())
    assert sum(row.bytes for row in rows) == model_map.nbytes == source.total_bytes
    assert model_map.architecture == type(model).__name__


def test_kept_are_small_or_said_why_and_all_matrices_of_blocks_are_weights(
    case: str, saved: Saved
) -> None:
    model_map = ModelMap.from_source(Source.open(saved(case)))
    for kept in model_map.kept:
        is_vector = sum(size > 1 for size in kept.shape) <= 1
        assert is_vector or kept.reason.startswith(
            ("router", "positions", "projection stored", "attention pooling")
        )
    blocks = [*model_map.blocks, *(block for stack in model_map.stacks for block in stack.blocks)]
    assert all(weight.block in blocks for weight in model_map.weights if weight.block)
    assert len(model_map.blocks) == 3


def test_groups_partition_the_weights(case: str, saved: Saved) -> None:
    model_map = ModelMap.from_source(Source.open(saved(case)))
    members = [name for group in model_map.groups for name in group.members]
    assert sorted(members) == sorted(weight.name for weight in model_map.weights)
    for group in model_map.groups:
        weights = model_map.members(group)
        assert {weight.group for weight in weights} == {group.name}
        assert {weight.kind for weight in weights} == {group.kind}
        assert {weight.block for weight in weights} == {group.block}
        assert len({weight.in_features for weight in weights}) == 1
        assert group.fused == (len(weights) > 1)
    stacked = [block for stack in model_map.stacks for block in stack.blocks]
    blocks = (*model_map.blocks, *stacked, None)
    by_block = [g for block in blocks for g in model_map.groups_in(block)]
    assert sorted(g.name for g in by_block) == sorted(g.name for g in model_map.groups)


def test_members_of_a_group_read_one_input(case: str, tiny: Tiny, saved: Saved) -> None:
    """The claim behind shared statistics, checked by running the model."""
    model = tiny(case)
    model_map = ModelMap.from_source(Source.open(saved(case)))
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda _module, args, name=name: seen.update({name: args[0]} if args else {})
        )
    with torch.no_grad():
        model(torch.arange(3, 19)[None])
    for group in model_map.groups:
        if group.input_module is None or group.component == "vision_tower":
            continue  # only text runs here; the tower's groups are checked in tests/calibration
        x = seen[group.input_module]
        assert x.shape[-1] == model_map.members(group)[0].in_features
        for weight in model_map.members(group):
            if weight.kind == "linear":
                torch.testing.assert_close(seen[weight.module], x, rtol=0, atol=0)


def test_a_llama_block_has_the_groups_one_expects(saved: Saved) -> None:
    model_map = ModelMap.from_source(Source.open(saved("llama")))
    block = "model.layers.1"
    groups = {group.name: group.members for group in model_map.groups_in(block)}
    assert groups == {
        f"{block}.self_attn.qkv": tuple(f"{block}.self_attn.{x}_proj.weight" for x in "qkv"),
        f"{block}.self_attn.o_proj": (f"{block}.self_attn.o_proj.weight",),
        f"{block}.mlp.gate_up": (f"{block}.mlp.gate_proj.weight", f"{block}.mlp.up_proj.weight"),
        f"{block}.mlp.down_proj": (f"{block}.mlp.down_proj.weight",),
    }
    assert model_map.group(f"{block}.self_attn.qkv").input_module == f"{block}.self_attn.q_proj"
    assert [weight.block for weight in model_map.weights_in(block)] == [block] * 7
    assert not model_map.generic


def test_the_fused_linears_of_phi3_are_groups_of_one(saved: Saved) -> None:
    model_map = ModelMap.from_source(Source.open(saved("phi3")))
    groups = [
        group.name.removeprefix("model.layers.0.")
        for group in model_map.groups_in("model.layers.0")
    ]
    assert sorted(groups) == [
        "mlp.down_proj",
        "mlp.gate_up_proj",
        "self_attn.o_proj",
        "self_attn.qkv_proj",
    ]


def test_an_untied_model_has_an_embedding_and_a_head(saved: Saved) -> None:
    model_map = ModelMap.from_source(Source.open(saved("llama")))
    embedding, head = model_map.weights_in(None)
    assert (embedding.kind, embedding.component, embedding.head) == (
        "embedding",
        "embeddings",
        None,
    )
    assert (head.kind, head.component, head.head) == ("head", "head", None)
    assert model_map.group(embedding.group).input_module is None
    assert model_map.group(head.group).input_module == "lm_head"
    assert embedding.aliases == head.aliases == ()


@pytest.mark.parametrize("on_disk", ["embedding", "head", "both"])
def test_a_tied_head_is_an_alias_of_the_embedding(saved: Saved, edit: Edit, on_disk: str) -> None:
    def store(tensors: dict[str, torch.Tensor]) -> None:
        table = tensors.pop("model.embed_tokens.weight")
        if on_disk != "head":
            tensors["model.embed_tokens.weight"] = table
        if on_disk != "embedding":
            tensors["lm_head.weight"] = table.clone()

    source = Source.open(edit(saved("llama_tied"), store))
    model_map = ModelMap.from_source(source)
    (weight,) = model_map.weights_in(None)
    assert (weight.kind, weight.module, weight.head) == (
        "embedding",
        "model.embed_tokens",
        "lm_head",
    )
    assert {weight.name, *weight.aliases} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert source.read(weight.name).shape == weight.shape
    assert model_map.weight("lm_head.weight") is model_map.weight("model.embed_tokens.weight")
    assert model_map.group(weight.group).input_module == "lm_head"
    roles = [row.role for row in model_map.coverage() if row.name == weight.name]
    assert roles == ["embedding and head"]


def test_two_different_tensors_are_not_tied_whatever_the_config_says(
    saved: Saved, edit: Edit
) -> None:
    source = Source.open(
        edit(
            saved("llama_tied"),
            lambda tensors: tensors.update(
                {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
            ),
        )
    )
    kinds = [weight.kind for weight in ModelMap.from_source(source).weights_in(None)]
    assert kinds == ["embedding", "head"]


def test_components_add_up(case: str, saved: Saved) -> None:
    model_map = ModelMap.from_source(Source.open(saved(case)))
    components = model_map.components()
    assert sum(component.parameters for component in components) == model_map.parameters
    assert sum(component.bytes for component in components) == model_map.nbytes
    assert sum(component.share for component in components) == pytest.approx(1.0)
    names = {component.name for component in components}
    assert {"embeddings", "language_model"} <= names
    assert ("vision_tower" in names) == (case == "gemma3")


def test_the_map_survives_json(case: str, saved: Saved) -> None:
    model_map = ModelMap.from_source(Source.open(saved(case)))
    text = json.dumps(model_map.to_json())
    assert ModelMap.from_json(json.loads(text)) == model_map


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("weights"),
        lambda data: data["weights"][0].pop("shape"),
        lambda data: data["weights"][0].update(colour="red"),
        lambda data: data.update(version=99),
        lambda data: data.update(kept=3),
    ],
)
def test_a_damaged_map_file_is_refused(
    saved: Saved, damage: Callable[[dict[str, object]], object]
) -> None:
    data = ModelMap.from_source(Source.open(saved("llama"))).to_json()
    damage(data)
    with pytest.raises(ModelError, match="inspect the model again"):
        ModelMap.from_json(data)


def test_names_that_are_no_weights_are_told_apart(saved: Saved) -> None:
    model_map = ModelMap.from_source(Source.open(saved("llama")))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is kept"):
        model_map.weight("model.norm.weight")
    with pytest.raises(ModelError, match="is not a weight"):
        model_map.weight("model.nothing")
    with pytest.raises(ModelError, match=r"no linear group model\.nothing"):
        model_map.group("model.nothing")


def test_a_wrong_shape_is_named_with_both_shapes(saved: Saved, edit: Edit) -> None:
    source = Source.open(
        edit(saved("llama"), lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    )
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[31\].*\[32\]"):
        ModelMap.from_source(source)


def test_a_missing_tensor_is_named(saved: Saved, edit: Edit) -> None:
    source = Source.open(edit(saved("llama"), lambda tensors: tensors.pop("model.norm.weight")))
    with pytest.raises(ModelError, match=r"lacks 1 parameters .*model\.norm\.weight"):
        ModelMap.from_source(source)


def test_integer_weights_are_refused(saved: Saved, edit: Edit) -> None:
    source = Source.open(
        edit(
            saved("llama"),
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        )
    )
    with pytest.raises(ModelError, match=r"model\.norm\.weight is stored as I8"):
        ModelMap.from_source(source)


def test_a_tensor_of_nobody_must_be_allowed_and_is_then_kept(saved: Saved, edit: Edit) -> None:
    name = "model.layers.1.mtp.weight"
    source = Source.open(
        edit(saved("llama"), lambda tensors: tensors.update({name: torch.ones(4, 4)}))
    )
    with pytest.raises(ModelError, match=r"1 tensors have no rule: model\.layers\.1\.mtp\.weight"):
        ModelMap.from_source(source)
    model_map = ModelMap.from_source(source, allow_unclaimed=("*.mtp.*",))
    (kept,) = (row for row in model_map.kept if row.name == name)
    assert (kept.reason, kept.block) == ("allowed by name", "model.layers.1")
    assert model_map.nbytes == source.total_bytes


def test_allowing_what_needs_no_leave_is_an_error(saved: Saved) -> None:
    source = Source.open(saved("llama"))
    for pattern in ("*.nothing", "model.norm.weight"):
        with pytest.raises(ModelError, match="allows nothing"):
            ModelMap.from_source(source, allow_unclaimed=(pattern,))


def test_rotary_frequencies_of_old_checkpoints_are_not_asked_for(saved: Saved, edit: Edit) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = Source.open(
        edit(saved("llama"), lambda tensors: tensors.update({name: torch.ones(4)}))
    )
    rows = ModelMap.from_source(source).coverage()
    assert name not in {row.name for row in rows}


def test_gemma3_is_mapped_from_the_names_it_is_published_under(saved: Saved, edit: Edit) -> None:
    folder = saved("gemma3")
    expected = ModelMap.from_source(Source.open(folder)).coverage()

    def publish(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("vision_tower.")]:
            published = name.replace("vision_tower.", "vision_tower.vision_model.")
            tensors[published] = tensors.pop(name)
        assert "language_model.model.embed_tokens.weight" in tensors
        assert "vision_tower.vision_model.post_layernorm.weight" in tensors

    assert ModelMap.from_source(Source.open(edit(folder, publish))).coverage() == expected


LLAMA = find("llama")
assert LLAMA is not None


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            replace(LLAMA, groups=(*LLAMA.groups, linears("x", "mlp.x"))),
            r"no block has the group x \(mlp\.x\.weight\)",
        ),
        (
            replace(LLAMA, groups=(linears("x", "mlp.x", "mlp.up_proj"),)),
            r"group x of model\.layers\.0 is incomplete: there is no model\.layers\.0\.mlp\.x",
        ),
        (
            replace(LLAMA, kept=(*LLAMA.kept, KeptRule("*.q_norm.weight", "normalisation"))),
            r"no parameter matches '\*\.q_norm\.weight'",
        ),
        (
            replace(LLAMA, groups=(*LLAMA.groups, linears("again", "mlp.up_proj"))),
            r"mlp\.up_proj\.weight is claimed by two rules",
        ),
        (
            replace(LLAMA, kept=(*LLAMA.kept, KeptRule("lm_head.*", "just so"))),
            r"lm_head\.weight is claimed by two rules",
        ),
        (replace(LLAMA, groups=LLAMA.groups[:-1]), r"3 tensors have no rule: .*down_proj"),
        (replace(LLAMA, groups=(linears("n", "input_layernorm"),)), "linear weights have 2 axes"),
        (replace(LLAMA, blocks="model.blocks"), "the model has no blocks"),
        (replace(LLAMA, embeddings=("model.wte.weight",)), r"no embedding model\.wte\.weight"),
        (replace(LLAMA, head="head.weight"), r"no head head\.weight"),
    ],
)
def test_a_table_that_does_not_fit_is_an_error(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, family: Family, message: str
) -> None:
    monkeypatch.setattr(modelmap, "find", lambda _model_type: family)
    with pytest.raises(ModelError, match=message):
        ModelMap.from_source(Source.open(saved("llama")))


def test_no_model_type_has_two_tables() -> None:
    listed = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(listed) == len(set(listed))
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"} <= set(listed)
    assert {"mixtral", "qwen3_moe", "smollm3", "gemma3"} <= set(listed)
