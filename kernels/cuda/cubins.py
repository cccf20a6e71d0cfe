"""Compiles kernel (a) ahead of time, and says what came out: `make cubins`.

    python -m quantlib.kernels.cuda.cubins FOLDER [--bits 4 8] [--architectures 80 90]

One file for each case and architecture, named so that `cache.py` finds it (in `prebuilt/` beside
this file, a wheel's), and `summary.json`: registers, shared memory, matrix and arithmetic
instructions of each. Needs nvcc and, for the counts, nvdisasm;
no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda import cache, decode, machine_code
from quantlib.kernels.cuda.compile import ARCHITECTURES, with_nvcc
from quantlib.kernels.cuda.layout import WIDTHS

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of one case for one architecture.

    products, arithmetic and issued are instructions of a warp for one step, 32 rows by 64 columns:
    matrix products and arithmetic where the kernel multiplies (`machine_code`), and all of them
    there, where it scales (counted with every step, though large groups need it seldom) and where
    it fetches.
    """

    name: str
    architecture: int
    registers: int
    spilled: int
    blocks_per_sm: int
    stages: int
    shared_bytes: int
    products: int
    arithmetic: int
    issued: int


def name_of(case: decode.DecodeCase) -> str:
    """For example `w4z-g64-f16-m16`: width and zero points, groups, inputs, tokens."""
    groups = {0: "channel", 1: "g16", 2: "g32", 4: "g64"}[case.period]
    dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    tokens = case.token_tiles * decode.TOKEN_TILE
    return f"w{case.bits}{'z' if case.zeros else ''}-{groups}-{dtype}-m{tokens}"


def cases(bits: Sequence[int] = tuple(WIDTHS)) -> Iterator[decode.DecodeCase]:
    """Those that are built ahead: groups of 64 and more, or none, in every width."""
    for width in bits:
        for dtype in DTYPES.values():
            for tiles in decode.TOKEN_TILES:
                for period, zeros in ((0, False), (4, False), (4, True)):
                    yield decode.DecodeCase(width, dtype, tiles, period, zeros)


def build(case: decode.DecodeCase, architecture: int) -> tuple[bytes, Compiled]:
    """A cubin of a case, planned for the architecture, and what is in it. Raises BuildError."""
    planned = decode.plan(case, architecture)
    cubin, resources = with_nvcc(decode.SOURCE, planned.macros(), architecture)
    code = machine_code.read(cubin)
    # Fetching is written out twice: in the loop, and before it.
    fetching = code.around("LDGSTS") // 2
    return cubin, Compiled(
        name_of(case),
        architecture,
        resources.registers,
        resources.spilled,
        planned.blocks_per_sm,
        planned.stages,
        planned.shared_bytes,
        code.products,
        code.arithmetic,
        code.around("HMMA|FFMA") + fetching,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description="Compile the decode kernel ahead of time.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES))
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    made = []
    try:
        for case in cases(given.bits):
            for architecture in given.architectures:
                cubin, row = build(case, architecture)
                macros = decode.plan(case, architecture).macros()
                path = given.folder / cache.file_name(decode.SOURCE, macros, architecture)
                path.write_bytes(cubin)
                made.append(asdict(row) | {"file": path.name})
                used = f"{row.registers} registers, {row.shared_bytes} bytes shared"
                print(f"{row.name}, {path.name}: {used}")
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    (given.folder / "summary.json").write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
