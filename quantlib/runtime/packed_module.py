"""`PackedModule`: packed weights as buffers of a module, and the kernel handles over them.

The buffers carry the checkpoint's names, dtypes and shapes, so the state dict *is* the file and
resident memory is the file's size; the kernels read them as they are.

Packed buffers are bits, not numbers: casting a model (`model.to(torch.bfloat16)`) must not touch
them, so `_apply`, through which torch makes every cast and move, keeps their dtype and lets only
their device change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quantlib.formats.packing import pack_zeros, unpack_zeros
from quantlib.formats.scheme import TENSOR, Segment
from quantlib.formats.weight import (
    PACKED,
    ROW_SCALE,
    SCALE,
    ZERO_POINT,
    TensorLayout,
    dequantize,
    packed_layout,
    unpack,
)
from quantlib.kernels.ops import PackedWeight

Segments = tuple[Segment, ...]


class PackedModule(nn.Module):
    """Base of all modules that hold packed weights.

    A weight of shape `[N, K]` registered as "weight" becomes the buffers `weight_packed`,
    `weight_scale`, ... A stack of expert matrices `[E, N, K]` is, as everywhere in quantlib, one
    packed matrix `[E*N, K]`.
    """

    def __init__(self, mode: str = "exact") -> None:
        super().__init__()
        self.mode = mode
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._segments: dict[str, Segments] = {}
        self._handles: dict[str, tuple[dict[str, Tensor], list[PackedWeight]]] = {}

    def register_packed(
        self,
        name: str,
        shape: tuple[int, ...],
        segments: Segments,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the packed weight `name`, `[N, K]` or `[E, N, K]`, with uninitialized buffers."""
        self._shapes[name], self._segments[name] = tuple(shape), segments
        for suffix, (dtype, size) in self.layout(name).items():
            self.register_buffer(name + suffix, torch.empty(size, dtype=dtype, device=device))

    def exchange_packed(self, name: str, segments: Segments, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` (by suffix) in the place of the packed weight `name`, maybe in new formats.

        They are taken without a copy.
        """
        for suffix in self.layout(name):
            del self._buffers[name + suffix]
        self._segments[name] = segments
        for suffix in self.layout(name):
            self.register_buffer(name + suffix, tensors[suffix])
        self._handles.pop(name, None)

    def packed_weights(self) -> dict[str, tuple[tuple[int, ...], Segments]]:
        """Name -> shape and segments of every packed weight."""
        return {name: (shape, self._segments[name]) for name, shape in self._shapes.items()}

    def layout(self, name: str) -> TensorLayout:
        """Suffix -> dtype and shape of the buffers of the packed weight `name`."""
        *stack, columns = self._shapes[name]
        return packed_layout((math.prod(stack), columns), self._segments[name])

    def packed_names(self) -> list[str]:
        """Names of all packed buffers of this module."""
        return [name + suffix for name in self._shapes for suffix in self.layout(name)]

    def packed_tensors(self, name: str) -> dict[str, Tensor]:
        """The buffers of the packed weight `name`, by suffix."""
        return {suffix: self.get_buffer(name + suffix) for suffix in self.layout(name)}

    def packed_bytes(self) -> int:
        """Bytes of the packed buffers."""
        return sum(self.get_buffer(name).nbytes for name in self.packed_names())

    def handles(self, name: str) -> list[PackedWeight]:
        """Kernel handles of the packed weight `name`: one, or one per matrix of a stack.

        They are made at the first call, and again when a buffer was replaced (a load, a move).
        """
        cached = self._handles.get(name)
        if cached is None or any(
            self._buffers[key] is not tensor for key, tensor in cached[0].items()
        ):
            cached = self._handles[name] = self._make_handles(name)
        return cached[1]

    def _make_handles(self, name: str) -> tuple[dict[str, Tensor], list[PackedWeight]]:
        tensors, segments = self.packed_tensors(name), self._segments[name]
        *stack, rows, columns = self._shapes[name]
        parts = [tensors]
        if stack:
            parts = [row_block(tensors, segments, i * rows, rows) for i in range(stack[0])]
        handles = [PackedWeight.from_tensors(part, (rows, columns), segments) for part in parts]
        return {name + suffix: tensor for suffix, tensor in tensors.items()}, handles

    def dequantize(self, name: str = "weight", dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight `name`, `[N, K]` or `[E, N, K]`, made anew; it is not kept."""
        *stack, columns = self._shapes[name]
        packed = unpack(
            self.packed_tensors(name), (math.prod(stack), columns), self._segments[name]
        )
        return dequantize(packed, dtype).view(self._shapes[name])

    def extra_repr(self) -> str:
        parts = []
        for name, shape in self._shapes.items():
            formats = "+".join(str(segment.format) for segment in self._segments[name])
            parts.append(f"{name}={list(shape)} {formats}")
        return ", ".join([*parts, f"mode={self.mode}", f"bytes={self.packed_bytes()}"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        packed = {name: self.get_buffer(name) for name in self.packed_names()}
        for name in packed:
            del self._buffers[name]
        super()._apply(fn, recurse)
        for name, buffer in packed.items():
            probe = fn(buffer.new_empty(0))
            self.register_buffer(
                name, fn(buffer) if probe.dtype == buffer.dtype else buffer.to(probe.device)
            )
        self._handles.clear()
        return self


def row_block(
    tensors: Mapping[str, Tensor], segments: Segments, first: int, count: int
) -> dict[str, Tensor]:
    """The packed tensors of rows `first .. first + count - 1` of a packed matrix, by suffix.

    Views, but for zero points that do not begin at a word (count * zero_bits is no multiple of 32):
    those are packed anew.
    """
    block = {}
    for index, segment in enumerate(segments):
        tail, format = (f"_{index}" if index else ""), segment.format
        block[PACKED + tail] = tensors[PACKED + tail][first : first + count]
        whole = format.group_size == TENSOR
        scale = tensors[SCALE + tail]
        block[SCALE + tail] = scale if whole else scale[first : first + count]
        if format.two_level:
            block[ROW_SCALE + tail] = tensors[ROW_SCALE + tail][first : first + count]
        elif ROW_SCALE + tail in tensors:
            block[ROW_SCALE + tail] = tensors[ROW_SCALE + tail]
        if not format.symmetric:
            words = tensors[ZERO_POINT + tail]
            block[ZERO_POINT + tail] = (
                words if whole else _zero_block(words, format.zero_bits, first, count)
            )
    return block


def _zero_block(words: Tensor, bits: int, first: int, count: int) -> Tensor:
    start, stop = first * bits, (first + count) * bits
    if start % 32 == 0 and (stop % 32 == 0 or stop // 32 == words.shape[0] - 1):
        return words[start // 32 : -(-stop // 32)]
    rows = words.shape[0] * 32 // bits
    return pack_zeros(unpack_zeros(words, bits, rows)[first : first + count], bits)
