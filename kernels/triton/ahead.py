"""Compiles the Triton kernels for any GPU, without one: `python -m quantlib.kernels.triton.ahead`.

    python -P -m quantlib.kernels.triton.ahead [--quick | --all] [--architectures 80 90] [--json]

The kernels become machine code for compute capability 80, 89, 90, 100 and 120; what each needs
(registers, stack, shared memory) and which matrix instructions it has is printed, and what does not
fit is an error. Every configuration is compiled for every architecture in the forms of EVERYWHERE;
every other form (width, scales, zero points, floats, inputs) in one configuration, for one
architecture after another. `--all` crosses everything with everything, which takes hours; `--quick`
is a handful; `--architectures` takes the part of either that is for those. Run it without
TRITON_INTERPRET. What was compiled is found again in Triton's own cache.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantlib.errors import QuantlibError, UsageError
from quantlib.formats.activation import FLOAT8, ActivationFormat, ActivationSegment
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight_format import WeightFormat
from quantlib.kernels.triton import configurations, plan
from quantlib.kernels.triton.configurations import Configuration
from quantlib.kernels.triton.inputs import warps
from quantlib.kernels.triton.launch import constants, weight_constants

ARCHITECTURES = (80, 89, 90, 100, 120)
FLOAT8_ARCHITECTURE = 89
"""The first whose tensor cores multiply 8-bit floats."""
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""That a block may have (CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability")."""
_FORMS = ("", "z", "g16z", "g32s4", "g64z", "g128z4s5", "g256")
_FLOATS = ("fp8", "fp8e5m2g64", "fp6", "fp6e2m3g32", "mxfp8", "mxfp6", "mxfp4", "nvfp4")
_LENGTH = 4096
_ALIGNED = [["tt.divisibility", 16]]
_NAMES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", re.MULTILINE)
_MATRIX = (
    "HMMA",
    "IMMA",
    "HGMMA",
    "IGMMA",
    "QMMA",
    "QGMMA",
    "UTCHMMA",
    "UTCIMMA",
    "UTCQMMA",
    "OMMA",
)


@dataclass(frozen=True)
class Program:
    """A kernel with everything that it is compiled with.

    arguments:  by name, with Triton's names of their types.
    fused:      whether a product and a sum may become one operation.
    everywhere: whether it is compiled for every architecture.
    least:      the first architecture that has its instructions.
    """

    name: str
    kernel: str
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    fused: bool = True
    everywhere: bool = False
    least: int = 0


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of it. stack: bytes, spilled registers among them. matrix: products by
    the name of their instruction. conversions: of integers to floats."""

    name: str
    architecture: int
    registers: int
    stack: int
    shared_bytes: int
    matrix: dict[str, int]
    conversions: int


EVERYWHERE = ("w4g64z", "mxfp4", "fp8")
"""Formats whose products are compiled in every configuration for every architecture."""


def matrix(quick: bool = False, whole: bool = False) -> Iterator[tuple[Program, int]]:
    """Which programs are compiled for which architectures."""
    for number, program in enumerate(programs(quick, whole)):
        everywhere = whole or quick or program.everywhere
        known = [one for one in ARCHITECTURES if one >= program.least]
        turn = known[number % len(known)]
        yield from ((program, one) for one in (known if everywhere else (turn,)))


def weights(quick: bool = False) -> list[WeightFormat]:
    """The formats: every width in every way of scaling, and the floats."""
    if quick:
        names = ["w4g64z", "mxfp4", "fp8"]
    else:
        names = [f"w{bits}{form}" for bits in range(2, 9) for form in _FORMS] + list(_FLOATS)
    found = [Scheme.parse(name).weight for name in names]
    return [form for form in found if form is not None]


def programs(quick: bool = False, whole: bool = False) -> Iterator[Program]:
    """Every kernel in every form; in every configuration of the untuned table, if `whole` or for
    the formats of EVERYWHERE."""
    table = configurations.read(configurations.TABLES / f"{configurations.UNTUNED}.json")
    for number, form in enumerate(weights(quick)):
        every = not quick and (whole or str(form) in EVERYWHERE)
        both = (torch.float16, torch.bfloat16)
        for dtype in both if every else (both[number % 2],):
            case = plan.numbers(form, dtype)
            yield from _products(str(form), form, case, dtype, _configurations(table, case), every)
        activations = (ActivationSegment(0, _LENGTH, ActivationFormat(8)),)
        planned = plan.integers(form, 0, _LENGTH, activations)
        if planned is not None:
            case = planned[0]
            chosen = _configurations(table, case)
            yield from _products(f"{form}a8", form, case, torch.float16, chosen, every)
        alike = _float8_inputs(form)
        planned = plan.floats(form, 0, _LENGTH, alike)
        if planned is not None:
            case = planned[0]
            chosen = _configurations(table, case)
            name = f"{form}a{alike[0].format}"
            yield from _products(name, form, case, torch.float16, chosen, every)
        yield _rows(form, plan.numbers(form, torch.float32))
    yield from _rotations(quick)
    yield _sum()


def _float8_inputs(form: WeightFormat) -> tuple[ActivationSegment, ...]:
    """Inputs as codes of the weight's kind, with scales for as many columns; none for others."""
    if form.element not in FLOAT8:
        return ()
    return (ActivationSegment(0, _LENGTH, ActivationFormat.parse(str(form).partition("g")[0])),)


def _configurations(table: configurations.Table, case: plan.Case) -> list[Configuration]:
    """Those of the case's kind: of the nearest width."""
    kind = configurations.KINDS[case.coded]
    shapes = [shape for shape, _ in table if shape.kind == kind]
    near = min({shape.bits for shape in shapes}, key=lambda bits: abs(bits - case.bits))
    return [chosen for shape, chosen in table if (shape.kind, shape.bits) == (kind, near)]


def _products(
    name: str,
    form: WeightFormat,
    case: plan.Case,
    dtype: torch.dtype,
    chosen: Sequence[Configuration],
    every: bool,
) -> Iterator[Program]:
    """In all configurations, or in the first one."""
    is_float8 = case.compute in FLOAT8.values()
    inputs = torch.uint8 if is_float8 else torch.int8 if case.coded else dtype
    pointers = {
        "x": _NAMES[inputs],
        "x_scale": "*fp32",
        "x_group": "*i32",
        **_weight_pointers(form),
        "bias": _NAMES[dtype],
        "out": _NAMES[dtype],
    }
    sizes = ("token_count", "row_count", "columns", "start", "x_stride", "x_scales", "tiles")
    numbers = {**dict.fromkeys(sizes, "i32"), "split_tiles": "i32", "zero_step": "fp32"}
    short = str(dtype).removeprefix("torch.")
    for one in chosen if every else chosen[:1]:
        yield Program(
            f"{name} {short} {one.block_rows}x{one.block_tokens}",
            "gemm.multiply",
            {**pointers, **numbers},
            constants(case)
            | {"BIAS": True, "BLOCK_ROWS": one.block_rows, "BLOCK_TOKENS": one.block_tokens},
            one.warps,
            one.stages,
            everywhere=every,
            least=FLOAT8_ARCHITECTURE if is_float8 else 0,
        )


def _weight_pointers(form: WeightFormat) -> dict[str, str]:
    stored = "*fp16" if form.scale in ("f16", "e4m3") else "*u8"
    return {"codes": "*u8", "scale": stored, "zero": "*u8", "factor": "*fp32"}


def _rows(form: WeightFormat, case: plan.Case) -> Program:
    pointers = {"ids": "*i64", **_weight_pointers(form), "out": "*fp16"}
    sizes = ("first", "count", "row_count", "columns", "start", "out_stride", "tiles")
    numbers = {**dict.fromkeys(sizes, "i32"), "zero_step": "fp32"}
    own = weight_constants(case) | {"CHOSEN": True, "BLOCK": 32}
    return Program(f"{form} rows", "rows.dequantize_rows", {**pointers, **numbers}, own, 4, 3)


def _rotations(quick: bool) -> Iterator[Program]:
    """Blocks of a power of two, with a dense part of 12 or 28, and none."""
    pointers = {"x": "*fp16", "dense": "*fp32", "out": "*i8", "scales": "*fp32"}
    sizes = ("x_stride", "out_stride", "scale_stride", "first", "first_scale", "block", "columns")
    numbers = dict.fromkeys((*sizes, "dense_rows"), "i32") | {"norm": "fp32", "clip": "fp32"}
    shapes = [(1, 4096, False), (16, 128, True)]
    if not quick:
        shapes += [(1, 64, False), (1, 1024, False), (32, 256, True), (64, 32, True)]
    for rows, power, dense in shapes:
        for rounding, limit in ((0, 0.0), (1, 127.0), (2, 15.0)):
            for group in (128, rows * power) if rows * power > 128 else (rows * power,):
                own: dict[str, Any] = {"DENSE": dense, "ROWS": rows, "POWER": power}
                own |= {"LEVELS": power.bit_length() - 1, "ROUND": rounding}
                own |= {"LIMIT": limit, "GROUP": group}
                given = {**pointers, "out": "*i8" if rounding else "*fp16", **numbers}
                name = f"rotate {rows}x{power} {rounding} g{group}"
                own_warps = warps(rows, power)
                yield Program(name, "rotate.rotate_and_round", given, own, own_warps, 3, False)


def _sum() -> Program:
    given = {"partial": "*fp32", "bias": "*fp16", "out": "*fp16"}
    given |= dict.fromkeys(("size", "row_count", "parts"), "i32")
    return Program("sum", "gemm.add_parts", given, {"BIAS": True, "BLOCK": 1024}, 4, 3)


def compile_for(program: Program, architecture: int) -> Compiled:
    """Machine code of a program for a compute capability, and what is in it.

    Raises UsageError under TRITON_INTERPRET, QuantlibError when the compiler refuses.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise UsageError("TRITON_INTERPRET is set, and nothing is compiled then: unset it")
    kernel = _kernel(program.kernel)
    names = list(kernel.arg_names)
    signature = {name: program.arguments.get(name, "constexpr") for name in names}
    aligned = {
        (names.index(name),): _ALIGNED
        for name, kind in program.arguments.items()
        if kind.startswith("*") or name in _MULTIPLES
    }
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=dict(program.constants), attrs=aligned
    )
    options = {
        "num_warps": program.warps,
        "num_stages": program.stages,
        "enable_fp_fusion": program.fused,
    }
    try:
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as error:  # of many kinds, MLIR's among them
        raise QuantlibError(
            f"Triton cannot compile {program.name} for sm_{architecture}: {error}"
        ) from error
    return _read(program.name, architecture, made.asm["cubin"], made.metadata.shared)


_MULTIPLES = ("row_count", "columns", "start", "x_stride", "out_stride", "block", "first")
"""Sizes that are multiples of 16 in the layers of real models: what Triton finds out by itself."""


def _kernel(name: str) -> Any:
    from importlib import import_module

    module, function = name.split(".")
    return getattr(import_module(f"quantlib.kernels.triton.{module}"), function)


def _read(name: str, architecture: int, cubin: bytes, shared: int) -> Compiled:
    """Registers from the ELF's resource notes, instructions from its listing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        listing = _cuobjdump("-res-usage", "-sass", str(path))
    registers = re.search(r"REG:(\d+)", listing)
    stack = re.search(r"STACK:(\d+)", listing)
    local = re.search(r"LOCAL:(\d+)", listing)
    if registers is None or stack is None or local is None:
        raise QuantlibError(f"cuobjdump does not say what {name} uses: {listing[:500].strip()}")
    instructions = Counter(_INSTRUCTION.findall(listing))
    return Compiled(
        name,
        architecture,
        int(registers[1]),
        int(stack[1]) + int(local[1]),
        shared,
        {word: instructions[word] for word in _MATRIX if instructions[word]},
        instructions["I2F"] + instructions["I2FP"],
    )


def _cuobjdump(*arguments: str) -> str:
    """What this tool, which comes with Triton, says."""
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise QuantlibError(f"cuobjdump failed: {done.stderr.strip()}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 when everything compiles and fits."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time.")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a handful")
    extent.add_argument("--all", action="store_true", help="everything with everything")
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="programs whose name has this in it")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    given = parser.parse_args(arguments)
    failed = 0
    for program, architecture in matrix(given.quick, given.all):
        if given.only not in program.name or architecture not in given.architectures:
            continue
        try:
            made = compile_for(program, architecture)
        except QuantlibError as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        if made.shared_bytes > SHARED_BYTES[architecture]:
            print(f"{made.name}: too much shared memory for sm_{architecture}", file=sys.stderr)
            failed += 1
        print(json.dumps(asdict(made)) if given.json else _line(made), flush=True)
    return min(failed, 1)


def _line(made: Compiled) -> str:
    matrix = " ".join(f"{count} {name}" for name, count in made.matrix.items()) or "no matrix"
    return (
        f"{made.name}, sm_{made.architecture}: {made.registers} registers, {made.stack} bytes "
        f"of stack, {made.shared_bytes} shared, {matrix}, {made.conversions} conversions"
    )


if __name__ == "__main__":
    sys.exit(main())
