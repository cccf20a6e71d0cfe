"""A tiny network (a convolution, a fused pair of linears, a head) and a task that it can learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.models.rows import Weight
from quantlib.search.trained.layers import Space, WidthDecision, decisions
from quantlib.search.trained.loop import Outcome, Task
from quantlib.search.trained.numbers import Candidate

CLASSES = 4


class Net(nn.Module):
    """[n, 1, 6, 6] -> [n, CLASSES]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)  # the norm has one
        self.norm = nn.BatchNorm2d(8)
        self.gate = nn.Linear(72, 16)
        self.up = nn.Linear(72, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu().flatten(1)
        return self.head(self.gate(x).sigmoid() * self.up(x))


def net(seed: int = 0) -> Net:
    generator = torch.Generator().manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                bound = parameter[0].numel() ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            elif parameter.numel() != 8:
                parameter.zero_()
    return model


def weight(name: str, shape: tuple[int, ...], kind: str, group: str, block: str | None) -> Weight:
    return Weight(
        name=f"{name}.weight",
        module=name,
        shape=(shape[0], int(torch.tensor(shape[1:]).prod())),
        kind=kind,
        component="net",
        block=block,
        group=group,
        dtype="F32",
        nbytes=0,
        tensor_shape=shape if len(shape) > 2 else (),
    )


WEIGHTS = (
    weight("stem", (8, 1, 3, 3), "conv", "stem", None),
    weight("gate", (16, 72), "linear", "gate_up", "block"),
    weight("up", (16, 72), "linear", "gate_up", "block"),
    weight("head", (CLASSES, 16), "linear", "head", "block"),
)
PRODUCTS = {"stem.weight": 648.0, "gate.weight": 1152.0, "up.weight": 1152.0, "head.weight": 64.0}
"""Multiplications of one picture."""


def space(*names: str, shared: str = "group", widths: Sequence[float] = ()) -> Space:
    """Over all of the network; widths: shares of the hidden channels to choose from."""
    numbers = decisions(WEIGHTS, [Candidate.parse(name) for name in names], shared)
    if not widths:
        return Space(numbers)
    wide = WidthDecision("hidden", ("gate.weight", "up.weight"), ("head.weight",), tuple(widths))
    return Space(numbers, (wide,))


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise with a bright quarter, which is its label."""
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    x = 0.7 * torch.randn(count, 1, 6, 6, generator=generator)
    for index, label in enumerate(labels.tolist()):
        row, column = divmod(label, 2)
        x[index, 0, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3] += 1
    return x, labels


def quarters(batch: int = 32) -> Task:
    """Name the bright quarter."""

    def task(model: nn.Module, _: int, generator: torch.Generator) -> Outcome:
        x, labels = pictures(batch, generator)
        logits = model(x)
        right = (logits.detach().argmax(1) == labels).float().mean()
        return Outcome(F.cross_entropy(logits, labels), float(right))

    return task


@torch.no_grad()
def accuracy(model: nn.Module, count: int = 400) -> float:
    model.eval()
    x, labels = pictures(count, torch.Generator().manual_seed(99))
    return float((model(x).argmax(1) == labels).float().mean())
