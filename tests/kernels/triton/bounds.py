"""What a product is in float64, how far from it a kernel may be, and weights on other devices."""

from dataclasses import replace

import torch
from torch import Tensor

from quantlib.formats import QuantizedWeight
from quantlib.formats.elements import decode_float
from quantlib.formats.weight import decode_zeros, effective_scale

UNIT = 2.0**-24
"""Of float32: half the distance from 1 to the next number."""


def expected(
    weight: QuantizedWeight, inputs: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """inputs [M, K] (any dtype, as they are) times the weight, and the bound.

    Adding n numbers in float32, in any order, is off by (n - 1) UNIT of the sum of their absolute
    values at most; a product adds one UNIT to each. Here n is K, the sums of inputs that zero
    points need, three operations at the end of each group, and ten at the end of all (scales of two
    levels, factors, parts, bias). What is added up is `mass`: codes and zero points are each
    counted from the middle of the range, as the kernels have them. Last comes one rounding to the
    output's dtype.
    """
    exact = torch.zeros(len(inputs), weight.shape[0], dtype=torch.float64)
    mass, steps = exact.clone(), 10
    wide = inputs.double()
    for part in weight.segments:
        form, length = part.segment.format, part.segment.length
        own = wide[:, part.segment.start : part.segment.start + length]
        group = torch.arange(length) // (form.group_size if form.group_size > 0 else length)
        scale = effective_scale(part).double()[:, group]
        zero = torch.zeros_like(scale)
        if form.is_integer:
            middle = 1 << form.bits - 1
            values = part.codes.double() - middle
        else:
            values = decode_float(part.codes, form.element).double()
        if part.zero is not None:
            zero = decode_zeros(part.zero, form).double().expand(len(scale), -1)[:, group] - middle
        exact += own @ ((values - zero) * scale).T
        mass += own.abs() @ ((values.abs() + zero.abs()) * scale).T
        steps += 2 * length + 3 * form.groups(length)
    if bias is not None:
        exact, mass = exact + bias.double(), mass + bias.double().abs()
    info = torch.finfo(inputs.dtype)
    last = exact.abs() * info.eps / 2 + info.smallest_normal * info.eps
    return exact, steps * UNIT * mass * (1 + info.eps) + last


def moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    """The weight on another device."""

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    parts = [
        replace(
            part,
            codes=part.codes.to(device),
            scale=part.scale.to(device),
            row_scale=there(part.row_scale),
            zero=there(part.zero),
        )
        for part in weight.segments
    ]
    return QuantizedWeight(weight.shape, tuple(parts))


def assert_close(found: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Within the bound everywhere, wherever it was computed; NaN is not."""
    error = (found.cpu().double() - exact).abs()
    assert (error <= bound).all(), f"off by {(error / bound).max()} times what it may be"
