"""Arithmetic instructions beside every matrix product: kernel (a) and Marlin, W4 in groups of 128.

    python -P -m quantlib.bench.marlin marlin_cuda_kernel.cu [--architectures 80 86 89] [--keep]

Where a kernel multiplies, what is issued between two products is what may keep tensor cores
waiting. Both kernels are compiled here, by the same nvcc, and counted by the same rules
(`kernels/cuda/machine_code.py`): instructions of the basic blocks that multiply. Marlin scales
weights there, kernel (a) scales the sums of a group in a block of its own, whose instructions are
counted in a second column, with every step of a warp that scales.

Marlin's source is its authors' (Frantar and others, Apache License 2.0) and no part of quantlib:
get `marlin/marlin_cuda_kernel.cu` from their repository. Its headers are those of a CUDA toolkit,
or of `pip install nvidia-cuda-cccl` beside `make kernel-tools`. No GPU is needed.

A product is 16 rows or tokens by 8 of the other by 16 columns in both. Marlin has tokens in
sixteens, kernel (a) in eights, so for 8 tokens and fewer it needs half the products for as many
weights: the last column, of arithmetic for a thousand weights, compares them there.

--keep writes `results/marlin.json`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from quantlib.bench import record
from quantlib.errors import UsageError
from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda import decode, machine_code
from quantlib.kernels.cuda.compile import with_nvcc
from quantlib.kernels.cuda.layout import STRIP_ROWS

TOKENS = (8, 16, 32, 64)
GROUP = 128
_OPTIONS = ("-w", "--expt-relaxed-constexpr")
_THREADS, _STAGES, _SIXTEEN = 256, 4, 16
_FEW = 16
"""Tokens up to which Marlin takes tiles of 128 x 128, beyond them 64 x 256 (columns x rows)."""
_KERNEL = re.compile(r"MarlinILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)EL(in?\d+)E")
_WEIGHTS = 8 * 16
"""Of one of Marlin's products for 16 tokens."""


@dataclass(frozen=True)
class Count:
    """Of a kernel, where it multiplies. scaling: arithmetic that is issued apart, in as many steps
    as `products` are counted in. weights: those that the products are for."""

    kernel: str
    architecture: int
    tokens: int
    products: int
    arithmetic: int
    scaling: float
    weights: int

    @property
    def per_product(self) -> float:
        return self.arithmetic / self.products

    @property
    def with_scaling(self) -> float:
        return (self.arithmetic + self.scaling) / self.products

    @property
    def per_thousand_weights(self) -> float:
        return 1000 * (self.arithmetic + self.scaling) / self.weights


def marlin(source: Path, architecture: int) -> list[Count]:
    """Counts of Marlin's kernels. Raises UsageError where the file is no source of them."""
    if not source.is_file():
        raise UsageError(f"there is no {source}: download marlin_cuda_kernel.cu first")
    try:
        cubin, _ = with_nvcc(source, {}, architecture, _OPTIONS)
    except BuildError as error:
        if "nv/target" in str(error):
            raise UsageError("CUDA's headers are not whole: pip install nvidia-cuda-cccl") from None
        raise
    named = ((_KERNEL.search(name), code) for name, code in machine_code.read_all(cubin).items())
    kernels = {match.groups(): code for match, code in named if match}
    found = []
    for tokens in TOKENS:
        blocks = -(-tokens // _SIXTEEN)
        tile = (8, 8) if tokens <= _FEW else (16, 4)
        sizes = (_THREADS, blocks, *tile, _STAGES, f"i{GROUP // _SIXTEEN}")
        code = kernels.get(tuple(map(str, sizes)))
        if code is None:
            raise UsageError(f"{source} has no Marlin kernel for {tokens} tokens: get another copy")
        weights = code.products // blocks * _WEIGHTS
        own = Count("Marlin", architecture, tokens, code.products, code.arithmetic, 0, weights)
        found.append(own)
    return found


def ours(architecture: int) -> list[Count]:
    """Counts of kernel (a), as it is planned for an architecture."""
    found = []
    for tokens in TOKENS:
        case = decode.DecodeCase(4, torch.float16, tokens // decode.TOKEN_TILE, 4, zeros=False)
        planned = decode.plan(case, architecture)
        cubin, _ = with_nvcc(decode.SOURCE, planned.macros(), architecture)
        code = machine_code.read(cubin)
        # A warp's steps are slabs of 64 columns; where two share rows, each has every other one.
        columns = planned.step_columns
        steps = max(1, GROUP // (columns * planned.warps_along_k))
        scaling = code.arithmetic_around("FFMA") / steps
        weights = STRIP_ROWS * columns
        own = ("kernel (a)", architecture, tokens, code.products, code.arithmetic, scaling, weights)
        found.append(Count(*own))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description="Count arithmetic beside matrix products.")
    parser.add_argument("source", type=Path, help="marlin_cuda_kernel.cu")
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 86, 89])
    parser.add_argument("--keep", action="store_true", help="write results/marlin.json")
    given = parser.parse_args(arguments)
    rows = []
    print(f"W4, groups of {GROUP}, fp16: arithmetic instructions where a kernel multiplies")
    head = ("kernel", "sm", "tokens", "a product", "with scaling", "1000 weights")
    print("{:12} {:>4} {:>6} {:>10} {:>13} {:>13}".format(*head))
    try:
        for architecture in given.architectures:
            for one in (*marlin(given.source, architecture), *ours(architecture)):
                ratios = (one.per_product, one.with_scaling, one.per_thousand_weights)
                print(
                    f"{one.kernel:12} {architecture:4} {one.tokens:6} {ratios[0]:10.2f} "
                    f"{ratios[1]:13.2f} {ratios[2]:13.1f}"
                )
                names = ("per_product", "with_scaling", "per_thousand_weights")
                rows.append(asdict(one) | dict(zip(names, ratios, strict=True)))
    except (BuildError, UsageError) as error:
        print(error, file=sys.stderr)
        return 1
    if given.keep:
        print(record.write("marlin", {"instructions": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
