"""What the decode kernel can reach on GPUs that are not here: a model, printed as *predicted*.

    python -m quantlib.bench.roofline [--bits 4] [--group 128] [--tokens 1 16 64] [--gpus A10 ...]
        [--sparse] [--keep]

A launch takes at least as long as each of three things: reading the weight, inputs and outputs once
at the GPU's bandwidth; its matrix products at the tensor cores' rate; and issuing its instructions,
four a cycle and multiprocessor. All three are counted, the last two in the machine code that nvcc
makes of this very kernel. The prediction is the longest of them: no launch, no first wait for
memory, no ragged end is in it, so a GPU will be slower. Nothing here was measured.

--keep writes them down as predictions (`results/roofline.json`, `roofline_sparse.json`).

Needs nvcc and nvdisasm (`make kernel-tools` installs them), no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quantlib.bench import record
from quantlib.errors import UsageError
from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda import cubins, decode
from quantlib.kernels.cuda.layout import STRIP_ROWS

SCHEDULERS = 4
"""Of a multiprocessor, each issuing one instruction of one warp in a cycle."""
_PRODUCT_OPERATIONS = 2 * 16 * 8 * 16
"""Of a matrix instruction, as dense ones count them: a sparse one, of 32 columns of which half are
kept, takes the same time."""


@dataclass(frozen=True)
class Gpu:
    """Limits from the maker's data sheets: dense 16-bit products with float32 sums.

    warp_share: what of the tensor cores' rate warp-wide instructions (mma.sync) reach; None where
    it is not known.
    """

    architecture: int
    multiprocessors: int
    ghz: float
    gb_per_s: float
    tflops: float
    warp_share: float | None = 1.0


# From Hopper on, the full rate needs instructions of four warps: about three quarters are left, by
# the authors of Machete. For Blackwell nobody has said.
GPUS = {
    "A10": Gpu(86, 72, 1.695, 600, 125),
    "A100": Gpu(80, 108, 1.41, 2039, 312),
    "L40S": Gpu(89, 142, 2.52, 864, 362),
    "RTX4090": Gpu(89, 128, 2.52, 1008, 165),
    "H100": Gpu(90, 132, 1.98, 3350, 989, 0.75),
    "H200": Gpu(90, 132, 1.98, 4800, 989, 0.75),
    "B200": Gpu(100, 148, 1.85, 8000, 2250, None),
}
SHAPES = ((4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336))
"""Rows and columns of the linears of an 8B model."""


@dataclass(frozen=True)
class Prediction:
    """Microseconds that each limit allows; None: that limit is not known."""

    memory: float
    products: float | None
    issue: float

    @property
    def total(self) -> float:
        """The longest."""
        return max(self.memory, self.products or 0.0, self.issue)

    @property
    def of_bandwidth(self) -> float:
        """Which part of the bandwidth is used then."""
        return self.memory / self.total


def moved_bytes(rows: int, columns: int, bits: float, group: int, tokens: int) -> float:
    """What a launch must read and write: codes, float16 scales of groups (0: none), float32 factors
    of rows, inputs and outputs."""
    weight = rows * columns * bits / 8 + (rows * -(-columns // group) * 2 if group else 0)
    return weight + rows * 4 + 2 * tokens * (rows + columns)


def predict(
    gpu: Gpu, compiled: cubins.Compiled, rows: int, columns: int, moved: float
) -> Prediction:
    """Limits of a launch of a compiled kernel on a weight [rows, columns]."""
    strips = -(-rows // STRIP_ROWS) * -(-columns // compiled.columns)
    operations = strips * compiled.products * _PRODUCT_OPERATIONS
    products = None
    if gpu.warp_share is not None:
        products = operations / (gpu.tflops * gpu.warp_share * 1e6)
    slots = gpu.multiprocessors * SCHEDULERS * gpu.ghz * 1e3  # in a microsecond
    return Prediction(moved / (gpu.gb_per_s * 1e3), products, strips * compiled.issued / slots)


def chosen(names: Sequence[str]) -> dict[str, Gpu]:
    """GPUs by name. Raises UsageError for one that the table lacks."""
    if unknown := sorted(set(names) - set(GPUS)):
        raise UsageError(f"nothing is known of {', '.join(unknown)}: one of {', '.join(GPUS)}")
    return {name: GPUS[name] for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description="Predict the decode kernel's speed on GPUs.")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128, choices=(0, 64, 128, 256))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--gpus", nargs="+", default=list(GPUS))
    parser.add_argument("--sparse", action="store_true", help="two of every four columns are kept")
    parser.add_argument("--keep", action="store_true", help="write the predictions down")
    given = parser.parse_args(arguments)
    form = f"w{given.bits}{' 2:4' if given.sparse else ''}"
    print(f"predicted, not measured: {form}, groups of {given.group or 'a row'}, fp16 inputs")
    print(f"{'GPU':8} {'tokens':>6} {'shape':>12} {'us':>8} {'of bandwidth':>12}  limits (us)")
    rows = []
    try:
        for name, gpu in chosen(given.gpus).items():
            for tokens in given.tokens:
                _, compiled = cubins.build(_case(given, tokens), gpu.architecture)
                # Kept codes and the places of their columns, two bits each, are half of all.
                bits = (given.bits + 2) / 2 if given.sparse else given.bits
                for shape in SHAPES:
                    moved = moved_bytes(*shape, bits, given.group, tokens)
                    found = predict(gpu, compiled, *shape, moved)
                    print(_line(name, tokens, shape, found))
                    rows.append(_row(name, tokens, shape, found, compiled))
    except (BuildError, UsageError) as error:
        print(error, file=sys.stderr)
        return 1
    if given.keep:
        file = "roofline_sparse" if given.sparse else "roofline"
        print(record.write(file, {"predicted, not measured": rows, "scheme": form}))
    return 0


def _case(given: argparse.Namespace, tokens: int) -> decode.DecodeCase:
    tiles = next(t for t in decode.TOKEN_TILES if t * decode.TOKEN_TILE >= tokens)
    period = min(given.group // (32 if given.sparse else 16), 4)
    return decode.DecodeCase(
        given.bits, torch.float16, tiles, period, zeros=False, sparse=given.sparse
    )


def _row(
    name: str, tokens: int, shape: tuple[int, int], found: Prediction, compiled: cubins.Compiled
) -> dict[str, Any]:
    return {
        "gpu": name,
        "M": tokens,
        "N": shape[0],
        "K": shape[1],
        "microseconds": asdict(found),
        "of_bandwidth": found.of_bandwidth,
        "registers": compiled.registers,
        "arithmetic_per_product": compiled.arithmetic / compiled.products,
    }


def _line(name: str, tokens: int, shape: tuple[int, int], found: Prediction) -> str:
    products = "unknown" if found.products is None else f"{found.products:.1f}"
    limits = f"memory {found.memory:.1f}, products {products}, issue {found.issue:.1f}"
    size = f"{shape[0]}x{shape[1]}"
    return f"{name:8} {tokens:6} {size:>12} {found.total:8.1f} {found.of_bandwidth:12.0%}  {limits}"


if __name__ == "__main__":
    sys.exit(main())
