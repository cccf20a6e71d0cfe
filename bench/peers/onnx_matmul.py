"""onnxruntime's MatMulNBits: symmetric int4 in blocks, activations rounded to int8 (accuracy level
4, without which it multiplies in float32 and is far slower).

Every copy of the weight is a session, and all sessions share one pool of threads: with a pool each,
a call would find its threads asleep.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from quantlib.bench.peers.linear import Bind, copies, optional
from quantlib.bench.timing import Candidate

_ACCURACY_INT8 = 4


@cache
def _runtime() -> Any:
    """onnxruntime with its shared pool made: that must happen before the first session."""
    runtime = optional("onnxruntime")
    runtime.set_default_logger_severity(4)
    runtime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    return runtime


def prepare(block: int, rows: int, columns: int) -> Bind:
    """See `LinearPeer`. block: weights that share a float32 scale; a last one may be padded."""
    runtime, model = _runtime(), _model(block, rows, columns)
    options = runtime.SessionOptions()
    options.use_per_session_threads = False

    def session() -> Any:
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    sessions = copies(session, rows * columns // 2)

    def bind(tokens: int) -> Candidate:
        x = np.random.default_rng(0).standard_normal((tokens, columns), np.float32)
        bound = [_bound(runtime, each, x, rows) for each in sessions]

        def run(index: int) -> None:
            each = index % len(sessions)
            sessions[each].run_with_iobinding(bound[each])

        return run

    return bind


def _bound(runtime: Any, session: Any, x: Any, rows: int) -> Any:
    """Input and output of a session in place, so that a call allocates nothing."""
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", runtime.OrtValue.ortvalue_from_numpy(x))
    y = np.empty((len(x), rows), np.float32)
    binding.bind_ortvalue_output("y", runtime.OrtValue.ortvalue_from_numpy(y))
    return binding


def _model(block: int, rows: int, columns: int) -> bytes:
    """An ONNX model of one node, with random codes and scales."""
    onnx = optional("onnx")
    helper, tensor_type = onnx.helper, onnx.TensorProto.FLOAT
    random = np.random.default_rng(0)
    blocks = -(-columns // block)
    codes = random.integers(0, 256, (rows, blocks, block // 2), np.uint8)
    scales = random.random(rows * blocks, np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=4, block_size=block, accuracy_level=_ACCURACY_INT8,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", tensor_type, ["M", columns])],
        [helper.make_tensor_value_info("y", tensor_type, ["M", rows])],
        [
            onnx.numpy_helper.from_array(codes, "codes"),
            onnx.numpy_helper.from_array(scales, "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model
