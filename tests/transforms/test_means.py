"""Means of inputs move into biases: the model computes the same, and what is rounded has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlib.errors import TransformError
from quantlib.transforms.apply import rotate_module
from quantlib.transforms.binding import wire
from quantlib.transforms.means import means_of
from quantlib.transforms.moments import Moments, moments_of
from quantlib.transforms.rotation import Rotation

from .families import inputs, logits, make, random_rotation

PARTS = ("norms", "residual", "value", "key", "hidden", "order")
BIASED = ("whisper", "whisper_untied", "llama_biased")
TOLERANCE = 1e-4
"""Relative to the largest logit, as of other changes (`test_apply.py`)."""
BLOCK = "model.layers.0"
OUTPUT, DOWN = f"{BLOCK}.self_attn.o_proj.weight", f"{BLOCK}.mlp.down_proj.weight"


def moments(model: PreTrainedModel, rotation: Rotation) -> Moments:
    """Of the model in the rotation's bases."""
    rotate_module(model, wire(model), rotation)
    return moments_of(model, wire(model), [inputs(model)])


def found_means(case: str) -> dict[str, Tensor]:
    found = moments(make(case), Rotation(fold_norms=True)).inputs
    return means_of({name: one.mean for name, one in found.items()}, wire(make(case)))


@pytest.mark.parametrize("parts", [("norms",), PARTS], ids=["folded", "rotated"])
@pytest.mark.parametrize("case", BIASED)
def test_the_model_computes_the_same(case: str, parts: tuple[str, ...]) -> None:
    model, means = make(case), found_means(case)
    assert means
    before = logits(model)
    rotate_module(model, wire(model), replace(random_rotation(model, *parts), means=means))
    assert float((logits(model) - before).abs().max() / before.abs().max()) <= TOLERANCE


@pytest.mark.parametrize("case", BIASED)
def test_what_linears_read_has_no_mean_left(case: str) -> None:
    wiring, means = wire(make(case)), found_means(case)
    model = make(case)
    before = moments(make(case), random_rotation(model, *PARTS)).inputs
    after = moments(model, replace(random_rotation(model, *PARTS), means=means)).inputs
    norms = [norm for stream in wiring.streams for norm in stream.norms if norm.name in means]
    # Heads of one KV head share a mean, so theirs vanishes where each has its own.
    heads = [a.output.weight for a in wiring.attentions if a.heads == a.kv_heads]
    readers = [norm.readers[0].weight for norm in norms]
    readers += [name for name in heads if name in means]
    readers += [hidden.down.weight for hidden in wiring.hiddens]
    for name in readers:
        assert after[name].mean.norm() < 1e-4 * before[name].mean.norm(), name


def test_whisper_s_means_are_of_every_input() -> None:
    """Norms with bias, values and hidden layers; llama's norms have none."""
    wiring = wire(make("whisper"))
    places = {norm.name for stream in wiring.streams for norm in stream.norms}
    places |= {attention.output.weight for attention in wiring.attentions}
    places |= {hidden.down.weight for hidden in wiring.hiddens}
    assert found_means("whisper").keys() == places
    assert found_means("llama") == {}
    biased = found_means("llama_biased")
    assert {OUTPUT, DOWN} <= biased.keys()
    assert not any("norm" in name for name in biased)


def test_what_a_checkpoint_keeps_is_enough_beside_rotated_weights() -> None:
    model = make("whisper")
    rotation = replace(random_rotation(model, *PARTS), means=found_means("whisper"))
    online = rotation.online(wire(model))
    assert online.means.keys() == {hidden.down.weight for hidden in wire(model).hiddens}
    for site in wire(model).hiddens:
        order = rotation.hidden_order[site.name]
        expected = rotation.means[site.down.weight][order]
        assert torch.equal(online.means[site.down.weight], expected)


def test_a_file_holds_them_and_files_without_are_as_before(tmp_path: Path) -> None:
    rotation = random_rotation(make("whisper"), *PARTS)
    assert rotation.to_tensors()[1]["version"] == 2
    with_means = replace(rotation, means=found_means("whisper"))
    with_means.save(tmp_path / "rotation.safetensors")
    again = Rotation.load(tmp_path / "rotation.safetensors")
    assert again.means.keys() == with_means.means.keys()
    assert all(torch.equal(again.means[name], mean) for name, mean in with_means.means.items())
    assert again.content_hash == with_means.content_hash != rotation.content_hash


@pytest.mark.parametrize(
    ("case", "rotation", "message"),
    [
        ("llama", {"means": {OUTPUT: torch.zeros(2, 8)}}, "v_proj.weight has no bias"),
        ("llama", {"means": {DOWN: torch.zeros(48)}}, "down_proj.weight has no bias"),
        (
            "llama",
            {"means": {f"{BLOCK}.input_layernorm": torch.zeros(32)}, "fold_norms": True},
            "the norm has no bias",
        ),
        ("llama_biased", {"means": {OUTPUT: torch.zeros(4, 8)}}, r"\[4, 8\], this model needs"),
        ("llama_biased", {"means": {DOWN: torch.full((48,), torch.nan)}}, "is not finite"),
        ("llama_biased", {"means": {"lm_head": torch.zeros(32)}}, "no such norm"),
        (
            "whisper",
            {"means": {"model.encoder.layers.0.final_layer_norm": torch.zeros(32)}},
            "its gain is not folded",
        ),
    ],
)
def test_means_that_do_not_belong_are_refused_in_a_sentence(
    case: str, rotation: dict[str, Any], message: str
) -> None:
    with pytest.raises(TransformError, match=message):
        Rotation(**rotation).check(wire(make(case)))


def test_hidden_layers_lose_theirs_before_they_are_turned() -> None:
    model = make("llama_biased")
    site = wire(model).hiddens[0]
    seen: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(given[0])

    rotation = Rotation(means={site.down.weight: torch.full((site.width,), 2.0).double()})
    plain = make("llama_biased")
    plain.get_submodule(site.module).register_forward_pre_hook(keep)
    logits(plain)
    rotate_module(model, wire(model), rotation)
    model.get_submodule(site.module).register_forward_pre_hook(keep)
    logits(model)
    torch.testing.assert_close(seen[1], seen[0] - 2.0)
