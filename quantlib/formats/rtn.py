"""Round to nearest: scales from each group's extremes, codes from division. The reference of every
other rounding.

How the ideal scale of a group is chosen, before it is stored (`amax` is the largest magnitude,
times `clip`):

- symmetric integers: the smallest scale that leaves every weight within half a step. Codes reach
  from -2^(b-1) to 2^(b-1) - 1, so that is max(max / (2^(b-1) - 1/2), -min / (2^(b-1) + 1/2)). The
  usual amax / (2^(b-1) - 1) wastes a code: on Gaussian groups of 32 its squared error is 2.4, 1.5
  and 1.16 times larger at 2, 3 and 4 bits; at 5 bits and more all choices are within a few percent.
  (amax / 2^(b-1) is 14 % better still at 2 bits, by clipping: that is what a search over `clip`
  finds, without giving up the bound here.)
- asymmetric integers: (max - min) / (2^b - 1) over a range that includes 0, and a zero point taken
  with the *stored* scale. An integer one keeps zero exact and both ends within half a step (of the
  ideal scale; a stored one that was rounded down may clip a little more).
- integers of dynamic fixed point: the least power of two that is not below the scale above, so
  that nothing saturates (arXiv:1802.00930).
- floats: amax / max_value.
- MX: 2^(floor(log2 amax) - emax), OCP Microscaling Formats 1.0, 6.3. The top of the range may
  saturate.
- NVFP4: amax / 6 as an e4m3 multiple of `row_scale` = (amax of the tensor) / (6 * 448).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.elements import FLOATS, encode_float
from quantlib.formats.groups import group_blocks
from quantlib.formats.sparse import largest_of_four
from quantlib.formats.weight import (
    E8M0_BIAS,
    E8M0_NAN,
    QuantizedSegment,
    QuantizedWeight,
    check_segments,
    decode_scales,
    decode_zeros,
)
from quantlib.formats.weight_format import TENSOR, Segment, WeightFormat

_F16_MAX = 65504.0
_F16_NORMAL = 2.0**-14
_F16_UNIT = 2.0**-24
_F32_NORMAL = 2.0**-126
_F32_SMALLEST = 2.0**-149


def quantize_rtn(weight: Tensor, segments: Sequence[Segment]) -> QuantizedWeight:
    """Round a weight [N, K] to nearest, segment by segment; in a sparse format the two largest of
    every four, the others are zeros. Raises FormatError on inf or nan."""
    check_segments(weight.shape, segments)
    weight = _finite(weight)  # here, so that the columns it names are the weight's
    parts = []
    for segment in segments:
        columns = weight[:, segment.start : segment.start + segment.length]
        if segment.format.sparse:
            columns = columns * largest_of_four(columns)
        scale, row_scale, zero = choose_scales(columns, segment.format)
        codes = encode(columns, segment.format, scale, row_scale, zero)
        parts.append(QuantizedSegment(segment, codes, scale, row_scale, zero))
    return QuantizedWeight((weight.shape[0], weight.shape[1]), tuple(parts))


def choose_scales(
    weight: Tensor, format: WeightFormat, clip: float | Tensor = 1.0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scale, row_scale, zero) of a segment [N, length], in stored form (see `formats.weight`),
    from its extremes.

    clip: factor on each group's range, one for all or a tensor that broadcasts to [N, G] ([1, 1]
    for TENSOR).

    Raises FormatError on inf or nan, and on a scale that float16 cannot hold.
    """
    weight = _finite(weight)
    low, high = _group_range(weight, format)
    low, high = low * clip, high * clip
    ideal = _ideal_scale(low, high, format)
    # A group of float32 subnormals must not come out as one of zeros.
    ideal = torch.where(high > low, ideal.clamp(min=_F32_SMALLEST), ideal)
    scale, row_scale = store_scales(ideal, format)
    if format.symmetric:
        return scale, row_scale, None
    steps = -low / _divisor(decode_scales(scale, row_scale, format)) / format.zero_step
    return scale, row_scale, steps.round_().clamp_(0, (1 << format.zero_bits) - 1).to(torch.uint8)


def store_scales(ideal: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor | None]:
    """Round ideal scales, float32 [N, G] ([1, 1] for TENSOR), to the stored form (scale, row_scale)
    of `format`.

    Each is the nearest representable one (e8m0: nearest in the logarithm). A positive scale is
    never stored as zero: below the smallest one the smallest is taken. float16 subnormals are used
    where they must be; there, float elements round up, since a larger scale costs a float nothing
    and a smaller one saturates it. Two-level: the row's largest ideal scale, in float16, is
    `row_scale`.

    Raises FormatError on scales that are negative, not finite, or beyond float16's 65504.
    """
    if not bool(((ideal >= 0) & torch.isfinite(ideal)).all()):
        raise FormatError(f"{format}: a scale is negative, infinite or nan")
    if format.scale == "f16":
        return _to_float16(ideal, format), None
    if format.scale == "e8m0":
        return _to_e8m0(ideal), None
    if format.scale == "e4m3":
        largest = FLOATS["e4m3"].max_value
        top = ideal.max().reshape(1)
        row_scale = torch.where(
            top > 0, (top / largest).clamp(min=_F32_NORMAL), torch.ones_like(top)
        )
        codes = encode_float(ideal / row_scale, "e4m3")
    else:
        row_scale = _to_float16(ideal.amax(dim=1), format)
        largest = float((1 << format.scale_bits) - 1)
        ratio = ideal / _divisor(row_scale.to(torch.float32))[:, None]
        codes = torch.round(ratio * largest).clamp_(max=largest).to(torch.uint8)
    # Code 1 is the smallest positive scale in both codings.
    return torch.where(ideal > 0, codes.clamp(min=1), torch.zeros_like(codes)), row_scale


def encode(
    weight: Tensor,
    format: WeightFormat,
    scale: Tensor,
    row_scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    """Codes uint8 [N, length] nearest to the weight [N, length] under stored scales, saturating at
    the range's ends.

    Ties go to even. Raises FormatError on inf or nan.
    """
    weight = _finite(weight)
    divisor = _divisor(decode_scales(scale, row_scale, format))
    zeros = None if zero is None else decode_zeros(zero, format)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for block in group_blocks(weight.shape[1], format.group_size):
        steps = block.view(weight) / divisor[:, block.groups, None]
        if not format.is_integer:
            block.view(codes).copy_(encode_float(steps, format.element))
            continue
        offset = 1 << (format.bits - 1) if zeros is None else zeros[:, block.groups, None]
        steps.add_(offset).round_().clamp_(0, (1 << format.bits) - 1)
        block.view(codes).copy_(steps)
    return codes


def _ideal_scale(low: Tensor, high: Tensor, format: WeightFormat) -> Tensor:
    """The module docstring's list: the scale, float32, of groups reaching from `low` to `high`."""
    if format.is_integer:
        half = 1 << (format.bits - 1)
        if format.symmetric:
            ideal = torch.maximum(high / (half - 0.5), -low / (half + 0.5))
        else:
            ideal = (high - low) / ((1 << format.bits) - 1)
        return _next_power(ideal) if format.shares_exponent else ideal
    amax, element = torch.maximum(high, -low), FLOATS[format.element]
    if format.scale != "e8m0":
        return amax / element.max_value
    exponent = torch.frexp(amax).exponent - 1 - element.max_exponent
    return torch.where(amax > 0, torch.exp2(exponent.clamp(-E8M0_BIAS).to(torch.float32)), amax)


def _group_range(weight: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, float32 [N, G] ([1, 1] for TENSOR); the range
    includes 0."""
    blocks = list(group_blocks(weight.shape[1], format.group_size))
    low = torch.cat([block.view(weight).amin(dim=2) for block in blocks], dim=1)
    high = torch.cat([block.view(weight).amax(dim=2) for block in blocks], dim=1)
    if format.group_size == TENSOR:
        low, high = low.amin(dim=0, keepdim=True), high.amax(dim=0, keepdim=True)
    return low.clamp_(max=0), high.clamp_(min=0)


def _to_float16(ideal: Tensor, format: WeightFormat) -> Tensor:
    if bool((ideal > _F16_MAX).any()):
        raise FormatError(
            f"{format}: a scale of {float(ideal.max()):.4g} is beyond float16's {_F16_MAX:.0f}; "
            "keep this weight in f32 or use an mx format"
        )
    units = ideal / _F16_UNIT
    units = torch.round(units) if format.is_integer else torch.ceil(units)
    subnormal = (units * _F16_UNIT).clamp_(min=_F16_UNIT)
    stored = torch.where(ideal < _F16_NORMAL, subnormal, ideal)
    return torch.where(ideal > 0, stored, ideal).to(torch.float16)


def _to_e8m0(ideal: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(ideal)  # ideal = mantissa * 2^exponent, mantissa in [1/2, 1)
    exponent = exponent - (mantissa < 0.5**0.5).to(exponent.dtype) + E8M0_BIAS
    return torch.where(ideal > 0, exponent.clamp(0, E8M0_NAN - 1), 0).to(torch.uint8)


def _next_power(value: Tensor) -> Tensor:
    """The least power of two that is not below each `value`; 0 stays 0. At most 2^127."""
    mantissa, exponent = torch.frexp(value)  # value = mantissa * 2^exponent, mantissa in [1/2, 1)
    exponent = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(max=E8M0_BIAS)
    return torch.where(value > 0, torch.ldexp(torch.ones_like(value), exponent), value)


def _divisor(scale: Tensor) -> Tensor:
    """The scale to divide by: weights over a zero scale are zeros, which dividing by infinity gives
    without a nan."""
    return torch.where(scale > 0, scale, torch.full_like(scale, torch.inf))


def _finite(weight: Tensor) -> Tensor:
    """The weight in float32. Raises FormatError naming the first inf or nan, or when it is not a
    matrix."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise FormatError(
            f"a weight to quantize is a floating-point matrix [N, K], not {list(weight.shape)}"
        )
    weight = weight.to(torch.float32)
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        row, column = torch.nonzero(~finite)[0].tolist()
        raise FormatError(
            f"the weight has {int((~finite).sum())} values that are inf or nan (first at row "
            f"{row}, column {column}): the source model is damaged, or overflowed when converted"
        )
    return weight
