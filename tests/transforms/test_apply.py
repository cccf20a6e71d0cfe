"""A change of basis changes nothing that a model computes: every part alone, and all together."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from quantlib.errors import TransformError
from quantlib.formats import Scheme, dequantize, quantize_rtn
from quantlib.runtime.assemble import quantize_in_memory
from quantlib.transforms import online
from quantlib.transforms.apply import rotate_module
from quantlib.transforms.binding import wire
from quantlib.transforms.changes import changes
from quantlib.transforms.hadamard import block_size, rotate
from quantlib.transforms.rotation import Rotation

from .families import CASES, FIXED_RESIDUAL, HIGH, IDS, inputs, logits, make, random_rotation

PARTS = ("norms", "residual", "value", "key", "hidden")
ORDERED = (*PARTS, "order")
TOLERANCE = 1e-4
"""Relative to the largest logit. float32 gives 1e-6 here; a gain that is not folded gives 1e-1."""


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


@pytest.mark.parametrize(
    "parts",
    [*[(part,) for part in (*PARTS, "order")], ("hidden", "order"), PARTS, ORDERED],
    ids="+".join,
)
def test_the_rotated_model_computes_the_same(case: str, parts: tuple[str, ...]) -> None:
    model = make(case)
    before = logits(model)
    rotate_module(model, wire(model), random_rotation(model, *parts))
    error = difference(logits(model), before)
    assert error <= TOLERANCE


@pytest.mark.parametrize("case", ["llama_tied", "qwen2", "gemma", "whisper"])
def test_in_float64_it_computes_the_same_to_float32(case: str) -> None:
    """What is left is the rounding of the new parameters to float32, once."""
    model = make(case, torch.float64)
    before = logits(model)
    rotate_module(model, wire(model), random_rotation(model, *PARTS))
    assert difference(logits(model), before) <= 2e-6


@pytest.mark.parametrize("parts", [PARTS, ORDERED], ids=["plain", "ordered"])
def test_every_change_is_needed(case: str, parts: tuple[str, ...]) -> None:
    """Putting back any one original parameter breaks the model, so none is changed in vain, and the
    tolerance above would have noticed each that is missing."""
    model = make(case)
    originals = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wiring, rotation = wire(model), random_rotation(model, *parts)
    rotate_module(model, wiring, rotation)
    rotated = logits(model)
    parameters = dict(model.named_parameters())
    for name in changes(wiring, rotation):
        now = parameters[name].clone()
        parameters[name].copy_(originals[name])
        assert difference(logits(model), rotated) > 10 * TOLERANCE, name
        parameters[name].copy_(now)
    assert difference(logits(model), rotated) == 0


def hidden_states(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What every block puts out on the case's inputs."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, _: nn.Module, __: object, output: Any) -> None:
        seen[name] = (output[0] if isinstance(output, tuple) else output).double()

    handles = [
        model.get_submodule(block).register_forward_hook(partial(keep, block))
        for block in wire(model).blocks
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(FIXED_RESIDUAL)])
def test_residual_bases_really_turn_the_stream(case: str) -> None:
    model = make(case)
    rotation = random_rotation(model, "residual")
    before = hidden_states(model)
    rotate_module(model, wire(model), rotation)
    for block, found in hidden_states(model).items():
        basis = rotation.encoder if ".encoder." in block else rotation.residual
        assert basis is not None
        stream = before[block]
        if case.startswith("whisper"):  # the part that a LayerNorm would subtract is left out
            stream = stream - stream.mean(-1, keepdim=True)
        assert difference(found, stream @ basis) <= TOLERANCE
        assert difference(found, stream) > 0.1


@pytest.mark.parametrize("case", ["llama", "llama_tied", "qwen3_moe", "phi3"])
def test_greedy_decoding_with_a_cache_gives_the_same_tokens(case: str) -> None:
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    model = make(case)
    before = model.generate(IDS, **settings)
    rotate_module(model, wire(model), random_rotation(model, *PARTS))
    assert torch.equal(model.generate(IDS, **settings), before)


def test_whisper_decodes_the_same_tokens() -> None:
    model = make("whisper")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    sound = inputs(model)["input_features"]
    before = model.generate(sound, **settings)
    rotate_module(model, wire(model), random_rotation(model, *PARTS))
    assert torch.equal(model.generate(sound, **settings), before)


def test_smaller_hadamard_blocks_are_as_good() -> None:
    model = make("llama_biased")
    before = logits(model)
    wiring = wire(model)
    sizes = dict(zip(wiring.blocks, (12, 1), strict=True))
    rotate_module(model, wiring, Rotation(hidden=sizes))
    assert difference(logits(model), before) <= TOLERANCE


def test_an_empty_rotation_leaves_every_bit() -> None:
    model = make("llama")
    before = logits(model)
    rotate_module(model, wire(model), Rotation())
    assert torch.equal(logits(model), before)


def test_a_model_is_rotated_once() -> None:
    model = make("llama")
    wiring, rotation = wire(model), random_rotation(model, *PARTS)
    rotate_module(model, wiring, rotation)
    after = logits(model)
    with pytest.raises(TransformError, match="rotated already"):
        rotate_module(model, wiring, rotation)
    with pytest.raises(TransformError, match="rotated already"):
        online.attach(model, wiring, rotation)
    assert torch.equal(logits(model), after)


def test_a_rotation_of_another_model_changes_nothing() -> None:
    model, other = make("llama"), make("qwen3")
    before = logits(model)
    with pytest.raises(TransformError, match="made for another model"):
        rotate_module(model, wire(model), random_rotation(other, *PARTS))
    assert torch.equal(logits(model), before)


def test_an_order_moves_channels_of_the_hidden_layer_and_hadamard_matrices_the_first(
    case: str,
) -> None:
    """What the down projections read is the original's channels in the given order, all but the
    last ones rotated."""
    model = make(case)
    rotation = random_rotation(model, "hidden", "order")
    before = hidden_layers(model)
    rotate_module(model, wire(model), rotation)
    after = hidden_layers(model)
    assert after.keys() == before.keys()
    for name, found in after.items():
        expected = before[name][:, rotation.hidden_order[name]]
        low = expected.shape[1] - HIGH
        torch.testing.assert_close(found[:, low:], expected[:, low:], rtol=1e-4, atol=1e-4)
        turned = rotate(expected[:, :low], rotation.hidden[name])
        torch.testing.assert_close(found[:, :low], turned, rtol=1e-4, atol=1e-4)
        assert difference(found[:, :low], expected[:, :low]) > 0.1


def hidden_layers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What every block's down projection reads [T, I] (not experts')."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[name] = args[0].flatten(0, -2).double()

    # a pre-hook that is registered last sees what those before it made of the input
    handles = [
        model.get_submodule(site.module).register_forward_pre_hook(partial(keep, site.name))
        for site in wire(model).hiddens
        if not site.inner
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("case", ["llama_biased", "phi3", "mixtral", "whisper"])
def test_an_order_that_only_one_side_follows_is_noticed(case: str) -> None:
    model = make(case)
    before = logits(model)
    wiring, rotation = wire(model), random_rotation(model, "order")
    rotate_module(model, wiring, rotation)
    assert difference(logits(model), before) <= TOLERANCE
    down = model.get_parameter(wiring.hiddens[-1].down.weight)
    down.copy_(down.roll(1, -1))
    assert difference(logits(model), before) > 10 * TOLERANCE


@pytest.mark.parametrize("case", ["llama", "llama_tied", "mixtral", "whisper", "whisper_untied"])
def test_the_online_part_is_all_that_rotated_weights_need(case: str) -> None:
    """A checkpoint of rotated weights stores `Rotation.online` and not what is fused."""
    model, again = make(case), make(case)
    wiring, rotation = wire(model), random_rotation(model, *ORDERED)
    rotate_module(model, wiring, rotation)
    again.load_state_dict(model.state_dict())
    part = rotation.online(wiring)
    assert online.attached(again) is None
    online.attach(again, wiring, part)
    for each in (model, again):
        kept = online.attached(each)
        assert kept is not None
        assert kept.content_hash == part.content_hash
    assert torch.equal(logits(again), logits(model))
    assert not part.value
    assert not part.hidden_order
    assert set(part.hidden_high.values()) == {HIGH}
    assert (part.residual is None) == (case in ("llama", "mixtral"))


def test_untied_models_pay_for_hidden_layers_and_keys_only() -> None:
    model = make("llama")
    rotate_module(model, wire(model), random_rotation(model, *PARTS))
    hooked = {
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    }
    assert hooked == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize("case", FIXED_RESIDUAL)
def test_output_norms_are_named_where_they_forbid_a_residual_basis(case: str) -> None:
    model = make(case)
    width = model.config.get_text_config().hidden_size
    identity = torch.eye(width, dtype=torch.float64)
    with pytest.raises(TransformError, match="post_attention_layernorm multiplies what is written"):
        rotate_module(model, wire(model), Rotation(residual=identity))


def test_hadamard_sizes_of_the_tiny_models_are_not_all_powers_of_two() -> None:
    sizes = {block_size(site.width) for case in CASES for site in wire(make(case)).hiddens}
    assert sizes & {12, 24, 48}


@pytest.mark.parametrize("parts", [("hidden",), ("hidden", "order")], ids="+".join)
def test_packed_experts_are_followed_too(parts: tuple[str, ...]) -> None:
    """A checkpoint is assembled first and gets its online part then."""
    model, packed = make("mixtral"), make("mixtral")
    wiring, rotation = wire(model), random_rotation(model, *parts)
    rotate_module(model, wiring, rotation)
    weights = {}
    for site in wiring.hiddens:
        parameter = model.get_parameter(site.down.weight)
        segments = Scheme.parse("w8").segments(site.width)
        weights[site.down.weight] = quantize_rtn(parameter.flatten(0, 1), segments)
        parameter.copy_(dequantize(weights[site.down.weight]).view_as(parameter))
    packed.load_state_dict(model.state_dict())
    quantize_in_memory(packed, weights, mode="exact")
    online.attach(packed, wiring, rotation)
    # the same products, summed by other kernels
    assert difference(logits(packed), logits(model)) <= 1e-5
