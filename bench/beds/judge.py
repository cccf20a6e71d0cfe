"""The judge of coloured-digit scenes: a small network that reads digits, and rules for colours.

It is trained on handwriting that no model saw, in any colour on any background, blurred and noisy
too, because what it is to read is drawn by models. `evaluation.judge` has the format of the file,
and the rules.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.bench.beds.scenes import (
    BACKGROUNDS,
    COLORS,
    DIGITS,
    SIDE,
    Handwriting,
    Scenes,
    varied,
)
from quantlib.bench.beds.training import Schedule, Stage, initialise
from quantlib.evaluation.judge import Judge, save_judge

SCHEDULE = Schedule(steps=1500, rate=3e-3, warmup=50)
BATCH = 64
WIDTHS = (32, 64, 128)


class Reader(nn.Module):
    """Pictures in -1..1 [n, 3, SIDE, SIDE] -> logits of `DIGITS` [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *WIDTHS)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=1 if before == 3 else 2, padding=1)
            for before, after in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in WIDTHS)
        self.features = nn.Linear(WIDTHS[-1] * (SIDE // 4) ** 2, 128)
        self.digit = nn.Linear(128, len(DIGITS))

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
        logits: Tensor = self.digit(F.relu(self.features(x.flatten(1))))
        return logits


def train_judge(
    source: Handwriting, training: Path, file: Path, seed: int, schedule: Schedule = SCHEDULE
) -> Judge:
    """Train on the judge's fold (or go on), and write the judge to `file`, in float16."""
    reader = Reader()
    initialise(reader, torch.Generator().manual_seed(seed))

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        which = torch.randint(len(source.labels), (BATCH,), generator=generator)
        pixels = _drawn_somehow(varied(source.masks[which], generator), generator)
        logits = reader(pixels * 2 - 1).float()
        return {"digit": F.cross_entropy(logits, source.labels[which], label_smoothing=0.05)}

    Stage(training / "judge.safetensors", reader, schedule, seed).run(loss)
    stored = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in reader.state_dict().items()
    }
    return save_judge(file, stored, judge_spec())


def _drawn_somehow(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Masks [n, SIDE, SIDE] in colours of contrast, half of them blurred, with noise: 0..1."""
    count = len(masks)
    back = torch.rand(count, 3, generator=generator) * 0.5
    front = torch.rand(count, 3, generator=generator)
    # At least one channel of contrast 0.4: what cannot be seen cannot be learnt.
    strong = torch.randint(3, (count, 1), generator=generator)
    front.scatter_(1, strong, back.gather(1, strong) + 0.4)
    blurred = F.avg_pool2d(F.pad(masks[:, None], (1, 1, 1, 1)), 3, stride=1)[:, 0]
    share = torch.rand(count, generator=generator).mul(2).sub(1).clamp(0, 0.8)[:, None, None]
    shapes = (masks + share * (blurred - masks))[:, None]
    pixels = back[..., None, None] + shapes * (front - back)[..., None, None]
    noise = torch.randn(pixels.shape, generator=generator)
    level = torch.rand(count, generator=generator)[:, None, None, None] * 0.08
    return (pixels + noise * level).clamp(0, 1)


def judge_spec() -> dict[str, Any]:
    """`Reader` and the rules of colours in the words of `evaluation.judge`."""
    layers: list[dict[str, Any]] = []
    for index in range(len(WIDTHS)):
        stride = 2 if index else 1
        layers += [
            {"kind": "conv", "name": f"convs.{index}", "stride": stride, "padding": 1},
            {"kind": "batch_norm", "name": f"norms.{index}"},
            {"kind": "relu"},
        ]
    layers += [{"kind": "linear", "name": "features"}, {"kind": "relu"}]
    return {
        "size": [SIDE, SIDE],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "layers": layers,
        "heads": {"digit": {"name": "digit", "classes": list(DIGITS)}},
        "rules": {
            "color": {"of": "foreground", "palette": {k: list(v) for k, v in COLORS.items()}},
            "background": {
                "of": "background",
                "palette": {k: list(v) for k, v in BACKGROUNDS.items()},
                "after": "on",
            },
        },
    }


def read_right(judge: Judge, pixels: Tensor, scenes: Scenes) -> dict[str, float]:
    """Shares of pictures [n, 3, SIDE, SIDE] in 0..1 in which the judge sees what `scenes` show."""
    answers = judge.look(pixels).answers
    shown = {
        "digit": [DIGITS[index] for index in scenes.digit],
        "color": [list(COLORS)[index] for index in scenes.color],
        "background": [list(BACKGROUNDS)[index] for index in scenes.background],
    }
    return {
        question: sum(map(str.__eq__, answers[question], right)) / len(right)
        for question, right in shown.items()
    }
