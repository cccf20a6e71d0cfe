"""A convolution as a matrix product: every place of the window is a token.

A convolution with filters [N, channels, *window] multiplies the matrix [N, channels * prod(window)]
with every piece of its padded input that the window covers, so it has a second moment and output
gradients like a linear. The pieces overlap: they are made when they are summed, one convolution at
a time, and never kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.errors import ModelError

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class ConvRows:
    """`observe.Rows` of one convolution, with or without a batch axis."""

    module: Convolution

    @staticmethod
    def of(name: str, module: nn.Module) -> ConvRows:
        """Raises ModelError for what is no plain convolution."""
        if not isinstance(module, Convolution) or module.groups != 1:
            raise ModelError(
                f"{name} is not a convolution of all channels with all filters, so it is no "
                "matrix product; its family must keep it"
            )
        return ConvRows(module)

    def inputs(self, x: Tensor) -> Tensor:
        """x [batch, channels, *size] as [batch * places, channels * prod(window)], in the order of
        the flattened filter."""
        module = self.module
        axes = len(module.kernel_size)
        x = x if x.dim() == axes + 2 else x[None]
        # what the module itself pads with, "same" and "reflect" included
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        pieces = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        for axis in range(axes):
            step, dilation = module.stride[axis], module.dilation[axis]
            reach = dilation * (module.kernel_size[axis] - 1) + 1
            pieces = pieces.unfold(2 + axis, reach, step)[..., ::dilation]
        # [batch, channels, *places, *window] -> [batch, *places, channels, *window]
        pieces = pieces.movedim(1, 1 + axes)
        columns = module.in_channels
        for size in module.kernel_size:
            columns *= size
        return pieces.reshape(-1, columns)

    def outputs(self, y: Tensor) -> Tensor:
        """y [batch, N, *places] as [batch * places, N]."""
        y = y if y.dim() == len(self.module.kernel_size) + 2 else y[None]
        return y.movedim(1, -1).reshape(-1, self.module.out_channels)
