"""Products by the kernels that are not the processor's: what a choice of `dispatch` means.

Weights are rearranged for a kernel at their first use, and kept in that form as long as their
packed tensors live.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from quantlib.errors import UsageError
from quantlib.formats.activation import ActivationSegment, fake_quantize, quantize, quantize_float8
from quantlib.formats.weight import QuantizedWeight
from quantlib.kernels import dispatch, reference
from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda import decode, quantizer, segmented
from quantlib.kernels.cuda import launch as cuda
from quantlib.kernels.packed import PackedWeight, activations_of, parse_layout, suffixes_of
from quantlib.kernels.rearranged import Rearranged
from quantlib.kernels.triton import inputs
from quantlib.kernels.triton import launch as triton
from quantlib.kernels.triton import layout as split

_SPLIT: Rearranged[split.SplitWeight] = Rearranged()
_DECODE: Rearranged[decode.DecodeWeight] = Rearranged()
_SEGMENTED: Rearranged[segmented.SegmentedWeight] = Rearranged()


def multiply(
    kernel: str, x: Tensor, tensors: list[Tensor], layout: str, bias: Tensor | None
) -> Tensor:
    """x [M, K] by a packed weight, with DECODE, TRITON or DENSE: [M, N] in x's dtype.

    A CUDA kernel that cannot be compiled or loaded is passed over, and said once; raises UsageError
    when it was forced.
    """
    if kernel == dispatch.DECODE:
        try:
            return _decode(x, tensors, layout, bias)
        except BuildError as error:
            kernel = _instead(error, x.device)
    if kernel == dispatch.REFERENCE:
        return reference.linear(x, _unpacked(tensors, layout), bias)
    weight = split_weight(tensors, layout)
    if kernel == dispatch.TRITON:
        return triton.linear(x, weight, bias)
    return triton.dense_linear(x, weight, bias)


def _decode(x: Tensor, tensors: list[Tensor], layout: str, bias: Tensor | None) -> Tensor:
    runner = _runner(x.device)
    weight = _DECODE.of(tensors, layout, lambda: cuda.pack(_unpacked(tensors, layout)))
    return cuda.decode_linear(runner, x, weight, bias)


def _runner(device: torch.device) -> cuda.Runner:
    return cuda.runner(device, emulated=dispatch.forced() == "emulator")


def _instead(error: BuildError, device: torch.device) -> str:
    """Who computes when the CUDA kernel cannot be had."""
    asked = dispatch.forced()
    if asked is not None:
        raise UsageError(f"{dispatch.VARIABLE}={asked}, but {error}: unset it") from error
    missing = dispatch.machine(device).triton
    name = "the torch reference" if missing else "Triton"
    dispatch.say_once(f"the CUDA kernel cannot be loaded ({error}); {name} computes in its place")
    return dispatch.REFERENCE if missing else dispatch.TRITON


def multiply_rounded(
    kernel: str,
    x: Tensor,
    tensors: list[Tensor],
    layout: str,
    bias: Tensor | None,
    activations: tuple[ActivationSegment, ...],
) -> Tensor:
    """x [M, K], rounded as `activations` say, by a packed weight, with SEGMENTED or TRITON: [M, N]
    in x's dtype.

    Triton multiplies codes where it has a product for them: integers, or 8-bit floats of the
    weight's own kind where tensor cores take those (`triton.plan`); otherwise the rounded numbers,
    in float32. A CUDA kernel that cannot be had is passed over as in `multiply`.
    """
    if kernel == dispatch.SEGMENTED:
        try:
            return _segmented(x, tensors, layout, bias, activations)
        except BuildError as error:
            kernel = _instead(error, x.device)
    if kernel == dispatch.REFERENCE:
        return reference.linear(x, _unpacked(tensors, layout), bias, activations=activations)
    weight = split_weight(tensors, layout)
    if triton.has_float8(x.device) and triton.float8_plan(weight, activations) is not None:
        given = quantize_float8(x, activations)
        return triton.float8_linear(*given, weight, activations, bias, x.dtype)
    if triton.integer_plan(weight, activations) is None:
        return triton.linear(fake_quantize(x, activations), weight, bias).to(x.dtype)
    rounder = inputs.quantize if inputs.can_quantize(activations) else quantize
    codes, scales = rounder(x, activations)
    return triton.integer_linear(codes, scales, weight, activations, bias, x.dtype)


def multiply_turned(
    x: Tensor,
    tensors: list[Tensor],
    layout: str,
    bias: Tensor | None,
    activations: tuple[ActivationSegment, ...],
    turn: quantizer.Turn,
    order: Tensor | None,
) -> Tensor:
    """As `multiply_rounded` with SEGMENTED, of inputs that are rotated and put in order before they
    are rounded, in the same pass."""
    try:
        return _segmented(x, tensors, layout, bias, activations, turn, order)
    except BuildError as error:
        kernel = _instead(error, x.device)
    turned = quantizer.rotate(x, turn).to(x.dtype)
    ordered = turned if order is None else turned.index_select(1, order)
    return multiply_rounded(kernel, ordered, tensors, layout, bias, activations)


def turned_by_triton(
    x: Tensor,
    tensors: list[Tensor],
    layout: str,
    bias: Tensor | None,
    activations: tuple[ActivationSegment, ...],
    turn: quantizer.Turn,
    order: Tensor | None,
) -> Tensor:
    """As `multiply_rounded` with TRITON, of inputs that are rotated and put in order before they
    are rounded: in the same pass where columns keep their order and codes are multiplied."""
    blocks = inputs.Blocks(turn.dense, turn.sylvester, turn.factor)
    weight = split_weight(tensors, layout)
    codes = inputs.can_quantize(activations) and triton.integer_plan(weight, activations)
    if order is None and blocks.fits and codes:
        given = inputs.quantize(x, activations, blocks)
        return triton.integer_linear(*given, weight, activations, bias, x.dtype)
    turned = inputs.rotate(x, blocks) if blocks.fits else quantizer.rotate(x, turn).to(x.dtype)
    ordered = turned if order is None else turned.index_select(1, order)
    return multiply_rounded(dispatch.TRITON, ordered, tensors, layout, bias, activations)


def _segmented(
    x: Tensor,
    tensors: list[Tensor],
    layout: str,
    bias: Tensor | None,
    activations: tuple[ActivationSegment, ...],
    turn: quantizer.Turn = quantizer.NO_TURN,
    order: Tensor | None = None,
) -> Tensor:
    runner = _runner(x.device)
    own = _segments(layout, activations, runner.architecture)
    weight = _SEGMENTED.of(
        tensors,
        # A weight has another form for inputs of another kind.
        f"{layout} {activations_of(activations)} sm_{runner.architecture}",
        lambda: cuda.pack_segmented(_unpacked(tensors, layout), own),
    )
    return cuda.segmented_linear(runner, x, weight, activations, bias, turn, order)


@lru_cache(maxsize=4096)
def _segments(
    layout: str, activations: tuple[ActivationSegment, ...], architecture: int
) -> segmented.Layout:
    _, segments = parse_layout(layout)
    return segmented.layout(segments, activations, architecture)


def rows(tensors: list[Tensor], layout: str, dtype: torch.dtype, ids: Tensor | None) -> Tensor:
    """Rows `ids` (int64 [count], None: all) of a packed weight as numbers, with Triton."""
    return triton.dequantize(split_weight(tensors, layout), dtype, ids)


def split_weight(tensors: list[Tensor], layout: str) -> split.SplitWeight:
    """A packed weight as Triton's kernels read it."""
    return _SPLIT.of(tensors, layout, lambda: split.pack(_unpacked(tensors, layout)))


def _unpacked(tensors: list[Tensor], layout: str) -> QuantizedWeight:
    shape, segments = parse_layout(layout)
    named = dict(zip(suffixes_of(layout), tensors))
    return PackedWeight.from_tensors(named, shape, segments).to_quantized()
