"""After `import quantlib`, transformers loads, runs and saves packed checkpoints."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import quantlib
from quantlib.errors import CheckpointError
from quantlib.runtime.assemble import quantize_in_memory
from quantlib.runtime.modules import TiedHead, packed_modules

FLOAT32_SUMS = {"rtol": 1e-4, "atol": 1e-4}
"""Logits are of order 1; sums of a few hundred float32 products in two orders differ far less."""


def load(folder: Path, **options: Any) -> Any:
    """The model, having checked that transformers found every tensor and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager", **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def test_a_loaded_model_equals_the_one_quantized_in_memory(packed: Any, ids: Tensor) -> None:
    loaded = load(packed.folder)
    in_memory = copy.deepcopy(packed.dense)
    quantize_in_memory(in_memory, packed.weights)
    assert torch.equal(logits(loaded, ids), logits(in_memory, ids))


def test_it_equals_a_dense_model_with_the_dequantized_weights(packed: Any, ids: Tensor) -> None:
    loaded, dense = load(packed.folder), packed.dequantized()
    torch.testing.assert_close(logits(loaded, ids), logits(dense, ids), **FLOAT32_SUMS)


def test_greedy_text_equals_that_of_the_dense_model(packed: Any, ids: Tensor) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    loaded, dense = load(packed.folder), packed.dequantized()
    assert torch.equal(loaded.generate(ids, **options), dense.generate(ids, **options))


def test_the_state_dict_is_the_file(packed: Any) -> None:
    state, stored = load(packed.folder).state_dict(), load_file(packed.folder / "model.safetensors")
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def test_only_packed_bytes_are_resident(packed: Any) -> None:
    """Every tensor that the model holds is in the file, but for the rotary frequencies."""
    model = load(packed.folder)
    stored = load_file(packed.folder / "model.safetensors")
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    extra = {name: t for name, t in model.named_buffers() if name not in model.state_dict()}
    assert all("inv_freq" in name for name in extra)
    resident = sum(t.nbytes for t in tensors.values()) - sum(t.nbytes for t in extra.values())
    assert resident == sum(t.nbytes for t in stored.values())


def test_a_saved_model_loads_again(packed: Any, ids: Tensor, tmp_path: Path) -> None:
    first = load(packed.folder)
    first.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(first, ids), logits(again, ids))
    before, after = (
        load_file(folder / "model.safetensors") for folder in (packed.folder, tmp_path / "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_quantized_in_memory_can_be_saved_too(
    packed: Any, ids: Tensor, tmp_path: Path
) -> None:
    quantize_in_memory(packed.dense, packed.weights)
    packed.dense.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(packed.dense, ids))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tied_heads_stay_tied(family: str, write_packed: Callable[..., Any], ids: Tensor) -> None:
    model = load(write_packed(family).folder)
    assert isinstance(model.lm_head, TiedHead)
    assert model.lm_head.source is model.get_input_embeddings()
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]
    before = logits(model, ids)
    model.tie_weights()
    assert torch.equal(logits(model, ids), before)


def test_a_tied_embedding_that_is_kept_stays_tied(
    write_packed: Callable[..., Any], ids: Tensor
) -> None:
    packed = write_packed("llama", {"": "w4g32", "model.embed_tokens.weight": "f32"})
    model = load(packed.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = logits(packed.dequantized(), ids)
    torch.testing.assert_close(logits(model, ids), expected, **FLOAT32_SUMS)


def test_one_expert_matrix_can_be_kept(write_packed: Callable[..., Any], ids: Tensor) -> None:
    schemes = {"": "w4g16", "model.layers.0.mlp.experts.down_proj": "f32"}
    packed = write_packed("qwen3-moe", schemes)
    expected = logits(packed.dequantized(), ids)
    torch.testing.assert_close(logits(load(packed.folder), ids), expected, **FLOAT32_SUMS)


def test_bfloat16_touches_what_is_kept_and_nothing_packed(packed: Any, ids: Tensor) -> None:
    model = load(packed.folder, dtype=torch.bfloat16)
    stored = load_file(packed.folder / "model.safetensors")
    names = {f"{n}.{b}" for n, m in packed_modules(model).items() for b in m.packed_names()}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (stored[name].dtype if name in names else torch.bfloat16), name
    result = logits(model, ids)
    assert result.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; what is left of them after two blocks is compared as a whole.
    exact = logits(load(packed.folder), ids)
    error = (result.float() - exact).norm() / exact.norm()
    assert error <= 0.1


def test_modules_that_a_family_keeps_in_float32_leave_packed_tensors_alone(
    write_packed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers casts all that such a name matches, whatever dtype the module declares."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"down_proj", "norm"})
    model = load(write_packed("llama", {"": "w4g32"}).folder, dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.down_proj.weight_scale.dtype == torch.float16
    assert model.model.norm.weight.dtype == torch.float32


def test_casting_a_loaded_model_leaves_packed_tensors_alone(packed: Any, ids: Tensor) -> None:
    loaded, cast = load(packed.folder, dtype=torch.bfloat16), load(packed.folder)
    assert logits(cast, ids).dtype == torch.float32
    cast.to(torch.bfloat16)
    assert logits(cast, ids).dtype == torch.bfloat16
    state = cast.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_are_obeyed(
    device_map: Any, write_packed: Callable[..., Any], ids: Tensor
) -> None:
    packed = write_packed("llama")
    model = load(packed.folder, device_map=device_map)
    assert torch.equal(logits(model, ids), logits(load(packed.folder), ids))


def test_a_config_without_dtype_does_not_take_that_of_the_scales(
    write_packed: Callable[..., Any],
) -> None:
    packed = write_packed("llama", dtype=None)
    assert "dtype" not in json.loads((packed.folder / "config.json").read_text())
    assert load(packed.folder).dtype == torch.float32


def test_the_base_model_loads_without_the_head(
    write_packed: Callable[..., Any], ids: Tensor
) -> None:
    packed = write_packed("llama-untied")
    base, whole = AutoModel.from_pretrained(packed.folder), load(packed.folder)
    with torch.no_grad():
        expected = whole.model(ids).last_hidden_state
        assert torch.equal(base(ids).last_hidden_state, expected)


def _change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["quantization_config"].update(version=99), "version 99"),
        (lambda c: c["quantization_config"].pop("version"), "version"),
        (lambda c: c["quantization_config"].update(schemes=["w4"]), "damaged"),
        (lambda c: c["quantization_config"].pop("shapes"), "damaged"),
        (lambda c: c["quantization_config"]["schemes"].update({K_PROJ: "w99"}), "k_proj.*w99"),
        (lambda c: c["quantization_config"]["schemes"].update({K_PROJ: "w7"}), "k_proj.*w7"),
        (lambda c: c.update(num_hidden_layers=1), "layers.1"),
        (lambda c: c.update(intermediate_size=96), "do not belong together"),
    ],
)
def test_a_damaged_config_is_refused_with_a_sentence(
    change: Callable[[dict[str, Any]], None], sentence: str, write_packed: Callable[..., Any]
) -> None:
    folder = write_packed("llama").folder
    _change_config(folder, change)
    with pytest.raises(quantlib.QuantlibError, match=sentence):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_truncated_file_is_refused_with_a_sentence(write_packed: Callable[..., Any]) -> None:
    weights = write_packed("llama").folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        AutoModelForCausalLM.from_pretrained(weights.parent)


def test_the_plugin_does_not_quantize(tiny_llama: Callable[[Path], Path], tmp_path: Path) -> None:
    from quantlib.runtime.transformers_plugin import QuantlibConfig

    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(
            tiny_llama(tmp_path), quantization_config=QuantlibConfig()
        )


K_PROJ = "model.layers.0.self_attn.k_proj.weight"
