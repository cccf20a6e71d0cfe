"""How a convolution reads its input, and what it computes: as a product of rows, or densely.

A convolution with filters [N, channels, *window] multiplies the matrix [N, channels * prod(window)]
with every piece of its padded input that the window covers. So it is calibrated and packed like a
linear, whose tokens are those pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.errors import ModelError

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_DENSE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Window:
    """What a convolution is beside its filters.

    channels: of the input. size, stride, dilation: of the window, per axis.
    padding:  before and after each axis, the last axis first, as `F.pad` takes it; mode: of it.
    """

    channels: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str

    @staticmethod
    def of(name: str, module: nn.Module) -> Window:
        """Of the module `name`. Raises ModelError for what is no plain convolution."""
        if not isinstance(module, Convolution) or module.groups != 1:
            raise ModelError(
                f"{name} is not a convolution of all channels with all filters, so it is no "
                "matrix product; its family must keep it"
            )
        return Window(
            module.in_channels,
            module.kernel_size,
            module.stride,
            module.dilation,
            # what the module itself pads with, "same" and "reflect" included
            tuple(module._reversed_padding_repeated_twice),
            "constant" if module.padding_mode == "zeros" else module.padding_mode,
        )

    @property
    def columns(self) -> int:
        """K: numbers that the window covers."""
        columns = self.channels
        for size in self.size:
            columns *= size
        return columns

    def batched(self, x: Tensor) -> Tensor:
        """x with a batch axis: [batch, channels, *size]."""
        return x if x.dim() == len(self.size) + 2 else x[None]

    def places(self, x: Tensor) -> tuple[int, ...]:
        """Sizes of the output of x [batch, channels, *size], per axis."""
        axes = len(self.size)
        found = []
        for axis in range(axes):
            around = self.padding[2 * (axes - 1 - axis)] + self.padding[2 * (axes - 1 - axis) + 1]
            reach = self.dilation[axis] * (self.size[axis] - 1) + 1
            found.append((x.shape[2 + axis] + around - reach) // self.stride[axis] + 1)
        return tuple(found)

    def rows(self, x: Tensor) -> Tensor:
        """x [batch, channels, *size] as [batch * places, K], in the order of a flattened filter."""
        axes = len(self.size)
        pieces = F.pad(x, self.padding, mode=self.mode) if any(self.padding) else x
        for axis in range(axes):
            step, dilation = self.stride[axis], self.dilation[axis]
            reach = dilation * (self.size[axis] - 1) + 1
            pieces = pieces.unfold(2 + axis, reach, step)[..., ::dilation]
        # [batch, channels, *places, *window] -> [batch, *places, channels, *window]
        return pieces.movedim(1, 1 + axes).reshape(-1, self.columns)

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        """The convolution of x [batch, channels, *size] with filters [N, channels / groups,
        *window]: [batch, N, *places]."""
        padded = F.pad(x, self.padding, mode=self.mode) if any(self.padding) else x
        convolve = _DENSE[len(self.size)]
        found: Tensor = convolve(padded, weight, bias, self.stride, 0, self.dilation, groups)
        return found


def from_rows(rows: Tensor, batch: int, places: tuple[int, ...]) -> Tensor:
    """Products [batch * places, N] as a convolution's output [batch, N, *places]."""
    return rows.reshape(batch, *places, rows.shape[-1]).movedim(-1, 1)


def to_rows(y: Tensor) -> Tensor:
    """Inverse of `from_rows`, of [batch, N, *places]."""
    return torch.movedim(y, 1, -1).reshape(-1, y.shape[1])
