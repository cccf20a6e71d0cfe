"""Experts stored one by one and experts stored as a stack give the same parameters."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from quantlib.errors import ModelError
from quantlib.models.folder import SINGLE_FILE
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source

Saved = Callable[..., Path]
Tiny = Callable[..., PreTrainedModel]
Edit = Callable[..., Path]

EXPERT_1 = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.1.w3.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.1.up_proj.weight",
    "olmoe": "model.layers.1.mlp.experts.1.up_proj.weight",
}
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(params=EXPERT_1)
def moe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def save_stacked(model: PreTrainedModel, folder: Path) -> None:
    """As the transformers-5 module holds them: 3-D parameters under their own names."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / SINGLE_FILE, metadata={"format": "pt"})


def test_both_forms_on_disk_are_the_same_model(
    moe: str, tiny: Tiny, saved: Saved, tmp_path: Path
) -> None:
    model = tiny(moe)
    by_expert = Source.open(saved(moe))
    save_stacked(model, tmp_path / "stacked")
    stacked = Source.open(tmp_path / "stacked")
    assert EXPERT_1[moe] in by_expert.headers
    assert GATE_UP in stacked.headers
    for name, parameter in model.named_parameters():
        for source in (by_expert, stacked):
            torch.testing.assert_close(source.read(name), parameter, rtol=0, atol=0)
        if parameter.ndim == 3:
            one = parameter[2]
            for source in (by_expert, stacked):
                torch.testing.assert_close(source.read(name, expert=2), one, rtol=0, atol=0)
    one_way, other_way = ModelMap.from_source(by_expert), ModelMap.from_source(stacked)
    assert one_way.weights == other_way.weights
    assert one_way.coverage() == other_way.coverage()


def test_experts_are_stacks_and_the_router_is_kept(moe: str, saved: Saved) -> None:
    model_map = ModelMap.from_source(Source.open(saved(moe)))
    gate_up = model_map.weight(GATE_UP)
    width = 24 if moe == "qwen3_moe" else 48
    assert (gate_up.kind, gate_up.shape) == ("experts", (4, 2 * width, 32))
    assert (gate_up.experts, gate_up.out_features, gate_up.in_features) == (4, 2 * width, 32)
    assert gate_up.module == "model.layers.1.mlp.experts"
    assert model_map.group(gate_up.group).input_module == "model.layers.1.mlp.experts"
    down = model_map.weight("model.layers.1.mlp.experts.down_proj")
    assert down.shape == (4, 32, width)
    assert model_map.group(down.group).input_module is None
    routers = [kept.name for kept in model_map.kept if kept.reason.startswith("router")]
    assert routers == [f"model.layers.{block}.mlp.gate.weight" for block in range(3)]


def test_there_is_no_expert_beyond_the_last(saved: Saved) -> None:
    source = Source.open(saved("mixtral"))
    for expert in (-1, 4):
        with pytest.raises(ModelError, match=f"no expert {expert}"):
            source.read(GATE_UP, expert=expert)
    with pytest.raises(ModelError, match="no expert 0"):
        source.read("lm_head.weight", expert=0)


def test_a_missing_expert_is_named(moe: str, saved: Saved, edit: Edit) -> None:
    folder = saved(moe)
    edit(folder, lambda tensors: tensors.pop(EXPERT_1[moe]))
    part = EXPERT_1[moe].rsplit(".", 3)[1:]
    with pytest.raises(ModelError, match=rf"layers\.1\..*incomplete.*{'.'.join(part)}"):
        Source.open(folder)


def test_experts_that_disagree_are_refused(moe: str, saved: Saved, edit: Edit) -> None:
    folder = saved(moe)
    name = EXPERT_1[moe]
    edit(folder, lambda tensors: tensors.update({name: tensors[name].half()}))
    with pytest.raises(ModelError, match=r"is F16 .* they must agree"):
        Source.open(folder)


def test_a_parameter_stored_in_both_forms_is_refused(
    moe: str, tiny: Tiny, saved: Saved, edit: Edit
) -> None:
    folder = saved(moe)
    stack = tiny(moe).get_parameter(GATE_UP).detach()
    edit(folder, lambda tensors: tensors.update({GATE_UP: stack}))
    with pytest.raises(ModelError, match="stored twice"):
        Source.open(folder)


def test_not_finite_experts_are_refused_by_stack_and_by_expert(saved: Saved, edit: Edit) -> None:
    folder = saved("mixtral")
    edit(folder, lambda tensors: tensors[EXPERT_1["mixtral"]].fill_(float("inf")))
    source = Source.open(folder)
    with pytest.raises(ModelError, match=f"{48 * 32} values"):
        source.read(GATE_UP)
    with pytest.raises(ModelError, match=f"{48 * 32} values"):
        source.read(GATE_UP, expert=1)
    assert source.read(GATE_UP, expert=0).isfinite().all()
