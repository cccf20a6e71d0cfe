"""Checkpoints of rotated models whose inputs are rounded: what is loaded computes what was made."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import quantlib
from quantlib.checkpoint.reader import read_layout
from quantlib.checkpoint.surroundings import CacheSettings
from quantlib.checkpoint.writer import write_checkpoint
from quantlib.errors import CheckpointError, QuantlibError, TransformError
from quantlib.formats import Scheme, dequantize, fake_quantize, pack, quantize_rtn, with_clips
from quantlib.kernels.kv_format import KvFormat
from quantlib.runtime.assemble import Inputs, quantize_in_memory
from quantlib.runtime.describe import states_of
from quantlib.transforms.apply import rotate_module
from quantlib.transforms.attention import attach_attention
from quantlib.transforms.binding import wire
from quantlib.transforms.rotation import Rotation

SCHEME = "w4g16a4zh8/8"
O_PROJ = "self_attn.o_proj.weight"
A_FEW_CODES = 0.01
"""Relative error of the logits. Sums in another order move one of some thousand 4-bit codes by a
step at times; an order or a rounding left out changes the logits by a tenth and more."""


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, of all logits together."""
    return float((found - expected).norm() / expected.norm())


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def rotation_of(family: str, high: int = 0) -> Rotation:
    """Every kind of change that the family's models know, for two blocks. high: so many channels
    stay outside the Hadamard matrices of the second block."""
    blocks = [f"model.layers.{number}" for number in range(2)]
    hidden = {"qwen3-moe": 8}.get(family, 16)
    return Rotation(
        residual=None if family == "gemma2" else orthogonal(48, 0),
        value={block: torch.stack([orthogonal(16, 1), orthogonal(16, 2)]) for block in blocks},
        key={block: orthogonal(16, 3) for block in blocks},
        hidden=dict.fromkeys(blocks, hidden),
        hidden_high={blocks[1]: high} if high else {},
    )


@dataclass
class Made:
    """A checkpoint, the dense model it is of (rotated), and what its packed weights are."""

    folder: Path
    original: Any
    rotated: Any
    weights: dict[str, Any]
    inputs: dict[str, Inputs]
    caches: dict[str, CacheSettings]

    def rounding(self) -> Any:
        """The rotated dense model, with rounded weights and hooks that round inputs."""
        model = copy.deepcopy(self.rotated)
        for name, weight in self.weights.items():
            given, parameter = self.inputs[name], model.get_parameter(name)
            dense = dequantize(weight)
            if given.order is not None:
                dense = dense[:, torch.argsort(given.order)]
            parameter.data.copy_(dense.view(parameter.shape))
            if given.activations:
                model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
                    _Round(given)
                )
        return model

    def in_memory(self) -> Any:
        """The rotated model with packed modules."""
        model = copy.deepcopy(self.rotated)
        quantize_in_memory(model, self.weights, inputs=self.inputs)
        return model


class _Round:
    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, order = args[0], self.inputs.order
        if order is None:
            return (fake_quantize(x, self.inputs.activations),)
        rounded = fake_quantize(x[..., order], self.inputs.activations)
        return (rounded[..., torch.argsort(order)],)


@pytest.fixture
def make(build_tiny: Callable[..., Any], tmp_path: Path) -> Callable[..., Made]:
    """`make(family)`: rotated, linears in SCHEME, the output projections of attention in another
    order, with clip factors; keys and values rounded, but for 2 first positions or those that `kv`
    names; embeddings kept, or with 8 bits."""

    def build(
        family: str = "llama", embedding: str = "f32", high: int = 0, kv: str = "int8/int4"
    ) -> Made:
        original = build_tiny(family)
        rotated = copy.deepcopy(original)
        wiring, rotation = wire(rotated), rotation_of(family, high)
        caches = {a.module: CacheSettings(KvFormat.parse(kv), 2, 8) for a in wiring.attentions}
        attach_attention(rotated, states_of(caches))
        rotate_module(rotated, wiring, rotation)
        weights, inputs, shapes, clips, schemes = {}, {}, {}, {}, {}
        tensors = {name: p.detach() for name, p in rotated.named_parameters()}
        for name, parameter in rotated.named_parameters():
            text = schemes[name] = SCHEME if ".layers." in name else embedding
            if parameter.dim() < 2 or "mlp.gate." in name or text == "f32":
                del schemes[name]
                continue
            scheme, columns = Scheme.parse(text), parameter.shape[-1]
            matrix = tensors.pop(name).reshape(-1, columns)
            activations, order = scheme.activations(columns), None
            if name.endswith(O_PROJ):
                generator = torch.Generator().manual_seed(columns)
                order = torch.randperm(columns, generator=generator).to(torch.int32)
                tensors[name + "_order"] = order
                clips[name] = [0.875, 1.0]
                activations = with_clips(activations, clips[name])
                matrix = matrix[:, order]
            weights[name] = quantize_rtn(matrix, scheme.segments(columns))
            inputs[name] = Inputs(activations, order)
            shapes[name] = tuple(parameter.shape)
            tensors |= {name + suffix: t for suffix, t in pack(weights[name]).items()}
        config = rotated.config.to_dict() | {"architectures": [type(rotated).__name__]}
        config["dtype"] = "float32"
        folder = tmp_path / f"rotated-{family}"
        write_checkpoint(
            folder,
            tensors,
            config,
            schemes,
            shapes,
            clips=clips,
            rotation=rotation.online(wiring),
            caches=caches,
        )
        return Made(folder, original, rotated, weights, inputs, caches)

    return build


def load(folder: Path, **options: Any) -> Any:
    """The model, having checked that transformers found every tensor and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert not any(info[key] for key in keys), info
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


@pytest.mark.parametrize("embedding", ["f32", "w8g16"])
@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma2", "qwen3-moe"])
def test_a_loaded_model_equals_the_one_made_in_memory(
    make: Callable[..., Made], family: str, embedding: str, ids: Tensor
) -> None:
    made = make(family, embedding)
    assert torch.equal(logits(load(made.folder), ids), logits(made.in_memory(), ids))


@pytest.mark.parametrize("embedding", ["f32", "w8g16"])
@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma2"])
def test_it_equals_the_dense_model_with_rounded_weights_and_inputs(
    make: Callable[..., Made], family: str, embedding: str, ids: Tensor
) -> None:
    made = make(family, embedding)
    expected = logits(made.rounding(), ids)
    assert difference(logits(load(made.folder), ids), expected) <= A_FEW_CODES
    # And that is another model than one that rounds nothing.
    assert difference(logits(made.rotated, ids), expected) > 10 * A_FEW_CODES


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_in_exact_mode_only_the_weights_are_rounded(
    make: Callable[..., Made], family: str, ids: Tensor
) -> None:
    made = make(family)
    model = quantlib.load(made.folder, mode="exact").model
    made.inputs = {name: Inputs((), given.order) for name, given in made.inputs.items()}
    expected = logits(made.rounding(), ids)
    assert difference(logits(model, ids), expected) <= A_FEW_CODES
    assert difference(logits(load(made.folder), ids), expected) > 10 * A_FEW_CODES


def test_families_the_engine_does_not_know_run_through_transformers(
    make: Callable[..., Made],
) -> None:
    loaded = quantlib.load(make("qwen3-moe").folder)
    assert (loaded.engine, loaded.mode) == ("plain", "scheme")
    assert "qwen3_moe is not one of its families" in str(loaded.plain_reason)


def test_a_saved_model_loads_again(make: Callable[..., Made], ids: Tensor, tmp_path: Path) -> None:
    made = make()
    first = load(made.folder)
    first.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(first, ids), logits(again, ids))
    before, after = (load_file(f / "model.safetensors") for f in (made.folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    described = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (made.folder, tmp_path / "again")
    ]
    for entry in ("version", "schemes", "clips", "orders", "transforms", "caches"):
        assert described[0][entry] == described[1][entry], entry


def test_a_model_made_in_memory_can_be_saved_too(
    make: Callable[..., Made], ids: Tensor, tmp_path: Path
) -> None:
    in_memory = make().in_memory()
    in_memory.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(in_memory, ids))


def test_keys_and_values_are_rounded_as_the_checkpoint_says(
    make: Callable[..., Made], ids: Tensor
) -> None:
    made = make()
    states = {
        name: module.quantlib_attention
        for name, module in load(made.folder).named_modules()
        if hasattr(module, "quantlib_attention")
    }
    assert states.keys() == made.caches.keys()
    for state in states.values():
        assert state.key_basis is not None
        assert (str(state.kv), state.sinks, state.query_bits) == ("int8/int4", 2, 8)
    unrounded = load(made.folder)
    for state_name, state in states.items():
        exact = replace(state, kv=None, query_bits=0)
        unrounded.get_submodule(state_name).quantlib_attention = exact
    assert difference(logits(unrounded, ids), logits(load(made.folder), ids)) > A_FEW_CODES


def test_a_rotation_of_another_model_is_a_sentence(make: Callable[..., Made]) -> None:
    folder = make().folder
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rotation = config["quantization_config"]["transforms"]["rotation"]
    rotation["hidden"]["model.layers.7"] = 16
    path.write_text(json.dumps(config))
    with pytest.raises(TransformError, match=r"model\.layers\.7.*another model"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_order_that_is_none_is_a_sentence(make: Callable[..., Made]) -> None:
    made = make()
    path = made.folder / "model.safetensors"
    name = f"model.layers.0.{O_PROJ}_order"
    data = bytearray(path.read_bytes())
    header = read_layout(made.folder).headers[name]
    data[header.start : header.start + 8] = bytes(8)  # input 0 twice
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not name each of 64 inputs once"):
        AutoModelForCausalLM.from_pretrained(made.folder)


def test_an_unknown_transform_is_a_sentence(make: Callable[..., Made]) -> None:
    folder = make().folder
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["transforms"]["smoothing"] = {}
    path.write_text(json.dumps(config))
    with pytest.raises(QuantlibError, match="changed by 'smoothing'"):
        AutoModelForCausalLM.from_pretrained(folder)
