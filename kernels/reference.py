"""What the kernels compute, in torch: readable, on any device, and the answer when no compiler
exists.

Every faster form is tested against these functions. They unpack the whole weight on each call,
which is slow and uses the memory that packing saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.errors import FormatError
from quantlib.formats.scheme import Segment
from quantlib.formats.weight import QuantizedWeight, dequantize

INT8_LIMIT = 127
"""Largest magnitude of a rounded activation. -128 is left out: the range is symmetric, as the scale
is."""


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    activation_bits: int = 16,
    compute_dtype: torch.dtype = torch.float32,
    act_group: int = 0,
) -> Tensor:
    """x [..., K] times the transposed weight [N, K], plus bias [N]: [..., N] in x's dtype.

    activation_bits 16: `x` is used as it is, in `compute_dtype` (float32 or float64).
    activation_bits 8: every token is first rounded by `round_activations`, or `act_group` columns
    of it at a time (groups begin anew with each segment). The products of integers are summed in
    float64, where they are exact, so the result is that of integer arithmetic.
    """
    if activation_bits not in (8, 16):
        raise FormatError(f"activations have 8 or 16 bits here, not {activation_bits}")
    wide = torch.float64 if activation_bits == 8 else compute_dtype
    matrix = dequantize(weight, torch.float32).to(wide)
    if activation_bits == 16:
        out = functional.linear(x.to(wide), matrix)
    elif act_group:
        segments = [part.segment for part in weight.segments]
        parts = [round_activations(x[..., columns]) for columns in act_groups(segments, act_group)]
        rounded = torch.cat([codes.to(wide) * scale.to(wide) for codes, scale in parts], dim=-1)
        out = functional.linear(rounded, matrix)
    else:
        codes, scale = round_activations(x)
        out = functional.linear(codes.to(wide), matrix) * scale.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


def act_groups(segments: Sequence[Segment], act_group: int) -> list[slice]:
    """The columns of each activation group."""
    return [
        slice(start, min(start + act_group, segment.start + segment.length))
        for segment in segments
        for start in range(segment.start, segment.start + segment.length, act_group)
    ]


def round_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [..., K] in -127..127 and float32 scales [..., 1], one per token (last dimension):
    `x` is about `codes * scale`.

    The scale is amax / 127 in float32; codes round to nearest, ties to even. A token of zeros, or
    one so small that its scale is, has codes 0. A token with a value that is not finite has codes 0
    and the scale nan, so that nothing computed from it looks like a number.
    """
    x = x.to(torch.float32)
    amax = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scale = torch.where(torch.isfinite(amax), amax / INT8_LIMIT, torch.nan)
    codes = torch.where(scale > 0, x / scale, 0.0).round().clamp(-INT8_LIMIT, INT8_LIMIT)
    return codes.to(torch.int8), scale


def embedding(
    ids: Tensor, weight: QuantizedWeight, compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows `ids` (integers, any shape) of the dequantized weight [N, K]: [*ids.shape, K]."""
    return functional.embedding(ids, dequantize(weight, torch.float32).to(compute_dtype))
