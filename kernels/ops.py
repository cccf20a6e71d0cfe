"""The operators that quantized modules call: `linear`, `embedding` and `dequantize` on a weight,
packed or tiled.

They are operators of `torch.library` (`quantlib::linear`, `quantlib::embedding`,
`quantlib::dequantize`) with fake kernels, so they pass through `torch.compile` and export as one
opaque node each. They take a weight's tensors as a list (one of them, for a tiled weight) and
everything else about it as a layout string.

Which kernel computes, `dispatch` decides. On the CPU these are the C++ kernels, on tiles: a packed
weight is tiled at its first use, and its tiles live as long as its first tensor does. Whoever holds
a weight for long tiles it and drops the packed form (`runtime.packed_module`). On NVIDIA GPUs they
are CUDA's and Triton's (`accelerated`), which have forms of their own. Elsewhere, or without a
compiler, the torch reference computes.

Modes of `linear`:
    "exact"  activations stay as they are; sums are float32.
    "int8"   every token is rounded to int8 (scale amax/127), or every `act_group` columns of it,
             and multiplied in integers. Weights with an element that has none (floats but e2m1
             to e2m4) are multiplied with the rounded activations in float32.

Or `activations` say how the columns are rounded, segment by segment (`formats.activation`). What
the integer kernels can take (`cpu.forms`) they round and multiply in integers; otherwise the
rounded numbers are multiplied in mode "exact".

The C++ kernels give the same bits for any instruction set and number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from quantlib import formats
from quantlib.errors import FormatError, UsageError
from quantlib.formats.activation import ActivationSegment, check_activations, fake_quantize
from quantlib.kernels import accelerated, dispatch, reference
from quantlib.kernels.cpu import forms
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.layouts import MAX_PIECE, TILES, TiledWeight, is_traced
from quantlib.kernels.packed import (
    PackedWeight,
    activations_of,
    parse_activations,
    parse_layout,
    suffixes_of,
)
from quantlib.kernels.rearranged import Rearranged

__all__ = ["MODES", "PackedWeight", "TiledWeight", "backend", "dequantize", "embedding", "linear"]

MODES = ("exact", "int8")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Weight = PackedWeight | TiledWeight


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    mode: str = "exact",
    act_group: int = 0,
    activations: str | Sequence[ActivationSegment] = "",
) -> Tensor:
    """x [..., K] times the transposed weight [N, K], plus bias [N]: [..., N] in x's dtype.

    x is float32, bfloat16 or float16; sums are float32 or wider.
    act_group:   in mode "int8", columns that are rounded with a scale of their own (a multiple of
                 128; groups begin anew with each segment); 0: all columns of a token.
    activations: how x is rounded, or the text `packed.activations_of` makes of that; mode and
                 act_group are then left at "exact" and 0. None: as the mode says.
    Raises FormatError on another K or dtype, and UsageError on an unknown mode or group.
    """
    text = activations if isinstance(activations, str) else activations_of(activations)
    arguments = (x, _tensors(weight), weight.layout, bias, mode, act_group, text)
    if _is_plain(x, bias):
        return _compute_linear(*arguments)
    return torch.ops.quantlib.linear(*arguments)


def embedding(ids: Tensor, weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows `ids` (integers, any shape) of the weight [N, K]: [*ids.shape, K] in `dtype`.

    Raises DataError when an id is not one of the N rows. (On a GPU, where that would mean to wait
    for it, its row is nan.)
    """
    return torch.ops.quantlib.embedding(ids, _tensors(weight), weight.layout, dtype)


def dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole weight [N, K] in `dtype`, on its device: what `formats.dequantize` gives, up to one
    float32 rounding of two-level scales."""
    return torch.ops.quantlib.dequantize(_tensors(weight), weight.layout, dtype)


def backend() -> str:
    """What computes on the CPU: an instruction set ("avx512", ..., "portable"), "reference" without
    a library, or what QUANTLIB_KERNELS names."""
    asked = dispatch.forced()
    if asked not in (None, "cpu"):
        return asked
    library = cpu.load()
    return "reference" if library is None else library.isa


def _compute_linear(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bias: Tensor | None,
    mode: str,
    act_group: int,
    activations: str = "",
) -> Tensor:
    _check_linear(x, layout, bias, mode, act_group, activations)
    if _on_accelerator(x, layout):
        return _accelerated_linear(x, weight, layout, bias, mode, act_group, activations)
    library = _library([x, *weight])
    if library is None:
        bits = 8 if mode == "int8" else 16
        quantized = _packed(weight, layout).to_quantized()
        rounding = parse_activations(activations)
        return reference.linear(x, quantized, bias, bits, torch.float32, act_group, rounding)
    described = _describe(library, weight, layout)
    flat = _flat(x)
    form = _form(layout.removeprefix(TILES), activations) if activations else None
    if activations and form is None:
        flat = fake_quantize(flat, parse_activations(activations))
    wide_bias = bias if bias is None else bias.to(torch.float32).contiguous()
    out = library.linear(described, flat, wide_bias, mode, act_group=act_group, form=form)
    return out if flat is x else out.to(x.dtype).view(*x.shape[:-1], described.rows)


def _flat(x: Tensor) -> Tensor:
    """x as the kernels take it: float32 [M, K], contiguous; itself if it is so.

    Conversions that change nothing take as long as a small product.
    """
    if x.dim() == 2 and x.dtype == torch.float32 and x.is_contiguous():
        return x
    return x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous()


def _accelerated_linear(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bias: Tensor | None,
    mode: str,
    act_group: int,
    activations: str,
) -> Tensor:
    """By the kernel that `dispatch` chooses, or by the reference."""
    rounding = _rounding(layout, mode, act_group, activations)
    flat = x.reshape(-1, x.shape[-1])
    product = dispatch.Product(len(flat), x.dtype, layout, rounding)
    kernel = dispatch.choose(product, dispatch.machine(x.device))
    if kernel == dispatch.REFERENCE:
        quantized = _packed(weight, layout).to_quantized()
        out = reference.linear(flat, quantized, bias, activations=rounding)
    elif rounding:
        out = accelerated.multiply_rounded(kernel, flat, weight, layout, bias, rounding)
    else:
        out = accelerated.multiply(kernel, flat, weight, layout, bias)
    return out.view(*x.shape[:-1], out.shape[-1])


@lru_cache(maxsize=4096)
def _rounding(
    layout: str, mode: str, act_group: int, activations: str
) -> tuple[ActivationSegment, ...]:
    """How inputs are rounded, by mode or activations; () when they are not."""
    if mode != "int8":
        return parse_activations(activations)
    _, segments = parse_layout(layout)
    return reference.int8_activations(segments, act_group)


@lru_cache(maxsize=4096)
def _form(layout: str, activations: str) -> forms.Form | None:
    """How the kernels round the inputs of a weight; None when they cannot."""
    (_, segments), rounding = parse_layout(layout), parse_activations(activations)
    return None if forms.why_not(segments, rounding) else forms.form(segments, rounding)


@torch.library.custom_op("quantlib::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bias: Tensor | None,
    mode: str,
    act_group: int = 0,
    activations: str = "",
) -> Tensor:
    return _compute_linear(x, weight, layout, bias, mode, act_group, activations)


@_linear.register_fake
def _linear_fake(
    x: Tensor,
    weight: list[Tensor],
    layout: str,
    bias: Tensor | None,
    mode: str,
    act_group: int = 0,
    activations: str = "",
) -> Tensor:
    (rows, _), _ = parse_layout(layout.removeprefix(TILES))
    _check_linear(x, layout, bias, mode, act_group, activations)
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("quantlib::embedding", mutates_args=())
def _embedding(ids: Tensor, weight: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    (rows, columns), _ = parse_layout(layout.removeprefix(TILES))
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    if not len(flat):
        return torch.empty(*ids.shape, columns, dtype=dtype, device=ids.device)
    if _rows_by_triton(ids, layout):
        if ids.is_cpu:
            _check_rows(flat, rows)  # a GPU would have to be waited for
        out = accelerated.rows(weight, layout, dtype, flat)
        return out.view(*ids.shape, columns)
    library = _library([ids, *weight])
    if library is None:
        _check_rows(flat, rows)
        out = formats.dequantize(_packed(weight, layout).select_rows(flat).to_quantized())
    else:
        out = library.dequantize(_describe(library, weight, layout), flat)
    return out.to(dtype).view(*ids.shape, columns)


@_embedding.register_fake
def _embedding_fake(ids: Tensor, weight: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    (_, columns), _ = parse_layout(layout.removeprefix(TILES))
    return ids.new_empty(*ids.shape, columns, dtype=dtype)


@torch.library.custom_op("quantlib::dequantize", mutates_args=())
def _dequantize(weight: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    if _rows_by_triton(weight[0], layout):
        return accelerated.rows(weight, layout, dtype, None)
    library = _library(weight)
    if library is None:
        return formats.dequantize(_packed(weight, layout).to_quantized(), dtype)
    return library.dequantize(_describe(library, weight, layout)).to(dtype)


@_dequantize.register_fake
def _dequantize_fake(weight: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    (rows, columns), _ = parse_layout(layout.removeprefix(TILES))
    return weight[0].new_empty(rows, columns, dtype=dtype)


def _is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether nobody watches this call: no compiler, no mode, no autograd, no subclass of tensors.

    The dispatcher of a Python operator costs more than a small product: such a call goes past it.
    """
    if type(x) is not Tensor or is_traced():
        return False
    return not torch.is_grad_enabled() or not (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )


_TILES: Rearranged[Tensor] = Rearranged()
"""Tiles of packed weights."""


def _check_rows(ids: Tensor, rows: int) -> None:
    if int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise cpu.row_out_of_range(rows)


def _describe(library: cpu.Library, tensors: list[Tensor], layout: str) -> cpu.Description:
    """The tiles that a weight has, or gets now."""
    if layout.startswith(TILES):
        return library.describe(tensors[0], layout.removeprefix(TILES))
    tiles = _TILES.of(tensors, layout, lambda: library.pack(tensors, layout))
    return library.describe(tiles, layout)


def _tensors(weight: Weight) -> list[Tensor]:
    return [weight.memory] if isinstance(weight, TiledWeight) else list(weight.tensors.values())


def _on_accelerator(tensor: Tensor, layout: str) -> bool:
    """Whether `accelerated` computes with a weight and this: on a GPU, or where that is forced."""
    if not dispatch.tiles_allowed():
        return True
    return tensor.is_cuda and not layout.startswith(TILES)


def _rows_by_triton(tensor: Tensor, layout: str) -> bool:
    if not _on_accelerator(tensor, layout):
        return False
    return dispatch.choose_rows(dispatch.machine(tensor.device)) == dispatch.TRITON


def _library(tensors: list[Tensor]) -> cpu.Library | None:
    """The C++ kernels, if they are to be had, may be used, and all tensors lie in main memory."""
    if not dispatch.tiles_allowed() or not all(tensor.is_cpu for tensor in tensors):
        return None
    return cpu.load()


def _packed(tensors: list[Tensor], layout: str) -> PackedWeight:
    if layout.startswith(TILES):
        raise UsageError("tiles are for the CPU: move the input there, or use the packed weight")
    shape, segments = parse_layout(layout)
    return PackedWeight.from_tensors(dict(zip(suffixes_of(layout), tensors)), shape, segments)


def _check_linear(
    x: Tensor, layout: str, bias: Tensor | None, mode: str, act_group: int, activations: str
) -> None:
    (rows, columns), _ = parse_layout(layout.removeprefix(TILES))
    if mode not in MODES:
        raise UsageError(
            f"unknown mode {mode!r} of a quantized linear: use one of {', '.join(MODES)}"
        )
    if act_group < 0 or act_group % MAX_PIECE or (act_group and mode != "int8"):
        raise UsageError(
            f"activation groups of {act_group} in mode {mode!r}: they are for mode int8, and have "
            f"a multiple of {MAX_PIECE} columns"
        )
    if activations:
        if mode != "exact" or act_group:
            raise UsageError(
                f"a linear is given activations and mode {mode!r} too: give it one of the two"
            )
        check_activations(columns, parse_activations(activations))
    if x.dim() == 0 or x.shape[-1] != columns:
        raise FormatError(
            f"the input has shape {list(x.shape)}, but a weight of {rows} x {columns} takes "
            f"{columns} features in the last dimension: give it the layer's own input"
        )
    if x.dtype not in _DTYPES:
        raise FormatError(
            f"the input is {x.dtype}: give float32, bfloat16 or float16".replace("torch.", "")
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise FormatError(
            f"the bias has shape {list(bias.shape)}, expected [{rows}], one per output feature"
        )
