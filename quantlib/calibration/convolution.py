"""A convolution as a matrix product: every place of the window is a token.

It has a second moment and output gradients like a linear. The pieces that the window covers
overlap: they are made when they are summed, one convolution at a time, and never kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from quantlib.models.window import Window, to_rows


@dataclass(frozen=True)
class ConvRows:
    """`observe.Rows` of one convolution, with or without a batch axis."""

    window: Window

    @staticmethod
    def of(name: str, module: nn.Module) -> ConvRows:
        """Raises ModelError for what is no plain convolution."""
        return ConvRows(Window.of(name, module))

    def inputs(self, x: Tensor) -> Tensor:
        """x [batch, channels, *size] as [batch * places, channels * prod(window)], in the order of
        the flattened filter."""
        return self.window.rows(self.window.batched(x))

    def outputs(self, y: Tensor) -> Tensor:
        """y [batch, N, *places] as [batch * places, N]."""
        return to_rows(self.window.batched(y))
