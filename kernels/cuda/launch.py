"""Launches of the CUDA kernels with torch tensors, on a GPU or in the emulator.

A `Runner` is either: the code that pads inputs, finds a workspace and passes arguments is the same,
so that the emulator runs what a GPU would. A launch goes to torch's current stream, does not wait,
and takes its partial sums and flags from the stream's workspace; outputs are torch's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight
from quantlib.kernels import workspace
from quantlib.kernels.cuda import decode
from quantlib.kernels.cuda.loading import Loader, Number, loader_for
from quantlib.kernels.emulator.build import compile_kernel
from quantlib.kernels.emulator.machine import Kernel, Writable

Argument = Tensor | int | float | None
_OUTPUT, _PARTIALS, _FLAGS = 5, 6, 7
"""Places of what kernel (a) writes to, among `decode.arguments`."""


class Runner(Protocol):
    """Who runs kernels: a GPU, or the emulator. architecture: what they are planned for."""

    architecture: int
    processors: int

    def run(
        self,
        source: Path,
        name: str,
        macros: Mapping[str, int],
        arguments: Sequence[Argument],
        written: Collection[int],
        blocks: int,
        threads: int,
        shared_bytes: int,
    ) -> None:
        """Launch the kernel `name` of a source. `written`: places of the arguments it writes to."""


class GpuRunner:
    """A GPU's kernels, on torch's current stream."""

    def __init__(self, loader: Loader, device: torch.device, processors: int) -> None:
        self.architecture, self.processors = loader.architecture, processors
        self._loader, self._device = loader, device

    def run(
        self,
        source: Path,
        name: str,
        macros: Mapping[str, int],
        arguments: Sequence[Argument],
        written: Collection[int],
        blocks: int,
        threads: int,
        shared_bytes: int,
    ) -> None:
        """See `Runner`."""
        with _on(self._device):
            kernel = self._loader.kernel(source, name, macros, shared_bytes)
            given = [number(argument) for argument in arguments]
            stream = _stream(self._device)
            self._loader.driver.launch(kernel, blocks, threads, shared_bytes, stream, given)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    """The address of torch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


class EmulatedRunner:
    """The emulator: the same source, compiled for the processor."""

    architecture = 80
    processors = 2

    def run(
        self,
        source: Path,
        name: str,
        macros: Mapping[str, int],
        arguments: Sequence[Argument],
        written: Collection[int],
        blocks: int,
        threads: int,
        shared_bytes: int,
    ) -> None:
        """See `Runner`."""
        given = [
            Writable(argument)
            if index in written and isinstance(argument, Tensor)
            else _whole_rows(argument)
            for index, argument in enumerate(arguments)
        ]
        _emulated(source, tuple(sorted(macros.items()))).launch(
            given, blocks, threads, shared_bytes
        )


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
    on_cpu = QuantizedWeight(weight.shape, tuple(_to_cpu(part) for part in weight.segments))
    packed = decode.pack(on_cpu)
    return replace(
        packed,
        codes=packed.codes.to(device),
        meta=packed.meta.to(device),
        row_factors=packed.row_factors.to(device),
    )


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
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise FormatError(f"inputs are [M, {weight.shape[1]}], not {list(x.shape)}")
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
        decode.SOURCE,
        decode.NAME,
        case.macros(),
        arguments,
        (_OUTPUT, _PARTIALS, _FLAGS),
        blocks,
        decode.THREADS,
        case.shared_bytes,
    )


def _aligned(x: Tensor) -> Tensor:
    """x in rows that the kernel can copy 16 bytes of at a time: x itself where it is so."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    rows = x.new_zeros(len(x), -(-x.shape[1] // 8) * 8)
    rows[:, : x.shape[1]] = x
    return rows[:, : x.shape[1]]
