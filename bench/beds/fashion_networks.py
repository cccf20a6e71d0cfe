"""Two small classifiers of Fashion-MNIST that train in minutes: a ResNet and a vision transformer.

They are what searches that train are judged on (`bench.trained_search`). Both are transformers
classes, so that what comes out is a checkpoint like any other. Pictures keep their one channel and
28 pixels a side; training shifts them by up to two pixels and mirrors them, as clothes look the
same either way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.bench.beds.fashion import KINDS, fetch_fashion, read_fashion
from quantlib.bench.beds.training import initialise
from quantlib.errors import DataError
from quantlib.pipeline.narrowed import SETTING, stage_widths
from quantlib.pipeline.trained import Trainable
from quantlib.search.trained.layers import WidthDecision
from quantlib.search.trained.loop import Outcome, Task

SIDE = 28
MEAN, DEVIATION = 0.286, 0.353
"""Of a pixel, in 0..1."""
SHIFT = 2
BATCH = 128
RESNET_STAGES, RESNET_LAYERS = 3, 2
_LABELS = dict(enumerate(KINDS))


@dataclass(frozen=True)
class Pictures:
    """Normalised pictures float32 [n, 1, SIDE, SIDE] and their labels int64 [n]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Pictures:
        """The first ones."""
        return Pictures(self.pixels[:count], self.labels[:count])


def normalised(images: Tensor) -> Tensor:
    """uint8 [n, SIDE, SIDE] as the networks read them."""
    return ((images.to(torch.float32) / 255 - MEAN) / DEVIATION)[:, None]


def pictures(split: str, cache: Path | None = None) -> Pictures:
    """The training set, the last 5,000 of it ("held_out"; "train" is without them), or the test
    set."""
    images, labels = read_fashion(fetch_fashion(cache), "t10k" if split == "test" else "train")
    parts = {"train": slice(0, -5000), "held_out": slice(-5000, None), "test": slice(None)}
    if split not in parts:
        raise DataError(f"Fashion-MNIST has no {split!r}: use train, held_out or test")
    chosen = parts[split]
    return Pictures(normalised(images[chosen]), labels[chosen])


def resnet() -> Any:
    """A ResNetForImageClassification with three stages of two basic layers: 11,000 parameters,
    140,000 multiplications. So narrow that 4 bits everywhere cost accuracy."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4, 8, 16],
        depths=[RESNET_LAYERS] * RESNET_STAGES,
        layer_type="basic",
        id2label=_LABELS,
        label2id={name: index for index, name in _LABELS.items()},
    )
    return ResNetForImageClassification(config)


def vit() -> Any:
    """A ViTForImageClassification of three blocks on patches of 7 pixels: 8,000 parameters,
    117,000 multiplications. As narrow as the ResNet, for the same reason."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=SIDE,
        patch_size=7,
        num_channels=1,
        id2label=_LABELS,
        label2id={name: index for index, name in _LABELS.items()},
    )
    return ViTForImageClassification(config)


def mlp_widths(trainable: Trainable, shares: Sequence[float]) -> tuple[WidthDecision, ...]:
    """The decision over the hidden channels of all MLPs of the vision transformer."""
    blocks = [
        f"vit.layers.{index}.mlp" for index in range(trainable.model.config.num_hidden_layers)
    ]
    writers, readers = (tuple(f"{b}.{name}.weight" for b in blocks) for name in ("fc1", "fc2"))
    return (WidthDecision("hidden", writers, readers, tuple(shares), (SETTING,)),)


@dataclass(frozen=True)
class Network:
    """One of the two. rate: of AdamW. widths: of an opened one and shares of channels to choose
    from, the decisions over what its config has a width for."""

    name: str
    build: Callable[[], Any]
    rate: float
    widths: Callable[[Trainable, Sequence[float]], tuple[WidthDecision, ...]]

    @property
    def digest(self) -> str:
        """sha256 of its config."""
        return hashlib.sha256(self.build().config.to_json_string().encode()).hexdigest()

    def drawn(self, seed: int) -> Any:
        """The untrained network with weights of this seed."""
        generator = torch.Generator().manual_seed(seed)
        model = self.build()
        initialise(model, generator)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 3:  # class token and positions
                    parameter.normal_(0, 0.02, generator=generator)
        return model


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet", resnet, 5e-3, stage_widths),
        Network("vit", vit, 3e-3, mlp_widths),
    )
}


def varied(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures shifted and mirrored at random, each by itself."""
    count = len(pixels)
    mirrored = torch.rand(count, generator=generator) < 0.5
    pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
    blank = (0.0 - MEAN) / DEVIATION
    wide = F.pad(pixels, (SHIFT,) * 4, value=blank)
    by = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = by + torch.arange(SIDE)
    index = torch.arange(count).view(-1, 1, 1)
    return wide[index, 0, rows[:, :, None], columns[:, None, :]][:, None]


def classification(data: Pictures, batch: int = BATCH) -> Task:
    """Cross-entropy of random batches; their share of right answers is the quality."""

    def task(model: nn.Module, _: int, generator: torch.Generator) -> Outcome:
        picked = torch.randint(0, len(data), (batch,), generator=generator)
        labels = data.labels[picked]
        logits = model(pixel_values=varied(data.pixels[picked], generator)).logits.float()
        right = (logits.detach().argmax(1) == labels).float().mean()
        return Outcome(F.cross_entropy(logits, labels), float(right))

    return task


def likeness(teacher: Any, data: Pictures, batch: int = BATCH) -> Task:
    """KL(teacher || model) of random batches, in nats; its negative is the quality.

    A difference of losses by labels has a part that is linear in what rounding changes: a network
    that is still learning has gradients. The divergence from the network itself has none.
    """

    def task(model: nn.Module, _: int, generator: torch.Generator) -> Outcome:
        picked = torch.randint(0, len(data), (batch,), generator=generator)
        pixels = varied(data.pixels[picked], generator)
        with torch.no_grad():
            wanted = teacher(pixel_values=pixels).logits
        return Outcome.of_divergence(wanted, model(pixel_values=pixels).logits)

    return task


@torch.no_grad()
def answers(model: nn.Module, data: Pictures, batch: int = 500) -> Tensor:
    """bool [n]: which pictures the model names right."""
    model.eval()
    right = [
        model(pixel_values=pixels).logits.argmax(1) == labels
        for pixels, labels in zip(data.pixels.split(batch), data.labels.split(batch), strict=True)
    ]
    return torch.cat(right)
