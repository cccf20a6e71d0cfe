"""Compiles a kernel for the emulator: one shared library per kernel and set of macros.

Like the CPU kernels (`kernels/cpu/build.py`), libraries are kept in the user's cache under a hash
of everything that they are made of.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from quantlib.kernels.cpu.build import cache_folder, find_compiler, run_compiler

SOURCES = Path(__file__).with_name("src")

_FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    # Sums must round where the source says so, not where a processor would like to.
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",  # #pragma unroll
    "-DQL_EMULATED",
)
SANITIZE = ("-fsanitize=undefined",)
"""Extra flags: undefined behaviour, which nvcc and g++ may take differently, is a line with
"runtime error" on standard error."""


def compile_kernel(
    source: Path, macros: Mapping[str, int] | None = None, extra_flags: tuple[str, ...] = ()
) -> Path:
    """The library of the kernel in `source` with these macros, compiled unless it is in the cache.

    The file ends with QL_KERNEL(name) and includes what lies beside it. Raises BuildError when
    there is no compiler or it refuses the source.
    """
    defines = [f"-D{name}={value}" for name, value in sorted((macros or {}).items())]
    flags = (*_FLAGS, *extra_flags)
    folder = cache_folder() / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{source.stem}-{_digest(source, (*flags, *defines))}.so"
    if library.is_file():
        return library
    compiler, include = find_compiler(), f"-I{SOURCES}"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        made = Path(scratch, library.name)
        # A .cu file is C++ to this compiler.
        kernel = ("-x", "c++", str(source), "-x", "none")
        link = ("-shared", "-Wl,-Bsymbolic", "-o", str(made))
        machine = [str(path) for path in _machine(folder, compiler, flags)]
        run_compiler(compiler, *flags, include, *defines, *kernel, *machine, *link)
        os.replace(made, library)
    return library


def _machine(folder: Path, compiler: str, flags: tuple[str, ...]) -> list[Path]:
    """The machine's object files, compiled unless they are in the cache."""
    objects = []
    for unit in sorted(SOURCES.glob("*.cpp")):
        path = folder / f"{unit.stem}-{_digest(unit, flags)}.o"
        objects.append(path)
        if not path.is_file():
            with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
                made = Path(scratch, path.name)
                run_compiler(compiler, *flags, "-c", str(unit), "-o", str(made))
                os.replace(made, path)
    return objects


def _digest(source: Path, flags: tuple[str, ...]) -> str:
    """Of the flags, the source and all that it includes, from its folder or the machine's."""
    digest, seen, left = hashlib.sha256(repr(flags).encode()), set(), [source.name]
    # A kernel is linked with the machine, so that counts too.
    if source.suffix == ".cu":
        left += [path.name for path in SOURCES.glob("*.cpp")]
    while left:
        name = left.pop()
        path = next((p for p in (source.parent / name, SOURCES / name) if p.is_file()), None)
        if name in seen or path is None:
            continue
        seen.add(name)
        text = path.read_bytes()
        digest.update(name.encode() + b"\0" + text + b"\0")
        left += sorted(re.findall(r'#include "([^"]+)"', text.decode()))
    return digest.hexdigest()[:24]
