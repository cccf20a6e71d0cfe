"""What the kernels compute, in torch: readable, on any device, and the answer when no compiler
exists.

Every faster form is tested against these functions. They unpack the whole weight on each call,
which is slow and uses the memory that packing saved.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.errors import FormatError
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
) -> Tensor:
    """x [..., K] times the transposed weight [N, K], plus bias [N]: [..., N] in x's dtype.

    activation_bits 16: `x` is used as it is, in `compute_dtype` (float32 or float64).
    activation_bits 8: every token is first rounded by `round_activations`. The products of integers
    are summed in float64, where they are exact, so the result is that of integer arithmetic.
    """
    if activation_bits not in (8, 16):
        raise FormatError(f"activations have 8 or 16 bits here, not {activation_bits}")
    wide = torch.float64 if activation_bits == 8 else compute_dtype
    matrix = dequantize(weight, torch.float32).to(wide)
    if activation_bits == 8:
        codes, scale = round_activations(x)
        out = functional.linear(codes.to(wide), matrix) * scale.to(wide)
    else:
        out = functional.linear(x.to(wide), matrix)
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


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
