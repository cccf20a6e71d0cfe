"""Rounding that gradients pass through, with the values that a checkpoint will hold.

A straight-through estimator: forward the rounded numbers, backward the gradient as if nothing had
been rounded, also where a number saturates (FLIQS, and the code of its authors: scales carry no
gradient). Scales are found anew at every step from the numbers themselves, weights' in their stored
form: what is trained is what `formats.quantize_rtn` makes of the final weights, and what the
kernels make of the inputs, to the bit. The tests compare them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib.errors import SearchError
from quantlib.formats.activation import ActivationFormat, ActivationSegment, fake_quantize
from quantlib.formats.elements import FLOATS, FloatElement
from quantlib.formats.rtn import quantize_rtn, store_scales
from quantlib.formats.weight import dequantize
from quantlib.formats.weight_format import CHANNEL, WeightFormat
from quantlib.search.trained.numbers import Candidate

_EXPONENT = 0x7F800000
"""The exponent field of a float32."""
_F32_SMALLEST = 2.0**-149


class _Through(torch.autograd.Function):
    """The rounded numbers, with the gradient of the exact ones."""

    @staticmethod
    def forward(_: Any, x: Tensor, rounded: Tensor) -> Tensor:
        """`rounded`, in x's place."""
        return rounded

    @staticmethod
    def backward(_: Any, *gradients: Any) -> Any:
        """The gradient of `rounded` as that of x."""
        return gradients[0], None


def through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, of x's shape, with the gradient of x."""
    passed: Tensor = _Through.apply(x, rounded)
    return passed


def round_weight(weight: Tensor, candidate: Candidate) -> Tensor:
    """A weight [N, K] as the candidate stores it, float32; its gradient is the weight's."""
    with torch.no_grad():
        values = _weight_values(weight.detach().to(torch.float32), candidate)
    return through(weight, values)


def round_inputs(x: Tensor, candidate: Candidate) -> Tensor:
    """Inputs [..., K] with a scale for each token, float32 (unrounded ones stay what they are)."""
    with torch.no_grad():
        values = _input_values(x.detach(), candidate)
    return x if values is None else through(x, values)


def round_samples(x: Tensor, candidate: Candidate) -> Tensor:
    """A convolution's input [B, ...] with one scale for each sample: its places overlap in what the
    window reads, so that a token of its own each would be rounded many times over.

    Raises SearchError as `check_convolution`.
    """
    if not candidate.scheme.activation.rounds:
        return x
    check_convolution(candidate)
    return round_inputs(x.flatten(1), candidate).view(x.shape)


def check_convolution(candidate: Candidate) -> None:
    """Raise SearchError for a candidate that cannot round the input of a convolution."""
    scheme = candidate.scheme
    if scheme.activation.rounds and not _is_whole(scheme.activation):
        raise SearchError(
            f"{candidate.name} rounds columns of a convolution's input apart, and its window reads "
            "them at many places: use a format with one scale, such as w4a4"
        )
    if scheme.high is not None:
        raise SearchError(
            f"{candidate.name} has wider columns, and a convolution has none that stay in place: "
            "use w4a4 and the like"
        )


def _is_whole(form: ActivationFormat) -> bool:
    """Whether one scale serves a token, with no zero point."""
    return form.symmetric and not form.group


def _weight_values(weight: Tensor, candidate: Candidate) -> Tensor:
    segments = candidate.scheme.segments(weight.shape[1])
    form = segments[0].format
    if len(segments) == 1 and _is_plain(form, weight.shape[1]):
        return _plain_rows(weight.reshape(-1, form.group_size or weight.shape[1]), form).view(
            weight.shape
        )
    return dequantize(quantize_rtn(weight, segments))


def _is_plain(form: WeightFormat, columns: int) -> bool:
    """Whether it is symmetric with a float16 for each output channel, or for each of whole
    groups."""
    whole = form.group_size == CHANNEL or (form.group_size > 0 and columns % form.group_size == 0)
    return whole and form.symmetric and form.scale == "f16"


def _plain_rows(weight: Tensor, form: WeightFormat) -> Tensor:
    """`dequantize(quantize_rtn(...))` of such a format, a row for each scale, without codes and
    with one check for nan: most of a small layer's step would go into those."""
    low = weight.amin(dim=1, keepdim=True).clamp_(max=0)
    high = weight.amax(dim=1, keepdim=True).clamp_(min=0)
    if not form.is_integer:
        element = FLOATS[form.element]
        ideal = torch.maximum(high, -low) / element.max_value
        return scaled_to_grid(weight, _stored(ideal, low, high, form), element)
    half = 1 << (form.bits - 1)
    ideal = torch.maximum(high / (half - 0.5), -low / (half + 0.5))
    scale = _stored(ideal, low, high, form)
    codes = (weight / _divisor(scale)).add_(half).round_().clamp_(0, 2 * half - 1)
    return codes.sub_(half).mul_(scale)


def _stored(ideal: Tensor, low: Tensor, high: Tensor, form: WeightFormat) -> Tensor:
    """A scale as a checkpoint has it, for weights from `low` to `high`."""
    ideal = torch.where(high > low, ideal.clamp(min=_F32_SMALLEST), ideal)
    return store_scales(ideal, form)[0].to(torch.float32)


def _input_values(x: Tensor, candidate: Candidate) -> Tensor | None:
    form = candidate.scheme.activation
    if not form.rounds:
        return None
    if candidate.scheme.high is None and _is_whole(form):
        if form.is_integer:
            return _integer_tokens(x.to(torch.float32), form.bits)
        return _float_tokens(x.to(torch.float32), FLOATS[form.float_element])
    segments: tuple[ActivationSegment, ...] = candidate.scheme.activations(x.shape[-1])
    return fake_quantize(x, segments)


def _integer_tokens(x: Tensor, bits: int) -> Tensor:
    """`fake_quantize` of one segment in whole tokens, without what finite numbers do not need."""
    limit = (1 << (bits - 1)) - 1
    scale = x.abs().amax(dim=-1, keepdim=True) / limit
    values = (x / _divisor(scale)).round_()
    return values.clamp_(-limit, limit).mul_(scale)


def _float_tokens(x: Tensor, element: FloatElement) -> Tensor:
    scale = x.abs().amax(dim=-1, keepdim=True) / element.max_value
    return scaled_to_grid(x, scale, element)


def scaled_to_grid(x: Tensor, scale: Tensor, element: FloatElement) -> Tensor:
    """The float's number nearest to x / scale, times scale; zeros where the scale is 0."""
    return to_grid(x / _divisor(scale), element).mul_(scale)


def to_grid(x: Tensor, element: FloatElement) -> Tensor:
    """The float's number nearest to each float32, ties to even; beyond its range its ends.

    Codes are never made: a step of the grid is a power of two, which the exponent field has.
    """
    power = (x.view(torch.int32) & _EXPONENT).view(torch.float32)
    step = power.clamp_(min=2.0**element.min_exponent).mul_(2.0**-element.mantissa_bits)
    rounded = (x / step).round_().mul_(step)
    return rounded.clamp_(-element.max_value, element.max_value)


def _divisor(scale: Tensor) -> Tensor:
    """What to divide by: what has no scale is all zeros."""
    return torch.where(scale > 0, scale, torch.inf)
