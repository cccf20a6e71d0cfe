"""A ResNet at the widths that a search chose: the checkpoint computes what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.checkpoint.writer import PLAN_FILE
from quantlib.errors import SearchError, UsageError
from quantlib.models.source import Source
from quantlib.pipeline.narrowed import Chosen, narrowed, stage_widths, write_choice
from quantlib.pipeline.trained import Trainable
from quantlib.runtime.load import load
from quantlib.search.plan import Plan
from quantlib.search.trained.costs import bops
from quantlib.search.trained.layers import Choice, Layers, Space, WidthDecision, decisions
from quantlib.search.trained.numbers import space_of

SIZES = (4, 8, 16)
BLOCK = "resnet.encoder.stages.{}.layers.{}"


def drawn(folder: Path, **changed: Any) -> Path:
    """A ResNet of three stages with weights, means and variances by lot."""
    from transformers import ResNetConfig, ResNetForImageClassification

    settings = {"embedding_size": SIZES[0], "hidden_sizes": list(SIZES), "layer_type": "basic"}
    config = ResNetConfig(num_channels=1, depths=[2, 1, 2], **{**settings, **changed})
    model = ResNetForImageClassification(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(0.0, 0.3, generator=generator)
            if name.endswith(("running_var", "normalization.weight")):
                tensor.abs_().add_(0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("resnet") / "model")


def opened(folder: Path, widths: tuple[float, ...] = (0.5, 0.75, 1.0)) -> tuple[Trainable, Layers]:
    trainable = Trainable.open(folder)
    numbers = decisions(trainable.model_map.weights, space_of("w4a4,w8a8"))
    space = Space(numbers, stage_widths(trainable, widths))
    return trainable, Layers(trainable.model.eval(), space)


def picked(layers: Layers, *widths: int) -> Choice:
    """Formats in turn, and these widths."""
    return (*(index % 2 for index in range(len(layers.space.numbers))), *widths)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def logits(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(pixel_values=pixels).logits
    return found


def test_stages_are_what_a_config_has_widths_for(resnet: Path) -> None:
    trainable, _ = opened(resnet)
    first, second, third = stage_widths(trainable, (0.5, 0.6, 1.0))
    assert (first.name, first.settings) == ("stage 0", ("embedding_size", "hidden_sizes.0"))
    assert "resnet.embedder.embedder.convolution.weight" in first.writers
    assert first.options == (0.5, 1.0), "0.6 of four channels are two"
    assert third.options == (0.5, 10 / 16, 1.0)
    shortcut = f"{BLOCK.format(1, 0)}.shortcut.convolution.weight"
    assert shortcut in first.readers
    assert shortcut in second.writers
    assert third.readers[-1] == "classifier.1.weight"
    written = [name for width in (first, second, third) for name in width.writers]
    read = [name for width in (first, second, third) for name in width.readers]
    everything = {weight.name for weight in trainable.model_map.weights}
    assert sorted(written) == sorted(everything - {"classifier.1.weight"})
    assert sorted(read) == sorted(everything - {"resnet.embedder.embedder.convolution.weight"})


@pytest.mark.parametrize("widths", [(0, 0, 0), (1, 0, 2), (2, 1, 0)])
def test_a_narrowed_resnet_computes_what_was_trained(
    resnet: Path, pixels: torch.Tensor, tmp_path: Path, widths: tuple[int, int, int]
) -> None:
    trainable, layers = opened(resnet)
    layers.choose(None)
    whole = logits(trainable.model, pixels)
    layers.choose(picked(layers, *widths))
    expected = logits(trainable.model, pixels)
    narrow, _ = narrowed(trainable, layers, picked(layers, *widths), tmp_path / "narrow")
    sizes = [round(size * (0.5, 0.75, 1.0)[index]) for size, index in zip(SIZES, widths)]
    assert narrow.model.config.hidden_sizes == sizes
    assert narrow.model.config.embedding_size == sizes[0]
    assert not torch.allclose(expected, whole, rtol=1e-2)
    # sums over fewer channels in another order: float32
    torch.testing.assert_close(logits(narrow.model, pixels), expected, rtol=1e-4, atol=1e-4)


def test_chosen_widths_are_a_plan_and_a_checkpoint_like_any_other(
    resnet: Path, pixels: torch.Tensor, tmp_path: Path
) -> None:
    """Written, loaded and run by the kernels, which answer as the model that was trained."""
    trainable, layers = opened(resnet)
    products = layers.count_products(lambda: logits(trainable.model, pixels[:1]))
    costs, choice = bops(layers.space, products), picked(layers, 1, 0, 1)
    layers.choose(choice)
    expected = logits(trainable.model, pixels)
    ended = Chosen("fliqs", costs, choice, costs.most / 2)
    out, plan = write_choice(tmp_path / "out", trainable, layers, ended)
    assert Plan.load(out / PLAN_FILE).schemes == plan.schemes
    assert set(plan.schemes.values()) == {"w4a4", "w8a8"}
    assert plan.predicted["bops"] == pytest.approx(costs.of(choice))
    config = json.loads((out / "config.json").read_text())
    assert (config["embedding_size"], config["hidden_sizes"]) == (3, [3, 4, 12])
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert 0.85 * plan.bytes < size <= plan.bytes  # mostly headers, counted with longest offsets
    whole, _ = write_choice(
        tmp_path / "whole", trainable, layers, Chosen("fliqs", costs, picked(layers, 2, 2, 2))
    )
    assert size < sum(file.stat().st_size for file in whole.glob("*.safetensors"))
    # an input on the border of two codes may round the other way: a step of 4 bits in few of them
    found = logits(load(out).model, pixels)
    assert float((found - expected).norm()) <= 0.02 * float(expected.norm())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_bit_operations_of_a_width_are_those_of_the_narrow_model(
    resnet: Path, pixels: torch.Tensor, tmp_path: Path
) -> None:
    trainable, layers = opened(resnet)
    products = layers.count_products(lambda: logits(trainable.model, pixels[:1]))
    choice = picked(layers, 0, 1, 0)
    priced = bops(layers.space, products).of(choice)
    narrow, cut = narrowed(trainable, layers, choice, tmp_path / "narrow")
    cut.choose(None)
    counted = bops(cut.space, cut.count_products(lambda: logits(narrow.model, pixels[:1])))
    assert priced == pytest.approx(counted.of(choice[: len(cut.space.numbers)]), rel=1e-12)


def test_a_stage_behind_a_shortcut_without_stride_keeps_its_channels(tmp_path: Path) -> None:
    """As wide as the stem it would have no shortcut."""
    _, layers = opened(drawn(tmp_path / "model", embedding_size=6))
    assert [width.name for width in layers.space.widths] == ["stage 1", "stage 2"]
    downsampled = drawn(tmp_path / "strided", embedding_size=6, downsample_in_first_stage=True)
    _, layers = opened(downsampled)
    assert [w.name for w in layers.space.widths] == ["stem", "stage 0", "stage 1", "stage 2"]


def test_widths_that_lose_a_shortcut_have_no_checkpoint(tmp_path: Path) -> None:
    """A space made by hand: the first stage becomes as wide as the stem."""
    trainable, whole = opened(drawn(tmp_path / "model", embedding_size=2))
    stage = [f"{BLOCK.format(0, layer)}.layer.{place}" for layer in (0, 1) for place in (0, 1)]
    shortcuts = [f"{BLOCK.format(index, 0)}.shortcut" for index in (0, 1)]
    writers = [*stage, shortcuts[0]]
    readers = [*stage[1:], shortcuts[1], f"{BLOCK.format(1, 0)}.layer.0"]
    width = WidthDecision(
        "stage 0",
        tuple(f"{name}.convolution.weight" for name in writers),
        tuple(f"{name}.convolution.weight" for name in readers),
        (0.5, 1.0),
        ("hidden_sizes.0",),
    )
    layers = Layers(trainable.model, Space(whole.space.numbers, (width,)))
    with pytest.raises(SearchError, match="in only one of"):
        narrowed(trainable, layers, picked(layers, 0), tmp_path / "narrow")


@pytest.mark.parametrize(
    ("settings", "says"),
    [((), "no field for that"), (("hidden_sizes.2",), "and the config of the chosen widths")],
)
def test_a_width_that_the_config_cannot_say_is_refused(
    resnet: Path, tmp_path: Path, settings: tuple[str, ...], says: str
) -> None:
    trainable, whole = opened(resnet)
    writer, reader = (f"{BLOCK.format(1, 0)}.layer.{place}.convolution.weight" for place in (0, 1))
    width = WidthDecision("inside", (writer,), (reader,), (0.5, 1.0), settings)
    layers = Layers(trainable.model, Space(whole.space.numbers, (width,)))
    with pytest.raises(SearchError, match=says):
        narrowed(trainable, layers, picked(layers, 0), tmp_path / "narrow")
    assert not list(tmp_path.iterdir())


def test_other_models_have_no_stages(resnet: Path, tmp_path: Path) -> None:
    trainable, _ = opened(resnet)
    trainable.model.config.layer_type = "bottleneck"
    with pytest.raises(UsageError, match="no stages of basic layers"):
        stage_widths(trainable, (0.5, 1.0))
    with pytest.raises(SearchError, match="shares of the channels"):
        opened(resnet, (0.0, 1.5))
    assert Source.open(resnet).config["layer_type"] == "basic"
