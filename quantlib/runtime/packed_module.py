"""`PackedModule`: packed weights as buffers of a module, and the kernel handles over them.

The buffers carry the checkpoint's names, dtypes and shapes, so the state dict *is* the file. On the
CPU the kernels compute from tiles (`quantlib.kernels.layouts`): at the first call a weight is
rearranged and its buffers are dropped, so that resident memory stays the file's size. Whoever asks
for a buffer (by its name, for a state dict, a copy, a pickle, another device) gets it as it was.

Packed buffers are bits, not numbers: casting a model (`model.to(torch.bfloat16)`) must not touch
them, so `_apply`, through which torch makes every cast and move, keeps their dtype and lets only
their device change.

A weight also knows what is done to its inputs: `activations` say how they are rounded, and
`X.weight_order`, int32 [K], which of them each column of the packed weight takes (column j takes
input `order[j]`); without one the columns are the inputs in their own order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.errors import UsageError
from quantlib.formats.activation import ActivationSegment
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import ORDER, TensorLayout, dequantize, packed_layout, unpack
from quantlib.kernels import ops, turned
from quantlib.kernels.layouts import TiledWeight, can_tile, tile
from quantlib.kernels.packed import PackedWeight, activations_of
from quantlib.runtime.fused_turn import InputTurn
from quantlib.runtime.row_blocks import Segments, join_row_blocks, row_block

__all__ = ["MODES", "SCHEME", "Activations", "PackedModule", "Segments", "multiply"]

SCHEME = "scheme"
"""The mode in which every weight's own activations decide."""
MODES = {
    SCHEME: ("exact", 0),
    "exact": ("exact", 0),
    "int8": ("int8", 0),
    "int8g128": ("int8", 128),
}
"""How a module rounds its inputs -> mode and act_group that it asks of `kernels.ops.linear`."""

Activations = tuple[ActivationSegment, ...]


def check_mode(mode: str) -> None:
    """Raise UsageError when there is no such mode."""
    if mode not in MODES:
        raise UsageError(f"{mode!r} is not a mode to run in: use one of {', '.join(MODES)}")


def multiply(
    x: Tensor,
    weight: PackedWeight | TiledWeight,
    bias: Tensor | None,
    mode: str,
    activations: str,
) -> Tensor:
    """`kernels.ops.linear` in one of MODES; `activations` (as text) count in mode "scheme"."""
    return ops.linear(x, weight, bias, *MODES[mode], activations if mode == SCHEME else "")


class PackedModule(nn.Module):
    """Base of all modules that hold packed weights.

    A weight of shape `[N, K]` registered as "weight" becomes the buffers `weight_packed`,
    `weight_scale`, ... A stack of expert matrices `[E, N, K]` is, as everywhere in quantlib, one
    packed matrix `[E*N, K]`.
    """

    def __init__(self, mode: str = SCHEME) -> None:
        super().__init__()
        check_mode(mode)
        self.mode = mode
        self.turn: InputTurn | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._segments: dict[str, Segments] = {}
        self._activations: dict[str, Activations] = {}
        self._rounding: dict[str, str] = {}
        self._handles: dict[str, tuple[dict[str, Tensor], list[PackedWeight]]] = {}
        # Weights that have tiles have no buffers, until somebody asks for one.
        self._tiles: dict[str, list[TiledWeight]] = {}
        self._lock = threading.RLock()

    def register_packed(
        self,
        name: str,
        shape: tuple[int, ...],
        segments: Segments,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the packed weight `name`, `[N, K]` or `[E, N, K]`, with uninitialized buffers.

        Its inputs are not rounded and in their own order, unless `set_inputs` says otherwise.
        """
        self._shapes[name], self._segments[name] = tuple(shape), segments
        for suffix, (dtype, size) in self.layout(name).items():
            self.register_buffer(name + suffix, torch.empty(size, dtype=dtype, device=device))

    def set_inputs(
        self, name: str, activations: Activations = (), order: Tensor | None = None
    ) -> None:
        """Say what is done to the inputs of the packed weight `name`.

        activations: how they are rounded in mode "scheme".
        order:       int32 [K], kept without a copy: packed column j takes input `order[j]`.
        """
        self._activations[name] = tuple(activations)
        self._rounding[name] = activations_of(activations)
        self._buffers.pop(name + ORDER, None)
        if order is not None:
            self.register_buffer(name + ORDER, order)

    def activations(self, name: str) -> Activations:
        """How the inputs of the packed weight `name` are rounded in mode "scheme"."""
        return self._activations.get(name, ())

    def rounding(self, name: str) -> str:
        """The same as text, for the operator, which a compiler traces."""
        return self._rounding.get(name, "")

    def order(self, name: str) -> Tensor | None:
        """The inputs' order that the packed weight `name` takes, None for their own."""
        return self._buffers.get(name + ORDER)

    def multiply(self, name: str, x: Tensor, bias: Tensor | None = None, matrix: int = 0) -> Tensor:
        """x [..., K] times the transposed matrix (of a stack: the one of this number) `name`, with
        its inputs rotated, put in order and rounded as the mode says: [..., N] in x's dtype."""
        order, rounding, turn = self.order(name), self.rounding(name), self.turn
        weight = self.handles(name)[matrix]
        if turn is not None:
            if self.mode == SCHEME and isinstance(weight, PackedWeight):
                fused = turn.fused(x.device)
                if turned.fuses(x, x.shape[-1], rounding, fused):
                    return turned.linear(x, weight, rounding, fused, order, bias)
            x = turn(x)
        x = x if order is None else x.index_select(-1, order)
        return multiply(x, weight, bias, self.mode, rounding)

    def exchange_packed(self, name: str, segments: Segments, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` (by suffix) in the place of the packed weight `name`, maybe in new formats.

        They are taken without a copy. What is done to the inputs stays.
        """
        with self._lock:
            for suffix in self.layout(name):
                self._buffers.pop(name + suffix, None)
            self._tiles.pop(name, None)
            self._handles.pop(name, None)
            self._segments[name] = segments
            for suffix in self.layout(name):
                self.register_buffer(name + suffix, tensors[suffix])

    def packed_weights(self) -> dict[str, tuple[tuple[int, ...], Segments]]:
        """Name -> shape and segments of every packed weight."""
        return {name: (shape, self._segments[name]) for name, shape in self._shapes.items()}

    def composites(self) -> dict[str, tuple[Scheme, tuple[int, ...]]]:
        """Name -> scheme and shape of every weight that is several of the packed ones: those whose
        names begin with it (`runtime.composite`)."""
        return {}

    def layout(self, name: str) -> TensorLayout:
        """Suffix -> dtype and shape of the buffers of the packed weight `name`."""
        *stack, columns = self._shapes[name]
        return packed_layout((math.prod(stack), columns), self._segments[name])

    def packed_names(self) -> list[str]:
        """Names of all packed buffers of this module, tiled or not, and of orders."""
        names = [name + suffix for name in self._shapes for suffix in self.layout(name)]
        return names + [name + ORDER for name in self._shapes if self.order(name) is not None]

    def packed_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of the packed weight `name`, by suffix: its buffers, or made from its tiles,
        anew at each call."""
        with self._lock:
            tiles = self._tiles.get(name)
            if tiles is None:
                return {suffix: self.get_buffer(name + suffix) for suffix in self.layout(name)}
        return self._canonical(name, tiles)

    def packed_bytes(self) -> int:
        """Bytes of the packed tensors and orders, as a checkpoint stores them."""
        packed = sum(
            dtype.itemsize * math.prod(shape)
            for name in self._shapes
            for dtype, shape in self.layout(name).values()
        )
        orders = [self.order(name) for name in self._shapes]
        return packed + sum(order.nbytes for order in orders if order is not None)

    def packed_device(self, name: str) -> torch.device:
        """Where the packed weight `name` is."""
        tiles = self._tiles.get(name)
        if tiles is not None:
            return tiles[0].device
        return next(iter(self.packed_tensors(name).values())).device

    def handles(self, name: str) -> Sequence[PackedWeight | TiledWeight]:
        """Kernel handles of the packed weight `name`: one, or one per matrix of a stack.

        On the CPU these are tiles, made at the first call. Elsewhere, and for whoever traces this
        module, they are made from the buffers, and again when one was replaced (a load, a move).
        """
        tiles = self._tiles.get(name)
        if tiles is not None:
            return tiles
        if can_tile(list(self._present(name).values())):
            return self._tile(name)
        cached = self._handles.get(name)
        if cached is None or any(
            self._buffers[key] is not tensor for key, tensor in cached[0].items()
        ):
            cached = self._handles[name] = self._make_handles(name)
        return cached[1]

    def _present(self, name: str) -> dict[str, Tensor]:
        """The buffers of the packed weight `name`, by suffix; none while it is tiled."""
        found = {suffix: self._buffers.get(name + suffix) for suffix in self.layout(name)}
        return {suffix: buffer for suffix, buffer in found.items() if buffer is not None}

    def _make_handles(self, name: str) -> tuple[dict[str, Tensor], list[PackedWeight]]:
        tensors = self._present(name)
        *stack, rows, columns = self._shapes[name]
        segments = self._segments[name]
        parts = [tensors]
        if stack:
            parts = [row_block(tensors, segments, i * rows, rows) for i in range(stack[0])]
        handles = [PackedWeight.from_tensors(part, (rows, columns), segments) for part in parts]
        return {name + suffix: tensor for suffix, tensor in tensors.items()}, handles

    def _tile(self, name: str) -> list[TiledWeight]:
        """Rearrange the packed weight `name` and drop its buffers."""
        with self._lock:
            if name not in self._tiles:
                tiles = [tile(handle) for handle in self._make_handles(name)[1]]
                self._tiles[name] = tiles
                self._handles.pop(name, None)
                for suffix in self.layout(name):
                    del self._buffers[name + suffix]
            return self._tiles[name]

    def _restore(self, name: str) -> None:
        """Bring the buffers of a tiled weight back and drop its tiles."""
        with self._lock:
            tiles = self._tiles.get(name)
            if tiles is not None:
                for suffix, tensor in self._canonical(name, tiles).items():
                    self._buffers[name + suffix] = tensor
                del self._tiles[name]

    def _canonical(self, name: str, tiles: Sequence[TiledWeight]) -> dict[str, Tensor]:
        blocks = [part.to_packed().tensors for part in tiles]
        if len(self._shapes[name]) == 2:
            return blocks[0]
        return join_row_blocks(blocks, self._segments[name], self._shapes[name][-2])

    def dequantize(self, name: str = "weight", dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight `name`, `[N, K]` or `[E, N, K]`, with its columns in the inputs' own
        order, made anew; it is not kept."""
        *stack, columns = self._shapes[name]
        packed = unpack(
            self.packed_tensors(name), (math.prod(stack), columns), self._segments[name]
        )
        dense, order = dequantize(packed, dtype), self.order(name)
        if order is not None:
            dense = dense.index_select(1, torch.argsort(order))
        return dense.view(self._shapes[name])

    def extra_repr(self) -> str:
        parts = []
        for name, shape in self._shapes.items():
            formats = "+".join(str(segment.format) for segment in self._segments[name])
            parts.append(f"{name}={list(shape)} {formats}")
            if self.activations(name):
                formats = "+".join(f"a{part.format}" for part in self.activations(name))
                parts.append(f"inputs {formats}")
        return ", ".join([*parts, f"mode={self.mode}", f"bytes={self.packed_bytes()}"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        probe = fn(torch.empty(0, dtype=torch.uint8, device="cpu"))
        if probe.device.type != "cpu":
            for name in tuple(self._tiles):
                self._restore(name)
        packed = {
            name + suffix: buffer
            for name in self._shapes
            for suffix, buffer in self._present(name).items()
        }
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

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in tuple(self._tiles):
            for suffix, tensor in self.packed_tensors(name).items():
                destination[prefix + name + suffix] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for name in tuple(self._tiles):
            self._restore(name)
        super()._load_from_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        self._restore_owner(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._restore_owner(name)
        super().__setattr__(name, value)

    def _restore_owner(self, buffer: str) -> None:
        """Restore the weight that this is the name of a buffer of, if it is one that is tiled."""
        for name in tuple(self.__dict__.get("_tiles", ())):
            if buffer.startswith(name) and buffer.removeprefix(name) in self.layout(name):
                self._restore(name)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: buffers instead of tiles."""
        with self._lock:
            state = self.__dict__ | {"_tiles": {}, "_handles": {}, "_buffers": dict(self._buffers)}
            for name, tiles in self._tiles.items():
                for suffix, tensor in self._canonical(name, tiles).items():
                    state["_buffers"][name + suffix] = tensor
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()
