"""Peers of one linear layer y = x W^T, and what each needs to take part in a timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TypeVar

from quantlib.bench.timing import Candidate
from quantlib.errors import QuantlibError
from quantlib.kernels.cpu.stopwatch import footprint

MAX_COPIES = 256
"""Bounds the time that setting up small weights takes."""

Bind = Callable[[int], Candidate]
"""Number of tokens M -> a candidate that multiplies M rows with the i-th copy of the weight."""
T = TypeVar("T")


class PeerMissing(QuantlibError):
    """This peer cannot be measured here, and why. Not a failure of the benchmark."""


@dataclass(frozen=True)
class LinearPeer:
    """A way to multiply with a weight [N, K] whose numbers do not matter for speed.

    bits:    of a weight, scales not counted.
    prepare: (N, K) -> Bind; raises PeerMissing.
    """

    name: str
    bits: int
    prepare: Callable[[int, int], Bind]


def copies(make: Callable[[], T], nbytes: int) -> list[T]:
    """As many copies of something of `nbytes` as exceed the caches, so that weights come from
    memory as they do when a model is decoded."""
    return [make() for _ in range(max(1, min(MAX_COPIES, -(-footprint() // nbytes))))]


def optional(package: str, name: str | None = None) -> ModuleType:
    """Import an optional package. Raises PeerMissing, naming `make peers`, when it is not there or
    broken."""
    import importlib

    try:
        return importlib.import_module(name or package)
    except Exception as error:  # a broken binary package raises whatever it likes
        reason = " ".join(str(error).split())
        raise PeerMissing(f"{package} cannot be imported ({reason}): run `make peers`") from error


def peers() -> list[LinearPeer]:
    """All of them, in the order of a table."""
    from quantlib.bench.peers import onnx_matmul, openvino_matmul, torch_dense, torch_int4pack

    return [
        LinearPeer("onnxruntime int4 b32", 4, partial(onnx_matmul.prepare, 32)),
        LinearPeer("onnxruntime int4 b128", 4, partial(onnx_matmul.prepare, 128)),
        LinearPeer("torch int4pack", 4, torch_int4pack.prepare),
        LinearPeer("openvino int4 g128", 4, partial(openvino_matmul.prepare, 4)),
        LinearPeer("openvino int8", 8, partial(openvino_matmul.prepare, 8)),
        LinearPeer("torch bfloat16", 16, partial(torch_dense.prepare, "bfloat16")),
        LinearPeer("torch float32", 32, partial(torch_dense.prepare, "float32")),
    ]
