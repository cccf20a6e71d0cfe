"""Kernel (a) on the emulator, and what its results are compared with."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantlib.formats import QuantizedWeight
from quantlib.formats.weight import decode_zeros, effective_scale
from quantlib.kernels.cuda import decode
from quantlib.kernels.emulator import build
from quantlib.kernels.emulator.machine import Counters, Kernel, Writable


def multiply(
    weight: QuantizedWeight,
    inputs: Tensor,
    bias: Tensor | None = None,
    blocks: int = 3,
    seed: int = 0,
    stages: int = 4,
    source: Path = decode.SOURCE,
    flags: tuple[str, ...] = (),
    launches: int = 1,
) -> tuple[Tensor, Counters]:
    """inputs [M, K] times the weight: [M, N], and what was counted.

    Between rows and after the last one, inputs have nothing but NaN, and so has what the kernel may
    not read: partial sums that nobody wrote, outputs.
    """
    packed = decode.pack(weight)
    case = replace(packed.case(len(inputs), inputs.dtype), stages=stages)
    kernel = Kernel(build.compile_kernel(source, case.macros(), flags))
    rows = torch.full((len(inputs), -(-inputs.shape[1] // 8) * 8), torch.nan, dtype=inputs.dtype)
    rows[:, : inputs.shape[1]] = inputs
    output = torch.full((len(inputs), weight.shape[0]), torch.nan, dtype=inputs.dtype)
    partials = torch.full((blocks, case.partial_floats), torch.nan)
    waiting = torch.zeros(blocks, dtype=torch.int32)
    given = decode.arguments(packed, rows[:, : inputs.shape[1]], bias, output, partials, waiting)
    # The machine takes whole buffers: the rows with their padding.
    given[0] = rows
    written = {5: output, 6: partials, 7: waiting}
    arguments = [
        Writable(written[index]) if index in written else argument
        for index, argument in enumerate(given)
    ]
    for _ in range(launches):
        output.fill_(torch.nan)
        counters = kernel.launch(arguments, blocks, decode.THREADS, case.shared_bytes, seed)
        assert not waiting.any(), "flags are left for the next launch to trip over"
    return output, counters


def expected(
    weight: QuantizedWeight, inputs: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far from it the kernel may be.

    A product passes through at most `steps` float32 operations, each of them off by 2^-23 of what
    it adds up at most (half of it where hardware rounds to nearest; tensor cores may cut): one
    matrix instruction per 16 columns, three operations at the end of a group, and, at the end,
    eight of others' sums, factors and bias. What is added up is at most `mass`, the sum of absolute
    values: codes and zero points are each counted from the middle of the range, as the kernel has
    them. Last comes one rounding to 16 bits.
    """
    part = weight.segments[0]
    form, length = part.segment.format, weight.shape[1]
    size = form.group_size if form.group_size > 0 else length
    group = torch.arange(length) // size
    middle = 1 << form.bits - 1
    scale = effective_scale(part).double()[:, group]
    codes = part.codes.double() - middle
    zero = torch.zeros_like(scale)
    if part.zero is not None:
        zero = decode_zeros(part.zero, form).double().expand(len(scale), -1)[:, group] - middle
    wide = inputs.double()
    exact = wide @ ((codes - zero) * scale).T
    mass = wide.abs() @ ((codes.abs() + zero.abs()) * scale.abs()).T
    if bias is not None:
        exact = exact + bias.double()
        mass = mass + bias.double().abs()
    steps = -(-length // 16) + 3 * -(-length // size) + 8
    info = torch.finfo(inputs.dtype)
    last = exact.abs() * info.eps / 2 + info.smallest_normal * info.eps
    return exact, steps * 2.0**-23 * mass * (1 + info.eps) + last


def assert_right(
    output: Tensor, weight: QuantizedWeight, inputs: Tensor, bias: Tensor | None = None
) -> None:
    """Raise AssertionError unless the output [M, N] is as near to the result as `expected` says."""
    exact, bound = expected(weight, inputs, bias)
    error = (output.double() - exact).abs()
    assert (error <= bound).all(), f"off by {(error / bound).max()} times what it may be"
