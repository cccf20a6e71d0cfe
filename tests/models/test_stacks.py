"""Models of several stacks: every parameter in one row, with its component and, if kept, why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

from quantlib.cli.app import app
from quantlib.errors import ModelError
from quantlib.models import skeleton
from quantlib.models.compose import flatten
from quantlib.models.families import Submodel
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.models.tables import find

from .stacked_models import MODELS, build, save

COMPONENTS = {
    "whisper": {"audio_tower", "language_model", "embeddings"},
    "llava": {"vision_tower", "projector", "language_model", "embeddings", "head"},
    "llava_dinov2": {"vision_tower", "projector", "language_model", "embeddings", "head"},
    "llava_siglip": {"vision_tower", "projector", "language_model", "embeddings", "head"},
    "janus": {
        "vision_tower",
        "projector",
        "language_model",
        "embeddings",
        "generation_embeddings",
        "generation_projector",
        "generation_head",
        "image_encoder",
        "image_decoder",
        "codebook",
    },
    "chameleon": {
        "language_model",
        "embeddings",
        "head",
        "image_encoder",
        "image_decoder",
        "codebook",
    },
    "qwen2_5_vl": {"vision_tower", "language_model", "embeddings", "head"},
    "qwen2_5_omni": {
        "audio_tower",
        "vision_tower",
        "language_model",
        "embeddings",
        "head",
        "talker",
        "token2wav",
    },
    "idefics3": {"vision_tower", "projector", "language_model", "embeddings", "head"},
    "gemma3": {"vision_tower", "projector", "language_model", "embeddings"},
    "clip": {"vision_tower", "text_encoder", "embeddings", "projector"},
    "siglip": {"vision_tower", "text_encoder", "embeddings", "projector"},
    "clip_vision": {"vision_tower"},
    "siglip_vision": {"vision_tower"},
    "dinov2": {"vision_tower"},
    "bert": {"text_encoder", "embeddings"},
}
COMPONENTS["janus_mixture"] = COMPONENTS["janus"]
COMPONENTS["emu3"] = COMPONENTS["chameleon"]
COMPONENTS["smolvlm"] = COMPONENTS["idefics3"]
REASONS = (
    "bias",
    "normalisation",
    "positions",
    "class token",
    "codebook",
    "router",
    "scale",
    "transposed convolution",
    "attention pooling",
    "two rows",
    "token for masked patches",
    "projection stored as [inputs, outputs]",
    "buffer",
)
Saved = Callable[[str], tuple[PreTrainedModel, Source, ModelMap]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A tiny model, its folder opened, and its map; made once."""
    made: dict[str, tuple[PreTrainedModel, Source, ModelMap]] = {}

    def build_once(case: str) -> tuple[PreTrainedModel, Source, ModelMap]:
        if case not in made:
            model = build(case)
            source = Source.open(save(model, tmp_path_factory.mktemp(case)))
            made[case] = model, source, ModelMap.from_source(source)
        return made[case]

    return build_once


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> str:
    """Every model of several stacks, and every tower alone."""
    return str(request.param)


def test_every_parameter_is_in_exactly_one_row_and_bytes_add_up(saved: Saved, case: str) -> None:
    model, source, model_map = saved(case)
    rows = [row for row in model_map.coverage() if "buffer" not in row.role]
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sorted(row.name for row in rows) == sorted(parameters)
    assert {row.name: row.shape for row in rows} == parameters
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert model_map.nbytes == source.total_bytes
    assert sum(c.bytes for c in model_map.components()) == source.total_bytes


def test_components_are_named(saved: Saved, case: str) -> None:
    _, _, model_map = saved(case)
    assert {component.name for component in model_map.components()} == COMPONENTS[case]


def test_what_is_kept_says_why(saved: Saved, case: str) -> None:
    _, _, model_map = saved(case)
    for kept in model_map.kept:
        assert kept.reason.startswith(REASONS), f"{kept.name}: {kept.reason}"
        assert len(kept.reason.split()) >= 3, f"{kept.name}: {kept.reason!r} is no reason"


def test_positions_that_are_looked_up_are_weights(saved: Saved) -> None:
    """Whisper's encoder looks its positions up, 6 % of its bytes at 5 bits; the decoder slices its
    own."""
    _, _, model_map = saved("whisper")
    places = {"model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}
    weights = {weight.name: weight.kind for weight in model_map.weights if weight.name in places}
    assert weights == {"model.encoder.embed_positions.weight": "embedding"}
    assert places - weights.keys() <= {row.name for row in model_map.kept}


def test_every_matrix_and_convolution_is_a_weight_unless_kept_by_name(
    saved: Saved, case: str
) -> None:
    """No nn.Linear or convolution is overlooked; what is kept of them is listed here."""
    model, _, model_map = saved(case)
    kept = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)):
            kept |= {f"{name}.weight"} & {row.name for row in model_map.kept}
    allowed = (".ups.", "head.attention.out_proj.", ".mlp.gate.")
    assert [name for name in kept if not any(piece in name for piece in allowed)] == []


def test_parameters_read_from_disk_are_those_of_the_model(saved: Saved, case: str) -> None:
    """Also where the files have other names than the module, as published checkpoints do."""
    model, source, model_map = saved(case)
    for weight in model_map.weights:
        value = source.read(weight.name)
        torch.testing.assert_close(value, model.get_parameter(weight.name), rtol=0, atol=0)
        assert weight.matrix(value).shape == weight.shape
        assert weight.tensor(weight.matrix(value)).shape == value.shape


def test_a_skeleton_that_is_filled_is_the_model(saved: Saved, case: str) -> None:
    model, source, _ = saved(case)
    filled = skeleton.build(source)
    assert type(filled) is type(model)
    skeleton.materialize(filled, "", source)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(filled.state_dict()[name], value, rtol=0, atol=0)


def test_blocks_are_those_of_one_stack_and_the_others_are_listed(saved: Saved, case: str) -> None:
    _, _, model_map = saved(case)
    assert len(model_map.blocks) == 2
    stacked = [block for stack in model_map.stacks for block in stack.blocks]
    blocks = [*model_map.blocks, *stacked]
    assert len(blocks) == len(set(blocks))
    for block in blocks:
        assert model_map.weights_in(block), block
    for weight in model_map.weights:
        if weight.block is not None:
            assert weight.block in blocks
            assert weight.name.startswith(weight.block + ".")
    for stack in model_map.stacks:
        components = {w.component for block in stack.blocks for w in model_map.weights_in(block)}
        assert components == {stack.component}


def test_the_map_survives_json(saved: Saved, case: str) -> None:
    _, _, model_map = saved(case)
    assert ModelMap.from_json(json.loads(json.dumps(model_map.to_json()))) == model_map


def test_a_convolution_is_a_matrix_of_channels_and_window(saved: Saved) -> None:
    _, _, model_map = saved("whisper")
    conv = model_map.weight("model.encoder.conv1.weight")
    assert (conv.kind, conv.shape, conv.tensor_shape) == ("conv", (32, 8 * 3), (32, 8, 3))
    assert (conv.out_features, conv.in_features, conv.parameters) == (32, 24, 32 * 8 * 3)


def test_keys_and_values_of_cross_attention_read_the_encoder(saved: Saved) -> None:
    _, _, model_map = saved("whisper")
    block = "model.decoder.layers.0"
    groups = {group.name.removeprefix(f"{block}."): group for group in model_map.groups_in(block)}
    assert len(groups["self_attn.qkv"].members) == 3
    assert len(groups["encoder_attn.kv"].members) == 2
    assert len(groups["encoder_attn.q_proj"].members) == 1
    head = model_map.weight("proj_out.weight")
    assert (head.name, head.head) == ("model.decoder.embed_tokens.weight", "proj_out")


def test_the_mixture_inside_janus_keeps_its_router_and_quantizes_its_experts(saved: Saved) -> None:
    _, source, model_map = saved("janus_mixture")
    experts = [weight for weight in model_map.weights if weight.kind == "experts"]
    assert [weight.shape for weight in experts] == [(4, 96, 32), (4, 32, 48)] * 2
    assert {weight.component for weight in experts} == {"language_model"}
    routers = [row.name for row in model_map.kept if row.reason.startswith("router")]
    assert routers == [f"model.language_model.layers.{i}.mlp.gate.weight" for i in range(2)]
    assert any(".experts.3.w1.weight" in name for name in source.headers)


def test_the_generation_side_of_janus_is_told_apart(saved: Saved) -> None:
    _, _, model_map = saved("janus")
    component = {row.name: row.component for row in model_map.coverage()}
    assert component["model.generation_embeddings.weight"] == "generation_embeddings"
    assert component["model.generation_aligner.hidden_layers.0.weight"] == "generation_projector"
    assert component["model.generation_head.vision_head.weight"] == "generation_head"
    assert component["model.aligner.fc1.weight"] == "projector"
    assert component["model.vqmodel.post_quant_conv.weight"] == "image_decoder"
    assert component["model.vqmodel.quant_conv.bias"] == "image_encoder"
    assert model_map.weight("model.generation_embeddings.weight").kind == "embedding"


def test_text_decoders_have_no_other_stacks_and_the_file_they_had(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from .stacked_models import TEXT

    settings = {key: value for key, value in TEXT.items() if key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    data = ModelMap.from_source(Source.open(save(model, tmp_path))).to_json()
    assert "stacks" not in data
    assert all("tensor_shape" not in weight for weight in data["weights"])


def test_components_can_be_kept_as_a_whole(saved: Saved) -> None:
    _, _, model_map = saved("llava")
    text = model_map.keeping(["vision_tower", "projector"], "this calibration has no images")
    assert {w.component for w in text.weights} == {"language_model", "embeddings", "head"}
    assert {g.component for g in text.groups} == {"language_model", "embeddings", "head"}
    assert text.nbytes == model_map.nbytes
    before = {row.name: row.shape for row in model_map.coverage()}
    assert {row.name: row.shape for row in text.coverage()} == before
    conv = "model.vision_tower.embeddings.patch_embedding.weight"
    assert next(r for r in text.kept if r.name == conv).reason == "this calibration has no images"
    with pytest.raises(ModelError, match="no component audio_tower; it has vision_tower"):
        model_map.keeping(["audio_tower"], "no reason")


def longer_tower(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def old_bert(name: str) -> str:
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize(
    ("case", "published", "stored"),
    [
        # transformers 4 put `vision_model` between LLaVA's tower and its layers
        ("llava", longer_tower, "vision_tower.vision_model.embeddings.position_ids"),
        (
            "clip_vision",
            lambda name: f"vision_model.{name}",
            "vision_model.embeddings.position_ids",
        ),
        ("clip", lambda name: name, "text_model.embeddings.position_ids"),
        ("bert", old_bert, "bert.embeddings.position_ids"),
    ],
)
def test_names_of_older_checkpoints_are_known(
    saved: Saved, tmp_path: Path, case: str, published: Callable[[str], str], stored: str
) -> None:
    _, source, model_map = saved(case)
    (tmp_path / "config.json").write_bytes((source.path / "config.json").read_bytes())
    tensors = load_file(source.path / "model.safetensors")
    renamed = {published(name): tensor for name, tensor in tensors.items()}
    renamed[stored] = torch.arange(5)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert ModelMap.from_source(Source.open(tmp_path)).coverage() == model_map.coverage()


def test_a_part_without_a_table_is_named(saved: Saved) -> None:
    _, source, _ = saved("llava")
    config = {**source.config, "vision_config": {"model_type": "swin"}}
    family = find("llava")
    assert family is not None
    with pytest.raises(ModelError, match=r"vision_config of this llava model .*'swin'.*no table"):
        flatten(family, config, find)


def test_a_part_that_names_no_model_type_has_a_default(saved: Saved) -> None:
    _, source, _ = saved("llava")
    family = find("llava")
    assert family is not None
    nameless = {**source.config, "text_config": {}, "vision_config": {}}
    assert flatten(family, nameless, find) == flatten(family, source.config, find)
    text = Submodel("model.language_model", "text_config")
    with pytest.raises(ModelError, match="has the model type '', which has no table"):
        flatten(replace(family, language=text), nameless, find)


@pytest.mark.parametrize("case", ["whisper", "llava", "janus"])
def test_inspect_shows_the_components(saved: Saved, case: str) -> None:
    _, source, model_map = saved(case)
    result = CliRunner().invoke(app, ["inspect", str(source.path), "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert {row["name"] for row in answer["components"]} == COMPONENTS[case]
    assert sum(row["bytes"] for row in answer["components"]) == model_map.nbytes
    plain = CliRunner().invoke(app, ["inspect", str(source.path)])
    assert plain.exit_code == 0, plain.output
    assert "vision_tower" in plain.output or case == "whisper"
