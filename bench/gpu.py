"""How fast the packed linear runs on this GPU: quantlib's CUDA and Triton kernels beside torch,
Marlin, Machete (both of vLLM) and gemlite, where those are installed.

    python -P -m quantlib.bench.gpu [--quick] [--json]

Times are of the GPU alone (replayed CUDA graphs), with as many copies of each weight as its cache
cannot hold. Before anything is timed, its result is compared with torch's product of the very
weight that it packed: what is wrong is not measured, and said. Peers that are not there are named
with the reason. No result of this benchmark exists yet: it was written where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantlib.bench import record
from quantlib.cli.console import answers, notes, print_json, table
from quantlib.errors import FormatError, QuantlibError, UsageError
from quantlib.formats import Scheme, dequantize, pack, quantize_rtn
from quantlib.formats.activation import ActivationFormat, ActivationSegment
from quantlib.kernels import accelerated, dispatch
from quantlib.kernels.packed import PackedWeight, parse_layout
from quantlib.kernels.triton.tune import graph_time

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
"""[N, K]."""
TOKENS = (1, 8, 16, 64, 256, 2048)
SCHEMES = (
    *("w2g128", "w3g128", "w4g128", "w4g64z5s5", "w5g128", "w6g128", "w8g128", "mxfp4"),
    "w4g128:2of4",
)
OURS = {"cuda": dispatch.DECODE, "triton": dispatch.TRITON, "dequantized": dispatch.DENSE}
"""Our kernels by name -> what `dispatch` calls them."""
INTEGERS = {"cuda integers": dispatch.SEGMENTED, "integers": dispatch.TRITON}
"""Those of inputs in int8."""
PEER_SCHEME, PEER_BITS, PEER_GROUP = "w4g128", 4, 128
_BEYOND_CACHE = 256 << 20
_MOST_COPIES = 20
_CLOSE = 0.02
"""Of the largest result: 16-bit sums and scales stay far below, another layout far above."""

Call = Callable[[Tensor], Tensor]
"""x [M, K] -> [M, N]."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    shapes: Sequence[tuple[int, int]] = SHAPES
    schemes: Sequence[str] = SCHEMES
    tokens: Sequence[int] = TOKENS


QUICK = Plan(SHAPES[:1], ("w4g128",), (1, 16, 256))


def run(plan: Plan, device: torch.device) -> dict[str, Any]:
    """All rows, and who could not be measured and why."""
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for shape in plan.shapes:
        notes().print(f"{shape[0]} x {shape[1]}", style="dim")
        dense = torch.randn(shape, device=device, dtype=torch.float16)
        for scheme in plan.schemes:
            rows += _of_scheme(scheme, dense, plan.tokens, missing)
        for name, peer in PEERS.items():
            rows += _of_peer(name, peer, dense, plan.tokens, missing)
        copies = _copies(dense.nbytes)
        weights = [dense.clone() for _ in range(copies)]
        for tokens in plan.tokens:
            calls = [partial(torch.nn.functional.linear, weight=weight) for weight in weights]
            rows.append(_timed("torch", "f16", dense.nbytes, shape, tokens, calls))
    return {"gpu": torch.cuda.get_device_name(device), "missing": missing, "rows": rows}


def _of_scheme(
    scheme: str, dense: Tensor, tokens: Sequence[int], missing: dict[str, str]
) -> list[dict[str, Any]]:
    shape = (dense.shape[0], dense.shape[1])
    segments = Scheme.parse(scheme).segments(shape[1])
    weight = quantize_rtn(dense.float(), segments)
    reference = dequantize(weight, torch.float16)
    packed = [
        PackedWeight.from_tensors(pack(weight), shape, segments)
        for _ in range(_copies(dense.nbytes // 4))
    ]
    rows = []
    # Only one kernel reads pruned weights without their zeros.
    for name in ("cuda",) if segments[0].format.sparse else (*OURS, *INTEGERS):
        calls = [_ours(name, one) for one in packed]
        for count in tokens:
            why = _why_not(name, scheme, packed[0].layout, count, dense.device)
            if not why:
                why = _wrong(calls[0], reference, count)
            if why:
                missing[f"quantlib {name}, {scheme}, {count} tokens"] = why
                continue
            rows.append(_timed(f"quantlib {name}", scheme, packed[0].nbytes, shape, count, calls))
    return rows


def _ours(name: str, weight: PackedWeight) -> Call:
    tensors, layout = list(weight.tensors.values()), weight.layout
    if name in INTEGERS:
        kernel, rounding = INTEGERS[name], _int8(weight.shape[1])
        return lambda x: accelerated.multiply_rounded(kernel, x, tensors, layout, None, rounding)
    return lambda x: accelerated.multiply(OURS[name], x, tensors, layout, None)


def _int8(columns: int) -> tuple[ActivationSegment, ...]:
    return (ActivationSegment(0, columns, ActivationFormat(8)),)


def _why_not(name: str, scheme: str, layout: str, tokens: int, device: torch.device) -> str:
    machine = dispatch.machine(device)
    if name in ("cuda", "cuda integers"):
        rounding = _int8(parse_layout(layout)[0][1]) if name in INTEGERS else ()
        product = dispatch.Product(tokens, torch.float16, layout, rounding)
        if dispatch.cuda_kernel(product) is None:
            return f"the CUDA kernel does not take {scheme}"
        many = tokens > dispatch.FEW_TOKENS and not rounding
        return machine.cuda or ("too many tokens" if many else "")
    return machine.triton


def _of_peer(
    name: str, prepare: Callable[[Tensor], Peer], dense: Tensor, tokens: Sequence[int],
    missing: dict[str, str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of a peer. Whatever it raises is why it was not measured: its interface is its own."""
    shape = (dense.shape[0], dense.shape[1])
    label = f"{name}, {shape[0]}x{shape[1]}"
    try:
        made = [prepare(dense) for _ in range(_copies(dense.nbytes // 4))]
    except Exception as error:
        missing[label] = f"{type(error).__name__}: {error}"
        return []
    rows = []
    for count in tokens:
        try:
            if why := _wrong(made[0].call, made[0].weight, count):
                raise FormatError(why)
            calls = [one.call for one in made]
            rows.append(_timed(name, PEER_SCHEME, made[0].nbytes, shape, count, calls))
        except Exception as error:
            missing[f"{label}, {count} tokens"] = f"{type(error).__name__}: {error}"
    return rows


def _wrong(call: Call, weight: Tensor, tokens: int) -> str:
    """Why a result is not the product with the weight [N, K]; "" when it is."""
    x = torch.randn(tokens, weight.shape[1], device=weight.device, dtype=torch.float16)
    wanted = torch.nn.functional.linear(x.float(), weight.float())
    error = float((call(x).float() - wanted).abs().max() / wanted.abs().max())
    return "" if error <= _CLOSE else f"its result is off by {error:.3g} of the largest number"


def _timed(
    name: str, scheme: str, nbytes: int, shape: tuple[int, int], tokens: int, calls: Sequence[Call]
) -> dict[str, Any]:
    x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
    microseconds = graph_time([partial(call, x) for call in calls])
    return {
        "name": name,
        "scheme": scheme,
        "N": shape[0],
        "K": shape[1],
        "M": tokens,
        "microseconds": microseconds,
        "bytes": nbytes,
        "gb_per_s": nbytes / microseconds / 1e3,
        "tflops": 2e-6 * tokens * shape[0] * shape[1] / microseconds,
    }


def _copies(nbytes: int) -> int:
    return max(1, min(_MOST_COPIES, -(-_BEYOND_CACHE // nbytes)))


@dataclass(frozen=True)
class Peer:
    """Somebody else's linear. weight: what its codes stand for, float16 [N, K]."""

    call: Call
    weight: Tensor
    nbytes: int


def marlin(dense: Tensor) -> Peer:
    """vLLM's Marlin, 4 bits in groups of 128."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils as utils
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    reference, codes, scales, g_idx, order, _ = marlin_quantize(
        dense.t().contiguous(), kind, PEER_GROUP, False
    )
    workspace = utils.marlin_make_workspace_new(dense.device)
    none = utils.marlin_make_empty_g_idx(dense.device)

    def call(x: Tensor) -> Tensor:
        out: Tensor = utils.apply_gptq_marlin_linear(
            input=x,
            weight=codes,
            weight_scale=scales,
            weight_zp=none,
            g_idx=g_idx,
            g_idx_sort_indices=order,
            workspace=workspace,
            wtype=kind,
            output_size_per_partition=dense.shape[0],
            input_size_per_partition=dense.shape[1],
            is_k_full=True,
        )
        return out

    return Peer(call, reference.t(), codes.nbytes + scales.nbytes)


def machete(dense: Tensor) -> Peer:
    """vLLM's Machete, 4 bits in groups of 128."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import quant_utils as utils
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    reference, codes, scales, _ = utils.quantize_weights(
        dense.t().contiguous(), kind, group_size=PEER_GROUP, zero_points=False
    )
    rows = utils.pack_rows(codes, PEER_BITS, *codes.shape)
    packed = ops.machete_prepack_B(rows.t().contiguous().t(), dense.dtype, kind, scales.dtype)

    def call(x: Tensor) -> Tensor:
        out: Tensor = ops.machete_mm(
            a=x,
            b_q=packed,
            b_type=kind,
            b_group_scales=scales,
            b_group_size=PEER_GROUP,
            out_type=x.dtype,
        )
        return out

    return Peer(call, reference.t(), packed.nbytes + scales.nbytes)


def gemlite(dense: Tensor) -> Peer:
    """gemlite, 4 bits in groups of 128."""
    from gemlite.core import DType, GemLiteLinear

    rows, columns = dense.shape
    segments = Scheme.parse(f"{PEER_SCHEME}z").segments(columns)
    weight = quantize_rtn(dense.float(), segments)
    part = weight.segments[0]
    assert part.zero is not None
    layer = GemLiteLinear(
        PEER_BITS,
        group_size=PEER_GROUP,
        in_features=columns,
        out_features=rows,
        input_dtype=DType.FP16,
        output_dtype=DType.FP16,
    )
    layer.pack(part.codes, part.scale, part.zero.to(torch.float16), None)
    nbytes = rows * columns * PEER_BITS // 8 + part.scale.nbytes + 2 * part.zero.numel()
    return Peer(layer, dequantize(weight, torch.float16), nbytes)


PEERS: Mapping[str, Callable[[Tensor], Peer]] = {
    "marlin": marlin,
    "machete": machete,
    "gemlite": gemlite,
}


def _cells(row: Mapping[str, Any], torch_time: float | None) -> list[str]:
    ratio = "" if torch_time is None else f"{torch_time / row['microseconds']:.2f}"
    return [
        f"{row['N']} x {row['K']}",
        str(row["M"]),
        row["name"],
        row["scheme"],
        f"{row['microseconds']:.1f}",
        f"{row['gb_per_s']:.0f}",
        f"{row['tflops']:.1f}",
        ratio,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and (without --quick) keep the result. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one shape; nothing is kept")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    given = parser.parse_args(arguments)
    try:
        if not torch.cuda.is_available():
            raise UsageError("this benchmark needs an NVIDIA GPU: run it on a machine that has one")
        found = run(QUICK if given.quick else Plan(), torch.device("cuda", 0))
    except QuantlibError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if given.json:
        print_json(found)
    else:
        plain = {
            (row["N"], row["K"], row["M"]): row["microseconds"]
            for row in found["rows"]
            if row["name"] == "torch"
        }
        titles = ("N x K", "M", "kernel", "scheme", "us", "GB/s", "TFLOPS", "torch / it")
        cells = [_cells(row, plain.get((row["N"], row["K"], row["M"]))) for row in found["rows"]]
        answers().print(table(*titles, rows=cells, numbers_from=4))
        for name, reason in found["missing"].items():
            answers().print(f"not measured: {name}: {reason}", style="yellow", markup=False)
    if not given.quick:
        notes().print(str(record.write("gpu", found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
