"""Measures configurations of the products on this GPU and keeps the fastest.

    python -P -m quantlib.kernels.triton.tune [--shapes 4096x4096 14336x4096] [--bits 4 8]

Only what can win is tried: blocks as wide as the tokens need, stages that fit the shared memory,
and splits around those that fill the GPU. The table goes to the user's cache under the GPU's name,
where `configurations.table_for` finds it. Times are medians of replayed CUDA graphs. None has been
measured yet: this was written without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from quantlib.errors import QuantlibError, UsageError
from quantlib.formats.activation import ActivationFormat, ActivationSegment
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.kernels.cuda.decode import RESERVED_SHARED, SHARED_KB
from quantlib.kernels.triton import configurations, launch, layout
from quantlib.kernels.triton.configurations import Configuration, Shape

TOKENS = (1, 16, 32, 64, 256)
SHAPES = ("4096x4096", "14336x4096", "4096x14336")
BITS = (2, 3, 4, 6, 8)
_ROUNDS, _CALLS = 7, 20
_BEYOND_CACHE = 256 << 20
"""Bytes: more than twice the second-level cache of any GPU there is a kernel for."""
_SHARED_OF_ALL = 48 << 10
"""Bytes that every GPU has for a block."""

Measure = Callable[[Shape, Configuration], float]
"""Microseconds of a product in a configuration. Raises anything when it cannot be run."""
Row = tuple[Shape, Configuration, float | None]


def stage_bytes(shape: Shape, configuration: Configuration) -> int:
    """Of shared memory, for one tile of 128 columns: codes and inputs."""
    each = 1 if shape.kind == "integers" else 2
    codes = configuration.block_rows * 16 * shape.bits
    return codes + configuration.block_tokens * 128 * each


def candidates(shape: Shape, shared_bytes: int, processors: int) -> list[Configuration]:
    """What is worth measuring for a product, on a GPU with so much shared memory for a block and so
    many multiprocessors."""
    wanted = min(128, max(16, 1 << (shape.tokens - 1).bit_length()))
    tokens = {wanted, 64} if wanted > 64 else {wanted}
    tiles = -(-shape.columns // layout.TILE)
    found: dict[Configuration, None] = {}
    for block_tokens in sorted(tokens):
        for block_rows, warps in ((64, 4), (128, 4), (128, 8)):
            for stages in (3, 4, 5):
                own = Configuration(block_rows, block_tokens, warps, stages)
                if stages * stage_bytes(shape, own) > shared_bytes:
                    continue
                usual = configurations.splits(own, shape, tiles, processors)
                for splits in {1, usual, min(2 * usual, tiles)}:
                    found[Configuration(block_rows, block_tokens, warps, stages, splits)] = None
    return list(found)


def tune(
    shapes: Sequence[Shape], measure: Measure, shared_bytes: int, processors: int
) -> list[Row]:
    """The fastest configuration of each shape, with its microseconds.

    Those that cannot be run are passed over. Raises UsageError when none of a shape's can.
    """
    rows: list[Row] = []
    for shape in shapes:
        times: dict[Configuration, float] = {}
        last: Exception | None = None
        for one in candidates(shape, shared_bytes, processors):
            try:
                times[one] = measure(shape, one)
            except Exception as error:  # a compiler's or a driver's: another one may run
                last = error
        if not times:
            raise UsageError(f"no configuration runs {shape}: {last}")
        best = min(times, key=lambda one: times[one])
        rows.append((shape, best, times[best]))
    return rows


class OnGpu:
    """Measures on the current GPU. Weights are random, and kept for a shape; there are as many of
    them as do not fit the cache, so that each call reads its own from memory."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[int, int, int], list[layout.SplitWeight]] | None = None

    def __call__(self, shape: Shape, configuration: Configuration) -> float:
        """See `Measure`."""
        weights = self._weights(shape)
        if shape.kind == "numbers":
            x = torch.randn(shape.tokens, shape.columns, device="cuda", dtype=torch.float16)
            return graph_time(
                [partial(launch.linear, x, one, None, configuration) for one in weights]
            )
        rounding = (ActivationSegment(0, shape.columns, ActivationFormat(8)),)
        size = (shape.tokens, shape.columns)
        codes = torch.randint(-127, 128, size, device="cuda").to(torch.int8)
        scales = torch.ones(shape.tokens, 1, device="cuda")
        rest = (rounding, None, torch.float16, configuration)
        return graph_time(
            [partial(launch.integer_linear, codes, scales, one, *rest) for one in weights]
        )

    def _weights(self, shape: Shape) -> list[layout.SplitWeight]:
        key = (shape.bits, shape.rows, shape.columns)
        if self._kept is None or self._kept[0] != key:
            segments = Scheme.parse(f"w{shape.bits}g128").segments(shape.columns)
            dense = torch.randn(shape.rows, shape.columns, device="cuda")
            first = layout.pack(quantize_rtn(dense, segments))
            self._kept = key, copies(first, first.nbytes)
        return self._kept[1]


def copies(weight: layout.SplitWeight, nbytes: int) -> list[layout.SplitWeight]:
    """A weight as often as the cache cannot hold it."""
    count = min(_CALLS, -(-_BEYOND_CACHE // nbytes))
    return [weight, *(copy.deepcopy(weight) for _ in range(count - 1))]


def graph_time(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of a call on the GPU, without the host's: the median of replayed graphs, in
    which the calls follow each other."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    often = -(-_CALLS // len(calls))
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(often):
            for call in calls:
                call()
    times = []
    for _ in range(_ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / (often * len(calls)))
    return statistics.median(times)


def _shared_bytes() -> int:
    """Of shared memory that a block may have, on the current GPU."""
    capability = torch.cuda.get_device_capability()
    known = SHARED_KB.get(10 * capability[0] + capability[1])
    return (known << 10) - RESERVED_SHARED if known else _SHARED_OF_ALL


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description="Measure configurations on this GPU.")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NxK")
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    given = parser.parse_args(arguments)
    try:
        if not torch.cuda.is_available():
            raise UsageError("tuning needs an NVIDIA GPU: run it on the machine that has one")
        sizes = [tuple(int(part) for part in text.split("x")) for text in given.shapes]
        shapes = [
            Shape(kind, bits, tokens, rows, columns)
            for kind in configurations.KINDS
            for bits in given.bits
            for rows, columns in sizes
            for tokens in given.tokens
        ]
        device = torch.cuda.get_device_properties(torch.device("cuda"))
        rows = tune(shapes, OnGpu(), _shared_bytes(), device.multi_processor_count)
    except QuantlibError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    folder = configurations.user_tables()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{configurations.slug(device.name)}.json"
    path.write_text(json.dumps(configurations.to_json(rows), indent=1) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
