"""The Triton kernels, called with torch tensors: on a GPU, or in Triton's interpreter.

The interpreter (TRITON_INTERPRET=1) computes bfloat16 with the bits' integer values: silently
wrong. So it gets no bfloat16: inputs become float32 before, and results are rounded after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.activation import ActivationSegment
from quantlib.kernels import workspace
from quantlib.kernels.triton import configurations, plan
from quantlib.kernels.triton.configurations import Configuration, Shape
from quantlib.kernels.triton.layout import SplitSegment, SplitWeight, element_unit

INTERPRET = "TRITON_INTERPRET"
LEAST_CAPABILITY = (8, 0)
"""Of the GPUs that Triton supports, and that have the kernels' copies and products."""
FLOAT8_CAPABILITY = (8, 9)
"""Of those whose tensor cores multiply 8-bit floats."""
_TOKENS_AT_ONCE = 1 << 13
_ROWS_AT_ONCE = 32
_DENSE_ROWS = 256
_SUM_BLOCK = 1024
Launch = tuple[SplitSegment, plan.Case, Tensor | None]
"""A segment, what its product is compiled for, and which scale of its inputs each stretch takes."""
Planned = list[tuple[plan.Case, tuple[int, ...]]]
"""Of each segment, what its product of codes is compiled for, and the same numbers of scales."""
_INTERPRETED_PROCESSORS = 2
"""What splits are made for where there is no GPU: few, but some."""


def why_not(device: torch.device) -> str:
    """Why nothing can be launched for tensors of this device; "" when it can."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed: pip install 'quantlib-torch[triton]'"
    if device.type == "cuda":
        own, least = torch.cuda.get_device_capability(device), LEAST_CAPABILITY
        if own >= least:
            return ""
        return (
            f"Triton's kernels need compute capability {least[0]}.{least[1]}, and "
            f"{torch.cuda.get_device_name(device)} has {own[0]}.{own[1]}"
        )
    if device.type != "cpu" or not triton.knobs.runtime.interpret:
        return (
            "Triton's kernels run on NVIDIA GPUs, or on the CPU in its interpreter: set "
            f"{INTERPRET}=1 before Python starts"
        )
    return ""


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Where launches go: to the GPU that the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def interpreted() -> bool:
    """Whether kernels run in the interpreter."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def linear(
    x: Tensor,
    weight: SplitWeight,
    bias: Tensor | None = None,
    configuration: Configuration | None = None,
) -> Tensor:
    """x [M, K] (float16, bfloat16 or float32) times the transposed weight [N, K]: [M, N] in x's
    dtype; sums are float32.

    configuration: for all segments; None: from the GPU's table.
    """
    x = x.contiguous()
    given = x.float() if interpreted() and x.dtype == torch.bfloat16 else x
    cases = [plan.numbers(part.format, given.dtype) for part in weight.segments]
    launches: list[Launch] = [(part, case, None) for part, case in zip(weight.segments, cases)]
    out = _in_pieces(given, None, weight, launches, bias, x.dtype, configuration)
    return out.to(x.dtype)


def integer_linear(
    codes: Tensor,
    scales: Tensor,
    weight: SplitWeight,
    activations: Sequence[ActivationSegment],
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    configuration: Configuration | None = None,
) -> Tensor:
    """int8 codes [M, K] with float32 scales [M, G] of `activations` times the transposed weight
    [N, K]: [M, N] in `dtype`. Raises FormatError unless `integer_plan` has a plan."""
    planned = integer_plan(weight, tuple(activations))
    if planned is None:
        raise FormatError(
            "inputs whose scales change within 16 columns of a weight's segment have no integer "
            "kernel: multiply the rounded numbers"
        )
    return _coded_linear(codes, scales, weight, planned, bias, dtype, configuration)


def float8_linear(
    codes: Tensor,
    scales: Tensor,
    weight: SplitWeight,
    activations: Sequence[ActivationSegment],
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    configuration: Configuration | None = None,
) -> Tensor:
    """The same of codes of 8-bit floats (`formats.activation.quantize_float8`), which tensor cores
    multiply as they are. Raises FormatError unless `float8_plan` has a plan."""
    planned = float8_plan(weight, tuple(activations))
    if planned is None:
        raise FormatError(
            "the weight and its inputs are not both 8-bit floats of one kind, with scales for 32 "
            "columns or more: multiply the rounded numbers"
        )
    # Factors of rows are for operands that are read as float16; powers of two, so exact.
    unit = element_unit(weight.segments[0].format)
    bits = codes.view(torch.uint8)
    return _coded_linear(bits, scales / unit, weight, planned, bias, dtype, configuration)


def _coded_linear(
    codes: Tensor,
    scales: Tensor,
    weight: SplitWeight,
    planned: Planned,
    bias: Tensor | None,
    dtype: torch.dtype,
    configuration: Configuration | None,
) -> Tensor:
    device = codes.device
    launches: list[Launch] = [
        (part, case, _on_device(own, device)) for part, (case, own) in zip(weight.segments, planned)
    ]
    out = _in_pieces(
        codes.contiguous(), scales.contiguous(), weight, launches, bias, dtype, configuration
    )
    return out.to(dtype)


def integer_plan(weight: SplitWeight, activations: tuple[ActivationSegment, ...]) -> Planned | None:
    """What each segment's product of int8 codes is compiled for, None when one has none."""
    return _plan(_parts(weight), activations, plan.integers)


def float8_plan(weight: SplitWeight, activations: tuple[ActivationSegment, ...]) -> Planned | None:
    """The same for codes of 8-bit floats."""
    return _plan(_parts(weight), activations, plan.floats)


def has_float8(device: torch.device) -> bool:
    """Whether tensor cores of a device multiply 8-bit floats; the interpreter does."""
    if device.type != "cuda":
        return interpreted()
    return torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def _parts(weight: SplitWeight) -> tuple[tuple[Any, int, int], ...]:
    return tuple((part.format, part.start, part.length) for part in weight.segments)


@lru_cache(maxsize=1024)
def _plan(
    parts: tuple[tuple[Any, int, int], ...],
    activations: tuple[ActivationSegment, ...],
    of: Callable[..., tuple[plan.Case, tuple[int, ...]] | None],
) -> Planned | None:
    found = [of(*part, activations) for part in parts]
    known = [one for one in found if one is not None]
    return known if len(known) == len(found) else None


@lru_cache(maxsize=1024)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _in_pieces(
    x: Tensor,
    scales: Tensor | None,
    weight: SplitWeight,
    launches: list[Launch],
    bias: Tensor | None,
    dtype: torch.dtype,
    configuration: Configuration | None,
) -> Tensor:
    """The product, so many tokens at a time that partial sums fit the workspace."""
    tokens, rows = len(x), weight.shape[0]
    bfloat = dtype == torch.bfloat16 and interpreted()
    out = x.new_empty(tokens, rows, dtype=_written(dtype))
    if bias is not None and bfloat:
        bias = bias.float()
    room = workspace.BYTES // (4 * rows * len(launches))
    if room < 1:
        raise FormatError(f"a weight of {rows} rows is beyond what one launch can add up")
    at_once = min(room, _TOKENS_AT_ONCE)
    for first in range(0, tokens, at_once):
        piece = slice(first, first + at_once)
        own = None if scales is None else scales[piece]
        with on(x.device):
            _multiply(x[piece], own, weight, launches, bias, out[piece], configuration)
    return out


def _multiply(
    x: Tensor,
    scales: Tensor | None,
    weight: SplitWeight,
    launches: list[Launch],
    bias: Tensor | None,
    out: Tensor,
    configuration: Configuration | None,
) -> None:
    """All segments, and their sum when there are several parts to add."""
    from quantlib.kernels.triton import gemm

    tokens, rows = out.shape
    room = workspace.BYTES // (4 * tokens * rows)
    divided: list[tuple[Configuration, int]] = []
    for part, case, _ in launches:
        kind = configurations.KINDS[case.coded]
        shape = Shape(kind, case.bits, tokens, rows, part.length)
        chosen = configuration or _chosen(shape, x.device)
        wanted = configurations.splits(chosen, shape, part.tiles, _processors(x.device))
        splits = max(1, min(wanted, room // len(launches)))
        # No split without a tile of its own.
        divided.append((chosen, -(-part.tiles // -(-part.tiles // splits))))
    total = sum(splits for _, splits in divided)
    one = total == 1
    partial = out if one else workspace.partial_sums(x.device)[: total * tokens * rows]
    done = 0
    for (part, case, own), (chosen, splits) in zip(launches, divided):
        target = partial if one else partial[done * tokens * rows :]
        last = bias if one else None
        _launch(gemm.multiply, x, scales, own, part, case, chosen, splits, last, target, out.shape)
        done += splits
    if not one:
        size = tokens * rows
        gemm.add_parts[(-(-size // _SUM_BLOCK),)](
            partial, _or(bias, out), out, size, rows, total, BIAS=bias is not None, BLOCK=_SUM_BLOCK
        )


def _launch(
    kernel: Any,
    x: Tensor,
    scales: Tensor | None,
    own: Tensor | None,
    part: SplitSegment,
    case: plan.Case,
    chosen: Configuration,
    splits: int,
    bias: Tensor | None,
    out: Tensor,
    shape: torch.Size,
) -> None:
    tokens, rows = shape
    grid = (-(-rows // chosen.block_rows), -(-tokens // chosen.block_tokens), splits)
    kernel[grid](
        x,
        _or(scales, x),
        _or(own, x),
        part.codes,
        _or(part.scale, part.codes),
        _or(part.zero, part.codes),
        part.factors,
        _or(bias, x),
        out,
        tokens,
        rows,
        part.length,
        part.start,
        x.stride(0),
        0 if scales is None else scales.stride(0),
        part.tiles,
        -(-part.tiles // splits),
        part.format.zero_step,
        **constants(case),
        BIAS=bias is not None,
        BLOCK_ROWS=chosen.block_rows,
        BLOCK_TOKENS=chosen.block_tokens,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )


def constants(case: plan.Case) -> dict[str, Any]:
    """A case as `gemm.multiply` takes it."""
    return weight_constants(case) | {
        "FLUSH": case.flush,
        "CODED": case.coded,
        "COMPUTE": triton_dtype(case.compute),
    }


def weight_constants(case: plan.Case) -> dict[str, Any]:
    """What `rows.dequantize_rows` takes of it."""
    return {
        "BITS": case.bits,
        "MANTISSA": case.mantissa,
        "PARTS": case.parts,
        "DEPTH": case.depth,
        "GROUP": case.group,
        "SCALED": case.scaled,
        "ZEROS": case.zeros,
        "E8M0": case.e8m0,
    }


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a torch dtype."""
    import triton.language as tl

    name = str(dtype).removeprefix("torch.")
    return getattr(tl, {"float8_e4m3fn": "float8e4nv", "float8_e5m2": "float8e5"}.get(name, name))


def dequantize(
    weight: SplitWeight, dtype: torch.dtype = torch.float32, ids: Tensor | None = None
) -> Tensor:
    """The weight [N, K], or its rows `ids` (int64 [count]), in `dtype`. A number that is no row
    gives nan."""
    count = weight.shape[0] if ids is None else len(ids)
    device = weight.segments[0].codes.device
    out = torch.empty(count, weight.shape[1], dtype=_written(dtype), device=device)
    if count:
        _dequantize(weight, out, ids)
    return out.to(dtype)


def dense_linear(x: Tensor, weight: SplitWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times the transposed weight [N, K], by torch's own product: [M, N] in x's dtype.

    Each row of the weight becomes numbers of that dtype once, in the stream's workspace, so many
    rows at a time as fit it: for many tokens, which pay for that, without memory for a second
    weight. Raises FormatError when not one row fits.
    """
    rows, columns = weight.shape
    written = _written(x.dtype)
    room = workspace.BYTES // (written.itemsize * columns)
    if room < 1:
        raise FormatError(f"a weight of {columns} columns is beyond what one launch can hold")
    # Whole tiles of torch's product.
    at_once = min(rows, room // _DENSE_ROWS * _DENSE_ROWS or room)
    out = x.new_empty(len(x), rows)
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        numbers = workspace.partial_sums(x.device).view(written)[: count * columns]
        numbers = numbers.view(count, columns)
        _dequantize(weight, numbers, None, first)
        piece = slice(first, first + count)
        own = numbers.to(x.dtype).t()
        if bias is None:
            torch.mm(x, own, out=out[:, piece])
        else:
            torch.addmm(bias[piece].to(x.dtype), x, own, out=out[:, piece])
    return out


def _written(dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes that is asked for a dtype."""
    return torch.float32 if dtype == torch.bfloat16 and interpreted() else dtype


def _dequantize(weight: SplitWeight, out: Tensor, ids: Tensor | None, first: int = 0) -> None:
    """Rows `ids`, or those from `first` on, into all of out [count, K]."""
    from quantlib.kernels.triton import rows

    count, device = len(out), out.device
    for part in weight.segments:
        case = plan.numbers(part.format, torch.float32)
        with on(device):
            rows.dequantize_rows[(-(-count // _ROWS_AT_ONCE), part.tiles)](
                _or(ids, part.codes),
                part.codes,
                _or(part.scale, part.codes),
                _or(part.zero, part.codes),
                part.factors,
                out,
                first,
                count,
                weight.shape[0],
                part.length,
                part.start,
                out.stride(0),
                part.tiles,
                part.format.zero_step,
                **weight_constants(case),
                CHOSEN=ids is not None,
                BLOCK=_ROWS_AT_ONCE,
            )


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for an argument that the kernel does not read."""
    return other if tensor is None else tensor


@lru_cache(maxsize=4096)
def _chosen(shape: Shape, device: torch.device) -> Configuration:
    return configurations.choose(shape, _table(device))


@lru_cache(maxsize=16)
def _table(device: torch.device) -> configurations.Table:
    name = configurations.UNTUNED
    if device.type == "cuda" and not interpreted():
        name = torch.cuda.get_device_name(device)
    return configurations.table_for(name)


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
