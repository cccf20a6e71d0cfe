"""Tables of configurations for GPUs that are not here, from a model of speed: predicted.

    python -P -m quantlib.bench.triton_tables [--gpus A100 H100 ...]

One file for each GPU of `roofline.GPUS`, in `kernels/triton/tables/`. For every shape the model
takes that one of the untuned configurations, which are compiled and looked at for every
architecture (`kernels/triton/ahead.py`), and that number of splits along K, which would be done
first. Nothing in them was measured, and a tuned table goes before them (`kernels/triton/tune.py`).

The model: programs are dealt out to multiprocessors evenly; each is as long as reading its tiles at
its share of the bandwidth, or its products at its share of the tensor cores' rate, whichever is
longer. A multiprocessor reads at its full share only while enough bytes are on their way: the
stages of the programs that its shared memory holds. Splits add their partial sums, written and read
once, and a second launch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import product

from quantlib.bench.roofline import GPUS, Gpu, chosen
from quantlib.errors import UsageError
from quantlib.kernels.cuda.decode import RESERVED_SHARED, SHARED_KB
from quantlib.kernels.triton import configurations, layout, tune
from quantlib.kernels.triton.configurations import Configuration, Shape

NAMES = {name: name.lower() for name in GPUS} | {"RTX4090": "rtx-4090"}
"""Of the files: words of the name that the driver gives a GPU."""
TOKENS = (1, 16, 32, 64, 256)
BITS = (2, 4, 8)
SIZES = ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336))
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_WAIT = 0.8e-6
"""Seconds from asking for memory to having it, on a busy GPU: what must be on its way meanwhile."""
_LAUNCH = 2e-6
"""Seconds of another launch behind the first."""
_MOST_WARPS = 48
"""Of a multiprocessor: the least among the architectures."""


def seconds(gpu: Gpu, shape: Shape, own: Configuration) -> float:
    """What the model says of a product in a configuration whose splits are given."""
    tiles = -(-shape.columns // layout.TILE)
    each = -(-tiles // own.splits)
    programs = -(-shape.rows // own.block_rows) * -(-shape.tokens // own.block_tokens) * own.splits
    rounds = -(-programs // gpu.multiprocessors)
    stage = tune.stage_bytes(shape, own)
    room = SHARED_KB[gpu.architecture] * 1024 // (own.stages * stage + RESERVED_SHARED)
    together = max(1, min(room, _MOST_WARPS // own.warps))
    share = gpu.gb_per_s * 1e9 / gpu.multiprocessors
    on_their_way = min(together, rounds) * (own.stages - 1) * stage
    reading = rounds * each * stage / (share * min(1.0, on_their_way / (share * _WAIT)))
    rate = gpu.tflops * 1e12 / gpu.multiprocessors * (2 if shape.kind == "integers" else 1)
    operations = 2 * own.block_rows * own.block_tokens * layout.TILE
    multiplying = rounds * each * operations / rate
    if own.splits == 1:
        return max(reading, multiplying)
    sums = 2 * 4 * own.splits * shape.tokens * shape.rows / (gpu.gb_per_s * 1e9)
    return max(reading, multiplying) + sums + _LAUNCH


def best(gpu: Gpu, shape: Shape, table: configurations.Table) -> Configuration:
    """Of the configurations of the nearest width, in all splits, the first to be done; of equals,
    the one with fewer splits."""
    own = [row for row in table if row[0].kind == shape.kind]
    near = min({known.bits for known, _ in own}, key=lambda bits: abs(bits - shape.bits))
    tiles = -(-shape.columns // layout.TILE)
    candidates = [
        Configuration(one.block_rows, one.block_tokens, one.warps, one.stages, splits)
        for splits, (known, one) in product(SPLITS, own)
        if known.bits == near and splits <= tiles
    ]
    return min(candidates, key=lambda one: seconds(gpu, shape, one))


def rows(gpu: Gpu) -> Iterator[tuple[Shape, Configuration, None]]:
    """A GPU's table; nothing was measured."""
    table = configurations.read(configurations.TABLES / f"{configurations.UNTUNED}.json")
    for kind, bits, (size, columns), tokens in product(configurations.KINDS, BITS, SIZES, TOKENS):
        shape = Shape(kind, bits, tokens, size, columns)
        yield shape, best(gpu, shape, table), None


def text(gpu: Gpu) -> str:
    """A GPU's file: one row a line."""
    found = configurations.to_json(list(rows(gpu)))["rows"]
    lines = ",\n".join("  " + json.dumps(row) for row in found)
    origin = "predicted by bench/triton_tables.py, not measured"
    return f'{{\n "origin": "{origin}",\n "rows": [\n{lines}\n ]\n}}\n'


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description="Predict configurations of Triton's products.")
    parser.add_argument("--gpus", nargs="+", default=list(GPUS))
    given = parser.parse_args(arguments)
    try:
        for name, gpu in chosen(given.gpus).items():
            path = configurations.TABLES / f"{NAMES[name]}.json"
            path.write_text(text(gpu), encoding="utf-8")
            print(path.name)
    except UsageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
