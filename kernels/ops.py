"""The operators that quantized modules call: `linear` and `embedding` on a PackedWeight.

Both are operators of `torch.library` (`quantlib::linear`, `quantlib::embedding`) with fake kernels,
so they pass through `torch.compile` and export as one opaque node. They take the packed tensors as
a list and everything else about the weight as a layout string. On the CPU the C++ kernels compute;
elsewhere, or without a compiler, the torch reference.

Modes of `linear`:
    "exact"  activations stay as they are; weights become float32, as the reference's do.
    "int8"   every token is rounded to int8 (scale amax/127) and multiplied in integers. Weights
             with a float element cannot be: their product with the rounded activations is taken in
             float32.

The C++ kernels give the same bits for any number of threads. Exact products of more than a few
tokens are torch's, and as repeatable as those.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quantlib import formats
from quantlib.errors import FormatError, UsageError
from quantlib.kernels import reference
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.packed import PackedWeight, parse_layout, suffixes_of

__all__ = ["MODES", "PackedWeight", "backend", "dequantize", "embedding", "linear"]

MODES = ("exact", "int8")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FEW_TOKENS = 4
"""Up to here the exact kernel decodes weights in registers; beyond, blocks of rows are decoded to
float32 and torch multiplies them: from there on its blocked matrix product is faster than decoding
again for every few tokens."""
_BLOCK_BYTES = 4 << 20
"""Size of such a block: it stays in the cache between being written and being read."""


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, mode: str = "exact"
) -> Tensor:
    """x [..., K] times the transposed weight [N, K], plus bias [N]: [..., N] in x's dtype.

    x is float32, bfloat16 or float16; sums are float32 or wider. Raises FormatError on another K or
    dtype, and UsageError on an unknown mode.
    """
    return torch.ops.quantlib.linear(x, list(weight.tensors.values()), weight.layout, bias, mode)


def embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows `ids` (integers, any shape) of the weight [N, K]: [*ids.shape, K] in `dtype`.

    Raises DataError when an id is not one of the N rows.
    """
    return torch.ops.quantlib.embedding(ids, list(weight.tensors.values()), weight.layout, dtype)


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole weight [N, K], as `formats.dequantize` gives it, on the weight's device."""
    tensors = list(weight.tensors.values())
    library = _library(tensors)
    if library is None:
        return formats.dequantize(weight.to_quantized(), dtype)
    return library.dequantize(cpu.describe(tensors, weight.layout)).to(dtype)


def backend() -> str:
    """What computes on the CPU: "avx512", "avx2", "portable"; "reference" without a library."""
    library = cpu.load()
    return "reference" if library is None else library.isa


@torch.library.custom_op("quantlib::linear", mutates_args=())
def _linear(x: Tensor, weight: list[Tensor], layout: str, bias: Tensor | None, mode: str) -> Tensor:
    _check_linear(x, layout, bias, mode)
    library = _library([x, *weight])
    if library is None:
        bits = 8 if mode == "int8" else 16
        return reference.linear(x, _packed(weight, layout).to_quantized(), bias, bits)
    described = cpu.describe(weight, layout)
    flat = x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
    wide_bias = bias if bias is None else bias.to(torch.float32).contiguous()
    if mode == "int8" and not described.all_integer:
        codes, scale = reference.round_activations(flat)
        flat, mode = codes * scale, "exact"
    if mode == "int8" or flat.shape[0] <= _FEW_TOKENS:
        out = library.linear(described, flat, wide_bias, mode)
    else:
        out = _linear_by_blocks(library, described, flat, wide_bias)
    return out.to(x.dtype).view(*x.shape[:-1], described.rows)


@_linear.register_fake
def _linear_fake(
    x: Tensor, weight: list[Tensor], layout: str, bias: Tensor | None, mode: str
) -> Tensor:
    (rows, _), _ = parse_layout(layout)
    _check_linear(x, layout, bias, mode)
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("quantlib::embedding", mutates_args=())
def _embedding(ids: Tensor, weight: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    (rows, columns), _ = parse_layout(layout)
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    if not len(flat):
        return torch.empty(*ids.shape, columns, dtype=dtype, device=ids.device)
    library = _library([ids, *weight])
    if library is None:
        if int(flat.min()) < 0 or int(flat.max()) >= rows:
            raise cpu.row_out_of_range(rows)
        out = formats.dequantize(_packed(weight, layout).select_rows(flat).to_quantized())
    else:
        out = library.dequantize(cpu.describe(weight, layout), flat)
    return out.to(dtype).view(*ids.shape, columns)


@_embedding.register_fake
def _embedding_fake(ids: Tensor, weight: list[Tensor], layout: str, dtype: torch.dtype) -> Tensor:
    (_, columns), _ = parse_layout(layout)
    return ids.new_empty(*ids.shape, columns, dtype=dtype)


def _linear_by_blocks(
    library: cpu.Library, described: cpu.Description, x: Tensor, bias: Tensor | None
) -> Tensor:
    """x [M, K] -> [M, N] with the weight decoded a few megabytes at a time."""
    out = x.new_empty(x.shape[0], described.rows)
    step = max(64, _BLOCK_BYTES // (4 * described.columns))
    for start in range(0, described.rows, step):
        rows = range(start, min(start + step, described.rows))
        block = library.dequantize(described, rows)
        part = None if bias is None else bias[rows.start : rows.stop]
        out[:, rows.start : rows.stop] = functional.linear(x, block, part)
    return out


def _library(tensors: list[Tensor]) -> cpu.Library | None:
    """The C++ kernels, if they are to be had and all tensors lie in main memory."""
    return cpu.load() if all(tensor.is_cpu for tensor in tensors) else None


def _packed(tensors: list[Tensor], layout: str) -> PackedWeight:
    shape, segments = parse_layout(layout)
    return PackedWeight.from_tensors(dict(zip(suffixes_of(layout), tensors)), shape, segments)


def _check_linear(x: Tensor, layout: str, bias: Tensor | None, mode: str) -> None:
    (rows, columns), _ = parse_layout(layout)
    if mode not in MODES:
        raise UsageError(
            f"unknown mode {mode!r} of a quantized linear: use one of {', '.join(MODES)}"
        )
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
