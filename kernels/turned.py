"""A product whose inputs are rotated and rounded: one operator, `quantlib::turned_linear`, so that
a kernel can do both in one pass.

On GPUs (and in the emulator) the quantizer of kernel (b) rotates tokens, puts their columns in
order and rounds them while they are in shared memory. Triton's does the same where columns keep
their order. Where another kernel multiplies, they are rotated and put in order before it, in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.kernels import accelerated, dispatch
from quantlib.kernels.cuda import quantizer
from quantlib.kernels.packed import PackedWeight, parse_activations, parse_layout


def fuses(x: Tensor, columns: int, activations: str, turn: quantizer.Turn) -> bool:
    """Whether `linear` is for inputs like these: rounded, on a GPU (or kernels are forced to be as
    there), in a rotation that the quantizer does on so many columns."""
    forced = dispatch.forced() in ("cuda", "emulator", "triton")
    if not activations or not (x.is_cuda or forced):
        return False
    try:
        quantizer.check(turn, columns)
    except FormatError:
        return False
    return True


def linear(
    x: Tensor,
    weight: PackedWeight,
    activations: str,
    turn: quantizer.Turn,
    order: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [..., K], rotated, put in `order` (int32 [K]) and rounded as `activations` say
    (`packed.activations_of`), times the transposed weight [N, K], plus bias: [..., N] in x's dtype.

    All tensors are on one device. Raises FormatError for a rotation that the quantizer does not do.
    """
    tensors, rotation = list(weight.tensors.values()), (turn.sylvester, turn.dense, turn.factor)
    return torch.ops.quantlib.turned_linear(
        x, tensors, weight.layout, bias, activations, *rotation, order
    )


@torch.library.custom_op("quantlib::turned_linear", mutates_args=())
def _turned_linear(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bias: Tensor | None,
    activations: str,
    sylvester: int,
    dense: Tensor | None,
    factor: float,
    order: Tensor | None,
) -> Tensor:
    turn = quantizer.Turn(sylvester, dense, factor)
    quantizer.check(turn, x.shape[-1])
    flat, rounding = x.reshape(-1, x.shape[-1]), parse_activations(activations)
    product = dispatch.Product(len(flat), x.dtype, layout, rounding)
    kernel = dispatch.choose(product, dispatch.machine(x.device))
    if kernel == dispatch.SEGMENTED:
        out = accelerated.multiply_turned(flat, weight, layout, bias, rounding, turn, order)
        return out.view(*x.shape[:-1], out.shape[-1])
    if kernel == dispatch.TRITON:
        out = accelerated.turned_by_triton(flat, weight, layout, bias, rounding, turn, order)
        return out.view(*x.shape[:-1], out.shape[-1])
    turned = quantizer.rotate(flat, turn).to(x.dtype)
    ordered = turned if order is None else turned.index_select(1, order)
    given = (ordered, weight, layout, bias, "exact", 0, activations)
    out = torch.ops.quantlib.linear(*given)
    return out.view(*x.shape[:-1], out.shape[-1])


@_turned_linear.register_fake
def _turned_linear_fake(x: Tensor, _: list[Tensor], layout: str, *_others: object) -> Tensor:
    (rows, _columns), _segments = parse_layout(layout)
    return x.new_empty(*x.shape[:-1], rows)
