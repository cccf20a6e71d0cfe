"""Compiles the CPU kernels into one shared library, with a C++17 compiler and nothing else.

Each instruction set has a translation unit of its own, built with its own flags, and the library
chooses at run time (`src/driver.cpp`): one file serves every processor of an architecture. It has
no torch or Python headers, so it depends on the version of neither.

The file's name carries a hash of the sources, the flags and the machine, so that a library found
under the right name is the right one: `find` looks into this folder (a wheel that was built with
`build_for_wheel`) and into the user's cache, `build` compiles into the cache at first use. Only the
standard library is imported: setup.py loads this file by its path, where quantlib is not installed
yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
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
    # Never -ffast-math: results must be the reference's. The first two only let loops be
    # vectorized. The last fuses a product and a sum where the source says so and nowhere else, so
    # that every instruction set rounds alike.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
)
_AVX2 = ("-mavx2", "-mfma", "-mbmi2", "-mf16c")
_AVX512VNNI = (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")))
_X86 = "-DQL_X86"
_ISA_FLAGS = {
    "bmi2": ("-mbmi2",),
    "avx2": _AVX2,
    "avx2vnni": (*_AVX2, "-mavxvnni"),
    "avx512vnni": _AVX512VNNI,
    "avx512": (*_AVX512VNNI, "-mavx512vbmi"),
}
"""Flags of the units named for an x86 instruction set: avx2.cpp, attention_avx2.cpp, ..."""
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
    """Compile into the user's cache and return the library's path; takes a minute or two.

    Of several processes, one compiles and the others wait. Raises BuildError when there is no
    compiler, it fails, or the cache cannot be written.
    """
    folder = cache_folder()
    try:
        with _cached_objects() as objects:
            if path := find():
                return path
            _LOG.info("compiling the CPU kernels, once: they are kept in %s", folder)
            return build_into(folder, objects=objects)
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be used ({error.strerror})") from error


def build_for_wheel(folder: Path) -> Path:
    """Compile into `folder`, which must exist, and return the library's path.

    The user's cache serves parts that this compiler made of the same sources, and keeps new ones;
    where there is none that can be written, everything is compiled. Raises BuildError as
    `build_into` does.
    """
    with contextlib.ExitStack() as held:
        objects = None
        with contextlib.suppress(OSError, ImportError):  # Windows has no fcntl
            objects = held.enter_context(_cached_objects())
        return build_into(folder, objects=objects)


def build_into(
    folder: Path,
    extra_flags: tuple[str, ...] = (),
    portable_only: bool = False,
    objects: Path | None = None,
) -> Path:
    """Compile into `folder`, which must exist, and return the library's path.

    The file appears only when it is whole. `extra_flags` come last, for sanitizers; with
    `portable_only` the library has no other instruction set. A folder of `objects` keeps the parts,
    so that after a change, of sources or compiler, only what it touches is compiled. Raises
    BuildError as `build` does.
    """
    compiler = find_compiler()
    version = run_compiler(compiler, "--version") if objects else ""
    units, name = _units(portable_only), library_name()
    # Two, as files are moved out of them, which works within one file system.
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch,
        tempfile.TemporaryDirectory(dir=objects or folder, prefix=".build-") as fresh,
    ):

        def compile_unit(unit: str) -> Path:
            flags = (*_COMMON, *units[unit], *extra_flags)
            known = None if objects is None else objects / f"{_digest(unit, flags, version)}.o"
            if known is not None and known.is_file():
                return known
            made = Path(fresh, unit).with_suffix(".o")
            run_compiler(compiler, *flags, "-c", str(SOURCES / unit), "-o", str(made))
            # A source that was saved meanwhile: what was compiled is not what was asked for.
            if known is None or known.name != f"{_digest(unit, flags, version)}.o":
                return made
            return made.replace(known)

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            parts = list(pool.map(compile_unit, units))
        library = Path(scratch, name)
        run_compiler(compiler, *map(str, parts), *_LINK, *extra_flags, "-o", str(library))
        os.replace(library, folder / name)
    for former in set(objects.glob("*.o")) - set(parts) if objects else ():
        former.unlink()
    return folder / name


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


def _digest(unit: str, flags: tuple[str, ...], compiler: str) -> str:
    """Of everything that an object file depends on; `compiler` is what it says of itself."""
    digest = hashlib.sha256(repr((flags, compiler, platform.machine())).encode())
    seen, left = set(), [unit]
    while left:
        name = left.pop()
        if name in seen or not (SOURCES / name).is_file():
            continue
        seen.add(name)
        text = (SOURCES / name).read_bytes()
        digest.update(name.encode() + b"\0" + text + b"\0")
        left += sorted(re.findall(r'#include "([^"]+)"', text.decode()))
    return digest.hexdigest()[:32]


def _units(portable_only: bool = False) -> dict[str, tuple[str, ...]]:
    """Translation unit -> its own flags, for this architecture."""
    x86 = platform.machine() in ("x86_64", "AMD64") and not portable_only
    units: dict[str, tuple[str, ...]] = {}
    for path in sorted(SOURCES.glob("*.cpp")):
        isa = path.stem.rpartition("_")[2]
        if isa not in _ISA_FLAGS:
            units[path.name] = (_X86,) if x86 else ()
        elif x86:
            units[path.name] = (_X86, *_ISA_FLAGS[isa])
    return units


def find_compiler() -> str:
    """The C++ compiler: $CXX, as every build tool reads it, else g++ or what the system calls
    c++."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("there is no C++ compiler: install g++ (on Debian: apt install g++)")


def run_compiler(*command: str) -> str:
    """What a compiler's command prints. Raises BuildError with its first complaint if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not finish within {_COMPILE_SECONDS} s") from error
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise BuildError(f"{command[0]} failed: {reason.strip()}")
    return done.stdout


@contextlib.contextmanager
def _cached_objects() -> Iterator[Path]:
    """The cache's folder of object files; of several processes, one is in here at a time."""
    folder = cache_folder()
    (folder / "objects").mkdir(parents=True, exist_ok=True)
    with _locked(folder / "build.lock"):
        yield folder / "objects"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; released by the system when the process dies."""
    import fcntl  # not on Windows, where the import of this module must still work

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
