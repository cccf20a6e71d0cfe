"""Launches of the CUDA kernels with torch tensors, on a GPU or in the emulator.

A `Runner` is either: the code that pads inputs, finds a workspace and passes arguments is the same,
so that the emulator runs what a GPU would. A launch goes to torch's current stream, does not wait,
and takes its partial sums and flags from the stream's workspace; outputs and rounded inputs are in
torch's memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.activation import ActivationSegment
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight
from quantlib.kernels import workspace
from quantlib.kernels.cuda import decode, quantizer, segmented
from quantlib.kernels.cuda.loading import Loader, Number, loader_for
from quantlib.kernels.emulator.build import compile_kernel
from quantlib.kernels.emulator.machine import Kernel, Writable

Argument = Tensor | int | float | None
_DECODE_WRITES = (5, 6, 7)
"""Places of outputs, partial sums and flags among `decode.arguments`."""
_SEGMENTED_WRITES = (6, 7, 8)
"""The same among `segmented.arguments`."""
_QUANTIZER_WRITES = (3, 4)
"""Codes and their companions among `quantizer.arguments`."""
_QUANTIZER_BLOCKS = 4
"""Of a processor: tokens in float32 are small, and a block waits for memory most of its time."""


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: what is compiled, what it is given, how large its grid is.

    name:      of the kernel in `source`, compiled with `macros`.
    arguments: in the kernel's order; `written` are the places of those that it writes to.
    """

    source: Path
    name: str
    macros: Mapping[str, int]
    arguments: Sequence[Argument]
    written: Collection[int]
    blocks: int
    threads: int
    shared_bytes: int


class Runner(Protocol):
    """Who runs kernels: a GPU, or the emulator. architecture: what they are planned for."""

    architecture: int
    processors: int

    def run(self, launch: Launch) -> None:
        """Start it on the current stream."""


class GpuRunner:
    """A GPU's kernels, on torch's current stream."""

    def __init__(self, loader: Loader, device: torch.device, processors: int) -> None:
        self.architecture, self.processors = loader.architecture, processors
        self._loader, self._device = loader, device

    def run(self, launch: Launch) -> None:
        """See `Runner`."""
        shared = launch.shared_bytes
        with _on(self._device):
            kernel = self._loader.kernel(launch.source, launch.name, launch.macros, shared)
            given = [number(argument) for argument in launch.arguments]
            stream = _stream(self._device)
            driver = self._loader.driver
            driver.launch(kernel, launch.blocks, launch.threads, shared, stream, given)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    """The address of torch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


class EmulatedRunner:
    """The emulator: the same source, compiled for the processor."""

    architecture = 80
    processors = 2

    def run(self, launch: Launch) -> None:
        """See `Runner`."""
        given = [
            Writable(argument)
            if index in launch.written and isinstance(argument, Tensor)
            else _whole_rows(argument)
            for index, argument in enumerate(launch.arguments)
        ]
        kernel = _emulated(launch.source, tuple(sorted(launch.macros.items())))
        kernel.launch(given, launch.blocks, launch.threads, launch.shared_bytes)


def _whole_rows(argument: Argument) -> Argument:
    """The emulator checks bounds of whole buffers: rows with their padding, not a part of them."""
    if not isinstance(argument, Tensor) or argument.is_contiguous():
        return argument
    rows = argument.new_zeros(len(argument), argument.stride(0))
    rows[:, : argument.shape[1]] = argument
    return rows


@cache
def _emulated(source: Path, macros: tuple[tuple[str, int], ...]) -> Kernel:
    return Kernel(compile_kernel(source, dict(macros)))


def number(argument: Argument) -> Number:
    """An argument as the kernel's parameters have it: 64-bit addresses, 32-bit numbers."""
    if argument is None:
        return np.uint64(0)
    if isinstance(argument, Tensor):
        return np.uint64(argument.data_ptr())
    return np.float32(argument) if isinstance(argument, float) else np.int32(argument)


@cache
def runner(device: torch.device, emulated: bool = False) -> Runner:
    """Who runs kernels for tensors of a device. Raises BuildError when nobody can."""
    if emulated:
        return EmulatedRunner()
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return GpuRunner(loader_for(device), device, processors)


def pack(weight: QuantizedWeight) -> decode.DecodeWeight:
    """A weight as kernel (a) reads it, on its device."""
    device = weight.segments[0].codes.device
    packed = decode.pack(_on_cpu(weight))
    return replace(
        packed,
        codes=packed.codes.to(device),
        meta=packed.meta.to(device),
        row_factors=packed.row_factors.to(device),
    )


def pack_segmented(weight: QuantizedWeight, layout: segmented.Layout) -> segmented.SegmentedWeight:
    """A weight as kernel (b) reads it, on its device."""
    device = weight.segments[0].codes.device
    packed = segmented.pack(_on_cpu(weight), layout)
    return replace(
        packed,
        codes=packed.codes.to(device),
        meta=packed.meta.to(device),
        units=packed.units.to(device),
    )


def _on_cpu(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.shape, tuple(_to_cpu(part) for part in weight.segments))


def _to_cpu(part: QuantizedSegment) -> QuantizedSegment:
    row_scale = None if part.row_scale is None else part.row_scale.cpu()
    zero = None if part.zero is None else part.zero.cpu()
    return QuantizedSegment(part.segment, part.codes.cpu(), part.scale.cpu(), row_scale, zero)


def decode_linear(
    runner: Runner, x: Tensor, weight: decode.DecodeWeight, bias: Tensor | None = None
) -> Tensor:
    """x [M, K] (float16 or bfloat16) times the transposed weight [N, K], by kernel (a): [M, N].

    More tokens than a launch takes are several launches.
    """
    _check_inputs(x, weight.shape[1])
    rows = _aligned(x)
    out = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)
    own = None if bias is None else bias.to(x.dtype).contiguous()
    for first in range(0, len(x), weight.most_tokens):
        piece = slice(first, first + weight.most_tokens)
        _launch(runner, rows[piece], weight, own, out[piece])
    return out


def _launch(
    runner: Runner, x: Tensor, weight: decode.DecodeWeight, bias: Tensor | None, out: Tensor
) -> None:
    case = weight.case(len(x), x.dtype, runner.architecture)
    blocks = runner.processors * case.blocks_per_sm
    partials = workspace.partial_sums(x.device)[: blocks * case.partial_floats]
    flags = workspace.flags(x.device)[:blocks]
    arguments = decode.arguments(weight, x, bias, out, partials, flags)
    runner.run(
        Launch(
            decode.SOURCE,
            decode.NAME,
            case.macros(),
            arguments,
            _DECODE_WRITES,
            blocks,
            decode.THREADS,
            case.shared_bytes,
        )
    )


def segmented_linear(
    runner: Runner,
    x: Tensor,
    weight: segmented.SegmentedWeight,
    activations: Sequence[ActivationSegment],
    bias: Tensor | None = None,
    turn: quantizer.Turn = quantizer.NO_TURN,
    order: Tensor | None = None,
) -> Tensor:
    """x [M, K] (float16 or bfloat16), rotated, put in `order` (int32 [K]) and rounded as
    `activations` say, times the transposed weight [N, K], by kernel (b): [M, N], for any number of
    tokens.

    The weight is in the layout for these activations on the runner's architecture.
    """
    _check_inputs(x, weight.shape[1])
    out = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)
    if not len(x):
        return out
    rounded = _rounded(runner, x, weight.layout, activations, turn, order)
    own = None if bias is None else bias.to(x.dtype).contiguous()
    case = segmented.case(weight.layout, len(x), x.dtype, runner.architecture)
    blocks = runner.processors
    partials = workspace.partial_sums(x.device)[: blocks * case.partial_floats]
    flags = workspace.flags(x.device)[:blocks]
    runner.run(
        Launch(
            segmented.SOURCE,
            segmented.NAME,
            case.macros(),
            segmented.arguments(weight, rounded, own, out, partials, flags),
            _SEGMENTED_WRITES,
            blocks,
            segmented.THREADS,
            case.shared_bytes,
        )
    )
    return out


def _rounded(
    runner: Runner,
    x: Tensor,
    layout: segmented.Layout,
    activations: Sequence[ActivationSegment],
    turn: quantizer.Turn,
    order: Tensor | None,
) -> segmented.Tokens:
    """By the fused quantizer, or by torch what that does not take (then no graph can be captured):
    the bits are the same, but for sums of a turn's dense part, whose order differs."""
    if not quantizer.takes(layout, activations, runner.architecture):
        return quantizer.reference(x, layout, activations, turn, order)
    found = quantizer.empty(layout, len(x), x.device)
    runner.run(
        Launch(
            quantizer.SOURCE,
            quantizer.NAME,
            quantizer.macros(layout, x.dtype, turn, order is not None),
            quantizer.arguments(x.contiguous(), layout, found, turn, order),
            _QUANTIZER_WRITES,
            min(len(x), _QUANTIZER_BLOCKS * runner.processors),
            quantizer.THREADS,
            quantizer.shared_bytes(layout),
        )
    )
    return found


def _check_inputs(x: Tensor, columns: int) -> None:
    if x.dim() != 2 or x.shape[1] != columns:
        raise FormatError(f"inputs are [M, {columns}], not {list(x.shape)}")


def _aligned(x: Tensor) -> Tensor:
    """x in rows that the kernel can copy 16 bytes of at a time: x itself where it is so."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    rows = x.new_zeros(len(x), -(-x.shape[1] // 8) * 8)
    rows[:, : x.shape[1]] = x
    return rows[:, : x.shape[1]]
