"""OpenVINO with compressed weights: constants of 4 or 8 bits, decompressed by the graph, which its
CPU plugin fuses into the matrix product. Defaults for low latency, and the faster precision.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quantlib.bench.peers.linear import Bind, PeerMissing, copies, optional
from quantlib.bench.timing import Candidate

_GROUP = 128
_PRECISION = {4: {"INFERENCE_PRECISION_HINT": "f32"}}
"""With it, inputs of 4-bit weights are rounded to int8 and multiplied in integers; the default on
processors with bfloat16 is slower there, and faster for 8 bits."""


def prepare(bits: int, rows: int, columns: int) -> Bind:
    """See `LinearPeer`. 4 bits in groups of 128 (64 where 128 does not divide K), 8 per channel."""
    runtime = optional("openvino")
    core = runtime.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        **_PRECISION.get(bits, {}),
    }
    model = _model(runtime, bits, rows, columns)

    def compiled() -> Any:
        return core.compile_model(model, "CPU", settings).create_infer_request()

    requests = copies(compiled, rows * columns * bits // 8)

    def bind(tokens: int) -> Candidate:
        x = runtime.Tensor(np.random.default_rng(0).standard_normal((tokens, columns), np.float32))
        for request in requests:
            request.set_input_tensor(x)
            request.infer()  # the first one with a number of tokens packs the weight: not timed
        return lambda index: requests[index % len(requests)].infer()

    return bind


def _model(runtime: Any, bits: int, rows: int, columns: int) -> Any:
    """x [M, K] float32 -> y [M, N]: MatMul(x, Reshape(Convert(codes) * scales)), random numbers."""
    ops = optional("openvino", "openvino.opset13")
    group = columns if bits == 8 else next((g for g in (_GROUP, 64) if columns % g == 0), 0)
    if not group:
        raise PeerMissing(f"openvino: neither 128 nor 64 divides K = {columns}")
    random = np.random.default_rng(0)
    kind = runtime.Type.i4 if bits == 4 else runtime.Type.i8
    # The tensor owns its memory: a constant made of one that borrows an array's would outlive it.
    stored = runtime.Tensor(kind, runtime.Shape([rows, columns // group, group]))
    stored.data.reshape(-1).view(np.uint8)[:] = random.integers(
        0, 256, rows * columns * bits // 8, np.uint8
    )
    codes = runtime.op.Constant(stored)
    scales = ops.constant(random.random((rows, columns // group, 1)).astype(np.float16))
    weight = ops.multiply(ops.convert(codes, "f16"), scales)
    flat = ops.reshape(weight, ops.constant(np.array([rows, columns])), special_zero=False)
    x = ops.parameter([-1, columns], np.float32, name="x")
    y = ops.matmul(x, ops.convert(flat, "f32"), transpose_a=False, transpose_b=True)
    return runtime.Model([y], [x], "linear")
