"""A convolution on a packed weight [N, K], K the channels and the window they are read by.

Two ways to compute it, and each needs memory that the other does not: the product of the unfolded
input [places, K] with the packed weight, or torch's convolution with the dense weight [N, K]. What
is smaller is made. Of an early convolution, with many places and few filters, that is the dense
weight, which then stays; of a late one the unfolded input, which is gone after the call.

Where a scheme rounds inputs, those of a convolution are rounded before they are unfolded, with one
scale for each sample: places overlap in what the window reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.errors import ModelError
from quantlib.formats.activation import ActivationSegment, fake_quantize
from quantlib.models.window import Window, from_rows
from quantlib.runtime.packed_module import SCHEME, Activations, PackedModule, Segments, multiply


class PackedConvolution(PackedModule):
    """Base of convolutions on packed weights: what models ask of `nn.Conv1d` and its kin.

    dtype: of the dense filters that `weight` makes; it follows the model's casts.
    """

    bias: nn.Parameter | None
    groups = 1

    def __init__(
        self, filters: int, window: Window, bias: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.filters, self.window, self.dtype = filters, window, dtype
        # under torch's names, for models that ask
        self.in_channels, self.out_channels = window.channels, filters
        self.kernel_size, self.stride, self.dilation = window.size, window.stride, window.dilation
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The dense filters [N, channels, *window], for code that asks for their dtype or shape;
        made anew."""
        shape = (self.filters, self.window.channels, *self.window.size)
        return self.dequantize("weight").to(self.dtype).view(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class QuantizedConvolution(PackedConvolution):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` on a packed weight, in the dtype of its input."""

    def __init__(
        self,
        filters: int,
        window: Window,
        segments: Segments,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(filters, window, bias, dtype)
        self._dense: Tensor | None = None
        self.register_packed("weight", (filters, window.columns), segments, device)

    @property
    def weight(self) -> Tensor:
        """As of `PackedConvolution`; the filters that are kept, where they are."""
        return super().weight if self._dense is None else self._dense

    def set_inputs(
        self, name: str, activations: Activations = (), order: Tensor | None = None
    ) -> None:
        """As `PackedModule.set_inputs`. Raises ModelError for inputs in parts or another order."""
        plain = [part.format.symmetric and not part.format.group for part in activations]
        if order is not None or len(plain) > 1 or not all(plain):
            raise ModelError(
                "the window of a convolution reads a channel at many places: its inputs keep their "
                "order and are rounded with one scale, in a symmetric format such as a8"
            )
        super().set_inputs(name, activations, order)

    def forward(self, x: Tensor) -> Tensor:
        window = self.window
        batched = window.batched(x)
        entered = self._rounded(batched)
        places = window.places(entered)
        count = len(entered)
        for size in places:
            count *= size
        if self.filters <= count:
            if self._dense is None:
                self._dense = self.weight
            bias = None if self.bias is None else self.bias.to(x.dtype)
            y = window.dense(entered, self._dense.to(x.dtype), bias)
        else:
            y = from_rows(self._product(window.rows(entered)), len(entered), places)
        return y if batched is x else y[0]

    def _product(self, rows: Tensor) -> Tensor:
        """Pieces of the input [places, K] times the transposed weight, plus the bias."""
        return multiply(rows, self.handles("weight")[0], self.bias, "exact", "")

    def _rounded(self, x: Tensor) -> Tensor:
        """x [batch, channels, *size] as the scheme says, a scale for each sample."""
        activations = self.activations("weight")
        if not activations or self.mode != SCHEME:
            return x
        samples = x.flatten(1)
        whole = ActivationSegment(0, samples.shape[1], activations[0].format)
        return fake_quantize(samples, (whole,)).view(x.shape).to(x.dtype)

    def exchange_packed(self, name: str, segments: Segments, tensors: Mapping[str, Tensor]) -> None:
        """As `PackedModule.exchange_packed`; the dense filters are those of the weight before."""
        self._dense = None
        super().exchange_packed(name, segments, tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        self._dense = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_dense": None}
