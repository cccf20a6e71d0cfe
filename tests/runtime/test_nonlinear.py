"""Encoders compute softmax, GELU and LayerNorm in integers, layer by layer, where that is good
enough."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlib.errors import DataError, ModelError
from quantlib.kernels.nonlinear import Operator, sqnr
from quantlib.kernels.nonlinear.rule import Rule, choose
from quantlib.runtime import nonlinear
from quantlib.runtime.nonlinear_fit import (
    encoder_outputs,
    measure,
    nonlinear_operators,
    observe,
)

from ..models.stacked_models import IMAGE, build

PIXELS = {
    "siglip_vision": 28,
    "clip_vision": 28,
    "dinov2": 28,
    "llava_siglip": 28,
    "janus": 8,
    "idefics3": 28,
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softened(case: str) -> PreTrainedModel:
    """A tiny model whose weights are small enough for its attention to look around."""
    model = build(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1.0)
    return model


def encode(model: PreTrainedModel, case: str, seed: int = 0) -> Callable[[], Any]:
    pixels = random(2, 3, PIXELS[case], PIXELS[case], seed=seed)
    if case in ("siglip_vision", "clip_vision", "dinov2"):
        return lambda: model(pixel_values=pixels)
    features = (model.model if case == "janus" else model).get_image_features
    return lambda: features(
        pixels[:, None] if case == "idefics3" else pixels,
        **({} if case != "llava_siglip" else {"vision_feature_layer": -1}),
    )


def runs(model: PreTrainedModel, case: str) -> list[Callable[[], Any]]:
    return [encode(model, case, seed) for seed in range(2)]


@pytest.mark.parametrize("case", PIXELS)
def test_every_layer_of_an_encoder_is_found_and_no_other(case: str) -> None:
    model = softened(case)
    found = observe(model, runs(model, case))
    kinds = [observed.kind for observed in found.values()]
    # Two layers of two norms, an MLP and an attention each; towers add a norm behind, and SigLIP a
    # head with an MLP.
    assert kinds.count("softmax") == 2
    assert kinds.count("gelu") == 2 + ("siglip" in case)
    assert kinds.count("layer_norm") >= 5
    assert not [name for name in found if "language_model" in name or "text_model" in name]
    assert nonlinear.attached(model) == {}


@pytest.mark.parametrize("case", ["siglip_vision", "dinov2", "janus"])
def test_watching_changes_nothing_that_the_encoder_gives(case: str) -> None:
    model = softened(case)
    before = encoder_outputs(model, runs(model, case))
    observe(model, runs(model, case))
    after = encoder_outputs(model, runs(model, case))
    for one, other in zip(before, after, strict=True):
        # Attention goes on through transformers' own function.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", PIXELS)
def test_an_encoder_in_integers_gives_nearly_what_it_gave(case: str) -> None:
    model = softened(case)
    batches = runs(model, case)
    exact = encoder_outputs(model, batches)
    operators = choose(measure(model, batches), 25.0)
    assert {operator.kind for operator in operators.values()} == {"softmax", "gelu", "layer_norm"}
    nonlinear.attach(model, operators)
    computed = encoder_outputs(model, batches)
    for one, other in zip(exact, computed, strict=True):
        # About ten layers of 25 dB or better each, and residual streams that carry more: 10 dB
        # below one layer's noise is what equal, independent noise would give.
        assert sqnr(one, other) >= 12.0
        assert not torch.equal(one, other)


def test_what_is_attached_is_told_and_taken_away() -> None:
    model = softened("siglip_vision")
    batches = runs(model, "siglip_vision")
    exact, names = encoder_outputs(model, batches), list(model.state_dict())
    operators = choose(measure(model, batches), 20.0)
    nonlinear.attach(model, operators)
    assert nonlinear.attached(model) == operators
    assert list(model.state_dict()) == names
    nonlinear.attach(model, operators)  # again, in place of themselves
    assert nonlinear.attached(model) == operators
    nonlinear.detach(model)
    assert nonlinear.attached(model) == {}
    for one, other in zip(exact, encoder_outputs(model, batches), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_layer_gets_the_dB_that_the_rule_asks_for() -> None:
    model = softened("dinov2")
    batches = runs(model, "dinov2")
    fits = measure(model, batches)
    chosen = nonlinear_operators(model, batches, Rule.parse("sqnr=30"))
    for name, methods in fits.items():
        best = max(found for _, found in methods.values())
        assert (name in chosen) == (best >= 30.0)
        if name in chosen:
            assert dict(methods)[chosen[name].method][1] >= 30.0
    assert nonlinear_operators(model, batches, Rule("sqnr", 500.0)) == {}


def test_outputs_get_the_dB_that_the_rule_asks_for() -> None:
    model = softened("siglip_vision")
    batches = runs(model, "siglip_vision")
    exact = encoder_outputs(model, batches)
    counts = []
    for decibels in (10.0, 30.0, 300.0):
        chosen = nonlinear_operators(model, batches, Rule("output", decibels))
        assert nonlinear.attached(model) == {}
        nonlinear.attach(model, chosen)
        found = [
            sqnr(one, other)
            for one, other in zip(exact, encoder_outputs(model, batches), strict=True)
        ]
        nonlinear.detach(model)
        assert math.isnan(sum(found)) is False
        assert sum(found) / len(found) >= min(decibels, 100.0)
        counts.append(len(chosen))
    assert counts[0] > counts[-1] == 0


def test_masks_of_patches_count_in_integers_too() -> None:
    model = softened("idefics3")
    pixels = random(1, 1, 3, 28, 28)
    seen = torch.ones(1, 1, 28, 28, dtype=torch.bool)
    seen[..., 14:] = False

    def run(x: Tensor) -> Callable[[], Any]:
        return lambda: model.get_image_features(x, pixel_attention_mask=seen)

    operators = choose(measure(model, [run(pixels)]), 15.0)
    assert "softmax" in {operator.kind for operator in operators.values()}
    nonlinear.attach(model, operators)
    other = pixels.clone()
    other[..., 14:] = 9.0
    (one,), (two,) = (encoder_outputs(model, [run(x)]) for x in (pixels, other))
    # Patches that are seen do not read those that are not.
    assert torch.equal(one[:, ::2], two[:, ::2])


def test_the_speech_encoder_may_compute_in_integers_but_not_the_decoder() -> None:
    model = softened("whisper")
    words = torch.tensor([[3, 7, 9]])

    def run() -> Any:
        return model(input_features=random(1, 8, 32), decoder_input_ids=words)

    found = observe(model, [run])
    assert found
    assert all(name.startswith("model.encoder.") for name in found)


def test_words_alone_reach_no_encoder() -> None:
    model = softened("llava_siglip")
    words = torch.tensor([[3, 7, 9]])
    assert IMAGE not in words
    with pytest.raises(DataError, match="images"):
        measure(model, [lambda: model(input_ids=words)])


@pytest.mark.parametrize(
    ("name", "operator", "what"),
    [
        ("encoder.layers.9", Operator("gelu", "ibert8", 1.0), "no layer"),
        ("encoder.layers.0.mlp.fc1", Operator("gelu", "ibert8", 1.0), "Linear"),
        ("encoder.layers.0.layer_norm1", Operator("gelu", "ibert8", 1.0), "LayerNorm"),
        (
            "encoder.layers.0.layer_norm1",
            Operator("layer_norm", "fqvit8", 1.0, (0, 1), 1.0),
            "16 channels",
        ),
    ],
)
def test_operators_of_another_model_are_refused(name: str, operator: Operator, what: str) -> None:
    model = build("siglip_vision")
    prefix = next(n for n, _ in model.named_modules() if n.endswith("encoder")).rpartition(".")[0]
    with pytest.raises(ModelError, match=what):
        nonlinear.attach(model, {f"{prefix}.{name}".lstrip("."): operator})
