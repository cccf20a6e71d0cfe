"""A skeleton holds no weights; filled, it computes what transformers does; then it empties."""

import gc
import mmap
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantlib.errors import ModelError
from quantlib.models import skeleton
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source

Saved = Callable[..., Path]
Edit = Callable[..., Path]
IDS = torch.arange(3, 19)[None]
STATM = Path("/proc/self/statm")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def devices(model: torch.nn.Module, prefix: str = "") -> set[str]:
    named = model.named_parameters()
    return {tensor.device.type for name, tensor in named if name.startswith(prefix)}


def test_a_skeleton_has_its_buffers_and_no_weights(case: str, saved: Saved) -> None:
    folder = saved(case)
    model = skeleton.build(Source.open(folder))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert devices(model) == {"meta"}
    assert not model.training
    buffers = dict(model.named_buffers())
    expected = dict(reference.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in expected.items():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)


def test_filled_block_by_block_it_computes_what_from_pretrained_does(
    case: str, saved: Saved
) -> None:
    folder = saved(case, max_shard_size="40KB")
    source = Source.open(folder)
    model = skeleton.build(source)
    blocks = ModelMap.from_source(source).blocks
    skeleton.materialize(model, "", source, exclude=blocks)
    for block in blocks:
        assert devices(model, block + ".") == {"meta"}
        skeleton.materialize(model, block, source)
        assert devices(model, block + ".") == {"cpu"}
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # same weights, same code, same dtype: nothing to round differently
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=0)


def test_release_really_frees_memory(saved: Saved) -> None:
    source = Source.open(saved("llama"))
    model = skeleton.build(source)
    skeleton.materialize(model, "", source)
    references = [weakref.ref(tensor) for tensor in model.model.layers[1].parameters()]
    assert len(references) == 9
    assert None not in [reference() for reference in references]
    skeleton.release(model, "model.layers.1")
    gc.collect()
    assert [reference() for reference in references] == [None] * 9
    assert devices(model, "model.layers.1.") == {"meta"}
    assert devices(model, "model.layers.0.") == {"cpu"}
    skeleton.release(model)
    assert devices(model) == {"meta"}


@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")
def test_a_pass_over_the_blocks_needs_the_memory_of_one(saved: Saved) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_key_value_heads": 4}
    source = Source.open(saved("llama", num_hidden_layers=12, **sizes))
    model_map = ModelMap.from_source(source)
    block_bytes = sum(weight.nbytes for weight in model_map.weights_in("model.layers.0"))
    model = skeleton.build(source)
    gc.collect()
    resident = []
    for block in model_map.blocks:
        skeleton.materialize(model, block, source)
        skeleton.release(model, block)
        resident.append(int(STATM.read_text().split()[1]) * mmap.PAGESIZE)
    # 12 blocks passed; half of one is room for what else the process does meanwhile
    assert resident[-1] - resident[1] < block_bytes / 2


def test_a_released_block_can_be_filled_again(saved: Saved) -> None:
    source = Source.open(saved("qwen3_moe"))
    model = skeleton.build(source)
    skeleton.materialize(model, "", source)
    before = logits(model)
    skeleton.release(model, "model.layers.2")
    skeleton.materialize(model, "model.layers.2", source)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["model.embed_tokens", "lm_head"])
def test_tied_weights_stay_one_tensor(saved: Saved, prefix: str) -> None:
    source = Source.open(saved("llama_tied"))
    model = skeleton.build(source)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is head.weight
    skeleton.materialize(model, prefix, source)
    assert embedding.weight is head.weight
    assert embedding.weight.device.type == "cpu"
    skeleton.release(model, prefix)
    assert embedding.weight is head.weight
    assert embedding.weight.device.type == "meta"


def test_a_head_that_differs_from_the_embedding_is_loaded_as_it_is(
    saved: Saved, edit: Edit
) -> None:
    head = torch.full((96, 32), 0.5)
    folder = edit(saved("llama_tied"), lambda tensors: tensors.update({"lm_head.weight": head}))
    source = Source.open(folder)
    model = skeleton.build(source)
    skeleton.materialize(model, "", source)
    torch.testing.assert_close(model.get_output_embeddings().weight.data, head, rtol=0, atol=0)


def test_dtypes_are_as_asked(saved: Saved, edit: Edit) -> None:
    def to_bfloat16(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    source = Source.open(edit(saved("llama"), to_bfloat16))
    model = skeleton.build(source)
    for asked, got in ((torch.float32, torch.float32), (None, torch.bfloat16)):
        skeleton.materialize(model, "", source, dtype=asked)
        assert {parameter.dtype for parameter in model.parameters()} == {got}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_a_prefix_is_a_whole_name(saved: Saved) -> None:
    source = Source.open(saved("llama", num_hidden_layers=11))
    model = skeleton.build(source)
    skeleton.materialize(model, "model.layers.1", source)
    assert devices(model, "model.layers.10.") == {"meta"}
    with pytest.raises(ModelError, match=r"no parameters under 'model\.layers\.11'"):
        skeleton.materialize(model, "model.layers.11", source)


def test_not_finite_weights_do_not_get_in(saved: Saved, edit: Edit) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edit(saved("llama"), lambda tensors: tensors[name][0, 0].fill_(float("nan")))
    source = Source.open(folder)
    model = skeleton.build(source)
    skeleton.materialize(model, "model.layers.0", source)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        skeleton.materialize(model, "model.layers.1", source)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nobody_knows"}, "no model type 'nobody_knows'.*never run"),
        (
            {
                "model_type": "remote",
                "auto_map": {"AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM"},
            },
            "no model type 'remote'",
        ),
        ({"model_type": "swin"}, "cannot build a model of model type 'swin'"),
        ({"model_type": "llama", "hidden_size": "wide"}, "cannot build a model"),
    ],
)
def test_what_transformers_cannot_build_is_a_sentence(
    config: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        skeleton.from_config(config)
