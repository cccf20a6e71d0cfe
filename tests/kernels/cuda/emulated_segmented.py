"""Kernel (b) on the emulator, and the integer reference that it must equal to the last bit."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantlib.formats import QuantizedWeight, Scheme
from quantlib.formats.activation import ActivationSegment, quantize, scale_columns
from quantlib.kernels.cuda import segmented, tokens
from quantlib.kernels.emulator import build
from quantlib.kernels.emulator.machine import Counters, Kernel, Writable


@dataclass(frozen=True, eq=False)
class Linear:
    """A weight and how its inputs are rounded."""

    weight: QuantizedWeight
    activations: tuple[ActivationSegment, ...]

    def layout(self, architecture: int) -> segmented.Layout:
        parts = [part.segment for part in self.weight.segments]
        return segmented.layout(parts, self.activations, architecture)


def linear(draw, scheme: str, rows: int, columns: int, seed: int = 0, unit_scales: bool = False):
    """A random weight of a scheme, with its activation formats."""
    parsed = Scheme.parse(scheme)
    parts = [(str(part.format), part.length) for part in parsed.segments(columns)]
    weight, _ = draw(rows, parts, seed=seed, unit_scales=unit_scales)
    return Linear(weight, parsed.activations(columns))


def multiply(
    own: Linear,
    inputs: Tensor,
    bias: Tensor | None = None,
    architecture: int = 80,
    blocks: int = 3,
    seed: int = 0,
    stages: int | None = None,
    dtype: torch.dtype = torch.float16,
    source: Path = segmented.SOURCE,
    flags: tuple[str, ...] = (),
    token_tiles: int | None = None,
    launches: int = 1,
) -> tuple[Tensor, Counters]:
    """inputs [M, K], rounded, times the weight: [M, N], and what was counted."""
    layout = own.layout(architecture)
    packed = segmented.pack(own.weight, layout)
    case = segmented.case(layout, len(inputs), dtype, architecture)
    case = replace(case, stages=stages or case.stages, token_tiles=token_tiles or case.token_tiles)
    kernel = Kernel(build.compile_kernel(source, case.macros(), flags))
    output = torch.full((len(inputs), own.weight.shape[0]), torch.nan, dtype=dtype)
    partials = torch.full((blocks, case.partial_floats), torch.nan)
    waiting = torch.zeros(blocks, dtype=torch.int32)
    rounded = tokens.pack(inputs, layout, own.activations)
    given = segmented.arguments(packed, rounded, bias, output, partials, waiting)
    written = {6: output, 7: partials, 8: waiting}
    arguments = [
        Writable(written[index]) if index in written else argument
        for index, argument in enumerate(given)
    ]
    for _ in range(launches):
        output.fill_(torch.nan)
        counters = kernel.launch(arguments, blocks, segmented.THREADS, case.shared_bytes, seed)
        assert not waiting.any(), "flags are left for the next launch to trip over"
    return output, counters


def expected(
    own: Linear, inputs: Tensor, bias: Tensor | None = None, architecture: int = 80
) -> Tensor:
    """float32 [M, N] before the last rounding, in the kernel's order, for tiles that no two blocks
    share: integers from the formats themselves, and every float operation rounded once."""
    layout = own.layout(architecture)
    codes, scales = quantize(inputs, own.activations)
    firsts = torch.tensor([columns.start for columns in scale_columns(own.activations)])
    by_start = {part.segment.start: part for part in own.weight.segments}
    total = torch.zeros(len(inputs), own.weight.shape[0])
    packed = segmented.pack(own.weight, layout)
    units = packed.units[:, : own.weight.shape[0]]
    for index, part in enumerate(layout.segments):
        found, size = by_start[part.start], part.case.span_columns
        if index:
            total = total * units[len(layout.segments) + index]
        scale, unit = segmented.split_scales(found, own.weight.shape[0])
        scale = torch.where(unit[:, None] > 0, scale, 0.0)
        middle = float(1 << (part.weight.bits - 1))
        for first in range(0, part.length, size):
            columns = slice(first, min(first + size, part.length))
            group = first // part.weight.group_size if part.weight.group_size > 0 else 0
            code = codes[:, part.start :][:, : part.length][:, columns].double()
            weight = found.codes[:, columns].double() - middle
            sum_ = (code @ weight.T).float()
            own_scale = scale.expand(own.weight.shape[0], -1)[:, group].float()
            at = torch.searchsorted(firsts, torch.tensor(part.start + first), right=True) - 1
            token_scale = scales[:, at][:, None]
            total = fma(sum_ * own_scale, token_scale, total)
            if found.zero is not None:
                stored = found.zero.expand(own.weight.shape[0], -1)[:, group].float()
                step = torch.tensor(-part.weight.zero_step, dtype=torch.float32)
                factor = own_scale * fma(stored, step, torch.tensor(middle, dtype=torch.float32))
                sums = token_scale * code.sum(1, keepdim=True).float()
                total = fma(sums, factor, total)
    total = total * units[len(layout.segments) - 1]
    return total if bias is None else total + bias.float()


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c of float32, rounded once: the float64 sum is made odd where it is not exact, so that
    rounding it to float32 is rounding the exact sum."""
    product, c = torch.broadcast_tensors(a.double() * b.double(), c.double())
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(torch.int64)
    even = (bits & 1) == 0
    toward = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & even & torch.isfinite(total), bits + toward, bits)
    return odd.view(torch.float64).float()
