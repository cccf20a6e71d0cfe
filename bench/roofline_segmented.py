"""What the segmented integer kernel can reach on GPUs that are not here: a model, printed as
*predicted*.

    python -m quantlib.bench.roofline_segmented [--schemes w4a4h8/8 ...] [--tokens 1 4096] [--keep]

A launch takes at least as long as each of four things: reading the weight, tokens and outputs once;
its matrix products at the tensor cores' rate for bytes and for nibbles; issuing its instructions,
four a cycle and multiprocessor; and moving operands through shared memory, 128 bytes a cycle.
Products and instructions are counted in the machine code that nvcc makes of each segment's loop.
The prediction is the longest of them: no launch, no first wait for memory, no second reading is in
it, so a GPU will be slower. It is compared with an fp16 product limited by reading or by the full
rate of the tensor cores, which no library reaches either. Nothing here was measured.

--keep writes them down as predictions (`results/roofline_segmented.json`).

Needs nvcc and nvdisasm (`make kernel-tools` installs them), no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from quantlib.bench import record
from quantlib.bench.roofline import GPUS, SCHEDULERS, Gpu, chosen
from quantlib.errors import QuantlibError
from quantlib.formats.scheme import Scheme
from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda import machine_code, segmented
from quantlib.kernels.cuda.compile import with_nvcc
from quantlib.kernels.cuda.integer_layout import STEP_BYTES

SIZE = 4096
SCHEMES = ("w4a4h8/8", "w4a4zh8/8", "w4g128a4zh8/8", "w4g64z5s5a4zg64h8/8", "w8a8")
SHARED_BYTES_PER_CYCLE = 128
WARPS = 8
INTEGER_TOPS = {
    "A10": (250, 500),
    "A100": (624, 1248),
    "L40S": (733, 733),
    "RTX4090": (661, 1321),
    "H100": (1979, None),
    "H200": (1979, None),
    "B200": (4500, None),
}
"""Dense products of bytes and of nibbles, from the makers' data sheets. That of the L40S lists 733
for both: by its sheet nibbles gain nothing there, and no scheme is more than 2.0 times as fast as
fp16 (362). The L40 (362 and 724) and the RTX 4090, of the same architecture and with the same
instruction, have twice the rate for nibbles. fp16 of the RTX 4090 is its rate with float32 sums,
half of that with float16 sums."""
_PRODUCT_OPERATIONS = {8: 2 * 16 * 8 * 32, 4: 2 * 16 * 8 * 64}


@dataclass(frozen=True)
class Loop:
    """A warp's instructions in a step of one segment: matrix products, of so many bits; all that
    are issued in it; and in scaling a span's sums, where that is not part of every step."""

    products: int
    bits: int
    issued: int
    scaling: int


@dataclass(frozen=True)
class Limits:
    """Microseconds that each limit allows; products None: the rate is not known."""

    memory: float
    products: float | None
    issue: float
    shared: float

    @property
    def total(self) -> float:
        """The longest."""
        return max(self.memory, self.products or 0.0, self.issue, self.shared)


def count(case: segmented.GemmCase, index: int, architecture: int) -> Loop:
    """What nvcc makes of one segment's loop, compiled alone. Raises BuildError."""
    own = case.segments[index]
    alone = replace(case, segments=(own,))
    cubin, _ = with_nvcc(segmented.SOURCE, alone.macros(), architecture)
    return loop_of(machine_code.read(cubin), own)


def loop_of(code: machine_code.MachineCode, own: segmented.SegmentCase) -> Loop:
    """The same from the machine code of a kernel of one segment."""
    multiplying = [block for block in code.blocks if _has(block, "IMMA")]
    apart = [block for block in code.blocks if block not in multiplying and _has(block, "FFMA")]
    # Fetching is written out twice: in the loop, and before it.
    issued = sum(map(len, (*multiplying, *apart))) + code.around("LDGSTS") // 2
    scaling = 0
    if own.span_steps > 1:
        # A segment compiled alone may have its scaling put into its loop, with predicates; among
        # others it is jumped over (test_segmented_machine_code.py).
        merged = [name for block in multiplying for name in block if _scales(name)]
        scaling = len(merged) + sum(map(len, apart))
    products = sum(name.startswith("IMMA") for block in multiplying for name in block)
    return Loop(products, own.kind.token_bits, issued - scaling, scaling)


def _scales(name: str) -> bool:
    """Whether an instruction is of scaling sums and beginning new ones."""
    return name.startswith(("FFMA", "FMUL", "I2F", "HADD2", "CS2R", "MOV"))


def _has(block: Sequence[str], name: str) -> bool:
    return any(entry.startswith(name) for entry in block)


def predict(
    gpu: Gpu,
    tops: tuple[float, float | None],
    case: segmented.GemmCase,
    loops: Sequence[Loop],
    shape: tuple[int, int, int],
    moved: float,
) -> Limits:
    """Limits of a launch on (tokens, rows, columns): the columns are the case's."""
    tokens, rows, _ = shape
    tiles = case.tiles(tokens, rows)
    cycles = gpu.multiprocessors * gpu.ghz * 1e3  # of all multiprocessors, in a microsecond
    products, issued = 0.0, 0.0
    for own, loop in zip(case.segments, loops, strict=True):
        spans = own.spans if own.span_steps else 0
        issued += WARPS * tiles * (own.steps * loop.issued + spans * loop.scaling)
        rate = tops[0] if loop.bits == 8 else tops[1]
        if gpu.warp_share is None or rate is None:
            products = float("nan")
        else:
            operations = WARPS * tiles * own.steps * loop.products * _PRODUCT_OPERATIONS[loop.bits]
            products += operations / (rate * gpu.warp_share * 1e6)
    shared = tiles * case.steps * _shared_bytes(case) / SHARED_BYTES_PER_CYCLE
    return Limits(
        moved / (gpu.gb_per_s * 1e3),
        None if products != products else products,
        issued / (SCHEDULERS * cycles),
        shared / cycles,
    )


def _shared_bytes(case: segmented.GemmCase) -> int:
    """Of operands written and read in a step of a block."""
    written = (segmented.TILE_ROWS + case.tokens) * STEP_BYTES
    prompt = case.token_tiles == segmented.PROMPT_TILES
    rows, tokens = (64, case.tokens // 4) if prompt else (16, case.tokens)
    return written + WARPS * (rows + tokens) * STEP_BYTES


def moved_bytes(layout: segmented.Layout, tokens: int, rows: int) -> float:
    """What a launch must read and write once: codes, scales and outputs."""
    codes = sum(
        rows * part.case.steps * part.case.kind.strip_bytes / 16 for part in layout.segments
    )
    planes = rows * (1 + layout.any_unsigned) + tokens * layout.token_planes
    return codes + 4 * layout.spans * planes + tokens * layout.token_bytes + 2 * tokens * rows


def half_precision(gpu: Gpu, tokens: int, rows: int, columns: int) -> float:
    """Microseconds of an fp16 product at its limit."""
    moved = 2 * (rows * columns + tokens * (rows + columns))
    share = gpu.warp_share or 1.0
    products = 2 * tokens * rows * columns / (gpu.tflops * share * 1e6)
    return max(moved / (gpu.gb_per_s * 1e3), products)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description="Predict the segmented kernel's speed on GPUs.")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, SIZE])
    parser.add_argument("--gpus", nargs="+", default=list(GPUS))
    parser.add_argument("--keep", action="store_true", help="write the predictions down")
    given = parser.parse_args(arguments)
    print(f"predicted, not measured: {SIZE} rows and columns")
    print(f"{'scheme':22} {'GPU':8} {'tokens':>6} {'us':>8} {'of fp16':>8}  limits (us)")
    counted: dict[tuple[str, int, int], tuple[segmented.GemmCase, list[Loop]]] = {}
    rows: list[dict[str, Any]] = []
    try:
        for scheme in map(Scheme.parse, given.schemes):
            for name, gpu in chosen(given.gpus).items():
                layout = segmented.layout(
                    scheme.segments(SIZE), scheme.activations(SIZE), gpu.architecture
                )
                for tokens in given.tokens:
                    key = str(scheme), gpu.architecture, tokens
                    if key not in counted:
                        case = segmented.case(layout, tokens, torch.float16, gpu.architecture)
                        parts = range(len(case.segments))
                        counted[key] = case, [count(case, i, gpu.architecture) for i in parts]
                    moved = moved_bytes(layout, tokens, SIZE)
                    found = predict(
                        gpu, INTEGER_TOPS[name], *counted[key], (tokens, SIZE, SIZE), moved
                    )
                    base = half_precision(gpu, tokens, SIZE, SIZE)
                    times = base / found.total
                    print(_line(str(scheme), name, tokens, found, times), flush=True)
                    row = {"scheme": str(scheme), "gpu": name, "M": tokens, "times_fp16": times}
                    rows.append(row | {"microseconds": asdict(found)})
    except (BuildError, QuantlibError) as error:
        print(error, file=sys.stderr)
        return 1
    if given.keep:
        found_rows = {"predicted, not measured": rows, "N": SIZE, "K": SIZE}
        print(record.write("roofline_segmented", found_rows))
    return 0


def _line(scheme: str, name: str, tokens: int, found: Limits, times: float) -> str:
    products = "unknown" if found.products is None else f"{found.products:.1f}"
    limits = (
        f"memory {found.memory:.1f}, products {products}, issue {found.issue:.1f}, "
        f"shared memory {found.shared:.1f}"
    )
    return f"{scheme:22} {name:8} {tokens:6} {found.total:8.1f} {times:7.2f}x  {limits}"


if __name__ == "__main__":
    sys.exit(main())
