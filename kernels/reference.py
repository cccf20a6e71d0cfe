"""What the kernels compute, in torch: readable, on any device, and the answer when no compiler
exists.

Every faster form is tested against these functions. They unpack the whole weight on each call,
which is slow and uses the memory that packing saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.errors import FormatError
from quantlib.formats.activation import (
    ActivationFormat,
    ActivationSegment,
    check_activations,
    fake_quantize,
    quantize,
    scale_columns,
)
from quantlib.formats.weight import QuantizedWeight, dequantize
from quantlib.formats.weight_format import Segment


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    activation_bits: int = 16,
    compute_dtype: torch.dtype = torch.float32,
    act_group: int = 0,
    activations: Sequence[ActivationSegment] = (),
) -> Tensor:
    """x [..., K] times the transposed weight [N, K], plus bias [N]: [..., N] in x's dtype.

    activation_bits 16: `x` is used as it is, in `compute_dtype` (float32 or float64).
    activation_bits 8: every token is first rounded by `round_activations`, or `act_group` columns
    of it at a time (groups begin anew with each segment).
    activations: `x` is rounded so instead (`formats.activation`).
    The products of rounded numbers are summed in float64, where those of integers are exact, so the
    result is that of integer arithmetic.
    """
    if activation_bits not in (8, 16):
        raise FormatError(f"activations have 8 or 16 bits here, not {activation_bits}")
    if activation_bits == 8 and not activations:
        activations = int8_activations([part.segment for part in weight.segments], act_group)
    wide = torch.float64 if activations else compute_dtype
    matrix = dequantize(weight, torch.float32).to(wide)
    out = functional.linear(_rounded(x, activations) if activations else x.to(wide), matrix)
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


def int8_activations(segments: Sequence[Segment], act_group: int) -> tuple[ActivationSegment, ...]:
    """What mode "int8" of a weight's segments is: one scale per token, or per `act_group` columns
    of each segment."""
    if act_group:
        form = ActivationFormat(8, group=act_group)
        return tuple(ActivationSegment(part.start, part.length, form) for part in segments)
    length = sum(part.length for part in segments)
    return (ActivationSegment(0, length, ActivationFormat(8)),)


def act_groups(segments: Sequence[Segment], act_group: int) -> list[slice]:
    """The columns of each activation group."""
    return scale_columns(int8_activations(segments, act_group))


def round_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [..., K] in -127..127 and float32 scales [..., 1], one per token (last dimension):
    `x` is about `codes * scale`.

    The scale is amax / 127 in float32; codes round to nearest, ties to even. A token of zeros, or
    one so small that its scale is, has codes 0. A token with a value that is not finite has codes 0
    and the scale nan, so that nothing computed from it looks like a number.
    """
    if not x.shape[-1]:
        return x.to(torch.int8), x.new_zeros(*x.shape[:-1], 1, dtype=torch.float32)
    return quantize(x, (ActivationSegment(0, x.shape[-1], ActivationFormat(8)),))


def _rounded(x: Tensor, activations: Sequence[ActivationSegment]) -> Tensor:
    """x [..., K], rounded: float64, where a code times its scale is exact."""
    check_activations(x.shape[-1], activations)
    parts = []
    for segment in activations:
        own = (replace(segment, start=0),)
        columns = x[..., segment.start : segment.start + segment.length]
        if not segment.format.is_integer:
            parts.append(fake_quantize(columns, own).double())
            continue
        codes, scales = quantize(columns, own)
        widths = [group.stop - group.start for group in scale_columns(own)]
        by_column = scales.repeat_interleave(torch.tensor(widths, device=x.device), dim=-1)
        parts.append(codes.double() * by_column.double())
    return torch.cat(parts, dim=-1)


def embedding(
    ids: Tensor, weight: QuantizedWeight, compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows `ids` (integers, any shape) of the dequantized weight [N, K]: [*ids.shape, K]."""
    return functional.embedding(ids, dequantize(weight, torch.float32).to(compute_dtype))
