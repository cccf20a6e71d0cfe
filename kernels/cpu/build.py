"""Compiles the CPU kernels into one shared library, with a C++17 compiler and nothing else.

Each instruction set has a translation unit of its own, built with its own flags, and the library
chooses at run time (`src/driver.cpp`): one file serves every processor of an architecture. It has
no torch or Python headers, so it depends on the version of neither.

The file's name carries a hash of the sources, the flags and the machine, so that a library found
under the right name is the right one: `find` looks into this folder (a wheel that was built with
`build_into`) and into the user's cache, `build` compiles into the cache at first use. Only the
standard library is imported: setup.py loads this file by its path, where quantlib is not installed
yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_LOG = logging.getLogger("quantlib.kernels")

SOURCES = Path(__file__).with_name("src")

_COMMON = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # Never -ffast-math: results must be the reference's. These two only let loops be vectorized.
    "-fno-math-errno",
    "-fno-trapping-math",
)
_AVX2 = ("-mavx2", "-mfma", "-mbmi2", "-mf16c", "-ffp-contract=fast")
_AVX512 = tuple(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vbmi", "vnni"))
_UNITS: dict[str, tuple[str, ...]] = {"driver.cpp": (), "pool.cpp": (), "portable.cpp": ()}
_X86_UNITS = {
    **_UNITS,
    "driver.cpp": ("-DQL_X86",),
    "avx2.cpp": _AVX2,
    "avx512.cpp": (*_AVX2, *_AVX512),
}
# The C++ runtime goes inside: an older one in the user's environment would not load the library.
_LINK = ("-shared", "-pthread", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")
_COMPILE_SECONDS = 600


class BuildError(RuntimeError):
    """The library could not be built, and why. Everything works without it, on the reference."""


def find() -> Path | None:
    """The library of exactly these sources, from the package or the user's cache, if any."""
    for folder in (Path(__file__).parent, cache_folder()):
        path = folder / library_name()
        if path.is_file():
            return path
    return None


def build() -> Path:
    """Compile into the user's cache and return the library's path; takes some ten seconds.

    Of several processes, one compiles and the others wait. Raises BuildError when there is no
    compiler, it fails, or the cache cannot be written.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "build.lock"):
            if path := find():
                return path
            _LOG.info("compiling the CPU kernels, once: they are kept in %s", folder)
            return build_into(folder)
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be used ({error.strerror})") from error


def build_into(
    folder: Path, extra_flags: tuple[str, ...] = (), portable_only: bool = False
) -> Path:
    """Compile into `folder`, which must exist, and return the library's path.

    The file appears only when it is whole. `extra_flags` come last, for sanitizers; with
    `portable_only` the library has no other instruction set. Raises BuildError as `build` does.
    """
    compiler = _compiler()
    units = _UNITS if portable_only else _units()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        objects = {unit: Path(scratch, unit).with_suffix(".o") for unit in units}

        def compile_unit(unit: str) -> None:
            flags = (*_COMMON, *units[unit], *extra_flags)
            _run(compiler, *flags, "-c", str(SOURCES / unit), "-o", str(objects[unit]))

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(compile_unit, objects))
        library = Path(scratch, library_name())
        _run(compiler, *map(str, objects.values()), *_LINK, *extra_flags, "-o", str(library))
        os.replace(library, folder / library.name)
    return folder / library.name


def cache_folder() -> Path:
    """Where compiled libraries are kept: `quantlib/kernels` in `$XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quantlib" / "kernels"


def library_name() -> str:
    """File name of the library of these sources, flags and architecture."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((_COMMON, _LINK, _units(), platform.system(), platform.machine())).encode())
    return f"libquantlib-cpu-{digest.hexdigest()[:16]}.so"


def _units() -> dict[str, tuple[str, ...]]:
    """Translation unit -> its own flags, for this architecture."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return _X86_UNITS if is_x86 else _UNITS


def _compiler() -> str:
    """The C++ compiler: $CXX, as every build tool reads it, else g++ or what the system calls
    c++."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("there is no C++ compiler: install g++ (on Debian: apt install g++)")


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not finish within {_COMPILE_SECONDS} s") from error
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise BuildError(f"{command[0]} failed: {reason.strip()}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; released by the system when the process dies."""
    import fcntl  # not on Windows, where the import of this module must still work

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
