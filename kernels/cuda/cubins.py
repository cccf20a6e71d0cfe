"""Compiles kernels ahead of time, and says what came out: `make cubins`.

    python -m quantlib.kernels.cuda.cubins FOLDER [--bits 4 8] [--architectures 80 90]
        [--rounded w4a4h8/8:4096 ...]

One file for each case and architecture, named so that `cache.py` finds it (in `prebuilt/` beside
this file, a wheel's), and `summary.json`: registers and shared memory of each, and of kernel (a)
matrix and arithmetic instructions. Kernel (a) is compiled for all its cases; kernel (b) and its
quantizer, in which segments are baked, for the schemes and columns that are asked for. As many
compilers run as there are cores, and what the folder has already is left as it is. Needs nvcc and,
for the counts, nvdisasm; no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantlib.errors import FormatError
from quantlib.formats import Scheme
from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda import cache, decode, machine_code, quantizer, segmented
from quantlib.kernels.cuda.compile import ARCHITECTURES, with_nvcc
from quantlib.kernels.cuda.layout import WIDTHS

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
_TOKENS = tuple(segmented.TOKEN_TILE * t for t in (*segmented.DECODE_TILES, segmented.PROMPT_TILES))


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of one case for one architecture.

    products, arithmetic and issued are instructions of a warp for one step, 32 rows by `columns`:
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
    columns: int
    products: int
    arithmetic: int
    issued: int


def name_of(case: decode.DecodeCase) -> str:
    """For example `w4z-g64-f16-m16`: width and zero points, groups, inputs, tokens; `w4sparse-...`
    where two of every four columns are kept."""
    groups = f"g{case.period * case.step_columns // 4}" if case.period else "channel"
    dtype = next(name for name, dtype in DTYPES.items() if dtype == case.dtype)
    tokens = case.token_tiles * decode.TOKEN_TILE
    form = "sparse" if case.sparse else "z" if case.zeros else ""
    return f"w{case.bits}{form}-{groups}-{dtype}-m{tokens}"


def cases(bits: Sequence[int] = tuple(WIDTHS)) -> Iterator[decode.DecodeCase]:
    """Those that are built ahead: groups of 64 and more, or none, in every width; of 4 bits sparse
    ones too, whose groups have 32 columns and more."""
    for width, dtype, tiles in itertools.product(bits, DTYPES.values(), decode.TOKEN_TILES):
        for period, zeros in ((0, False), (4, False), (4, True)):
            yield decode.DecodeCase(width, dtype, tiles, period, zeros)
        if width == decode.MOST_SPARSE_BITS:
            for period in (0, 1, 2, 4):
                yield decode.DecodeCase(width, dtype, tiles, period, zeros=False, sparse=True)


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
        planned.step_columns,
        code.products,
        code.arithmetic,
        code.around("HMMA|FFMA") + fetching,
    )


@dataclass(frozen=True)
class Unit:
    """Kernel (b) or its quantizer, for one linear's segments."""

    name: str
    source: Path
    macros: dict[str, int]
    shared_bytes: int


def rounded_units(scheme: str, columns: int, architecture: int) -> Iterator[Unit]:
    """What multiplies inputs [M, columns] as a scheme says, any number of them, in both types.

    For example `w8a8x512+w4g64a4zx3584-f16-m16`, segments in the kernel's order; `...-f16-rounds`
    is the quantizer, where it takes the inputs. Raises FormatError unless kernel (b) takes the
    scheme.
    """
    parsed = Scheme.parse(scheme)
    activations = parsed.activations(columns)
    own = segmented.layout(parsed.segments(columns), activations, architecture)
    name = "+".join(f"{part.weight}a{part.activation}x{part.length}" for part in own.segments)
    for kind, dtype in DTYPES.items():
        for tokens in _TOKENS:
            case = segmented.case(own, tokens, dtype, architecture)
            macros, shared = case.macros(), case.shared_bytes
            yield Unit(f"{name}-{kind}-m{tokens}", segmented.SOURCE, macros, shared)
        if quantizer.takes(own, activations, architecture):
            macros, shared = quantizer.macros(own, dtype), quantizer.shared_bytes(own)
            yield Unit(f"{name}-{kind}-rounds", quantizer.SOURCE, macros, shared)


@dataclass(frozen=True)
class Job:
    """A cubin to be made: the name of its file, and what gives it and its row of the summary."""

    file: str
    make: Callable[[], tuple[bytes, dict[str, Any]]]


def jobs(
    bits: Sequence[int], architectures: Sequence[int], rounded: Sequence[str] = ()
) -> Iterator[Job]:
    """All that the command makes. rounded: SCHEME:COLUMNS. Raises FormatError for what is not."""
    for asked in rounded:
        scheme, _, columns = asked.rpartition(":")
        if not columns.isdecimal():
            raise FormatError(
                f"{asked!r} is no scheme and its columns: write for example w4a4:4096"
            )
        for architecture in architectures:
            for unit in rounded_units(scheme, int(columns), architecture):
                file = cache.file_name(unit.source, unit.macros, architecture)
                yield Job(file, partial(_make_unit, unit, architecture))
    for case in cases(bits):
        for architecture in architectures:
            macros = decode.plan(case, architecture).macros()
            file = cache.file_name(decode.SOURCE, macros, architecture)
            yield Job(file, partial(_make_case, case, architecture))


def _make_unit(unit: Unit, architecture: int) -> tuple[bytes, dict[str, Any]]:
    cubin, resources = with_nvcc(unit.source, unit.macros, architecture)
    return cubin, {
        "name": unit.name,
        "architecture": architecture,
        "registers": resources.registers,
        "spilled": resources.spilled,
        "shared_bytes": unit.shared_bytes,
    }


def _make_case(case: decode.DecodeCase, architecture: int) -> tuple[bytes, dict[str, Any]]:
    cubin, row = build(case, architecture)
    return cubin, asdict(row)


def make(folder: Path, wanted: Sequence[Job], tell: Callable[[dict[str, Any]], None]) -> None:
    """Make what a folder lacks, as many at a time as there are cores, and the summary of all.

    What is there already is not made again: names say what files are made of. Raises BuildError
    where one cannot be made; what was made before it stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary = folder / "summary.json"
    before = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else []
    rows = {row["file"]: row for row in before}

    def do(job: Job) -> None:
        if job.file in rows and (folder / job.file).is_file():
            return
        cubin, row = job.make()
        (folder / job.file).write_bytes(cubin)
        rows[job.file] = row | {"file": job.file}
        tell(rows[job.file])

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        made = [workers.submit(do, job) for job in wanted]
        try:
            for one in made:
                one.result()
        finally:
            workers.shutdown(cancel_futures=True)
            order = dict.fromkeys((*(job.file for job in wanted), *rows))
            found = [rows[file] for file in order if file in rows]
            new = summary.with_suffix(".new")
            new.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            new.replace(summary)


def _tell(row: dict[str, Any]) -> None:
    used = f"{row['registers']} registers, {row['shared_bytes']} bytes shared"
    print(f"{row['name']}, {row['file']}: {used}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels ahead of time.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--rounded", nargs="+", default=[], metavar="SCHEME:COLUMNS")
    given = parser.parse_args(arguments)
    try:
        make(given.folder, list(jobs(given.bits, given.architectures, given.rounded)), _tell)
    except (BuildError, FormatError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
