"""llama.cpp, compiled for this machine from the source that the `llama-cpp-python` source package
carries: a pinned, checked archive from the Python index, without a network beyond it.

    python -P -m quantlib.bench.peers.llama_build [--jobs N]

Takes a quarter of an hour on two cores and needs cmake and a C++ compiler. What is kept, in the
user's cache folder, are four programs and the converter from Hugging Face folders; the source goes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from quantlib.bench.assets import default_cache
from quantlib.bench.peers.linear import PeerMissing

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
ARCHIVE = "llama_cpp_python-0.3.36.tar.gz"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_SOURCE = "llama_cpp_python-0.3.36/vendor/llama.cpp/"
PROGRAMS = ("llama-bench", "llama-quantize", "llama-perplexity", "llama-imatrix")
CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
_OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "BUILD_SHARED_LIBS=OFF",
    "GGML_NATIVE=ON",  # this machine's own instructions, as its users are told to build
    "GGML_CCACHE=OFF",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_APP=OFF",
    "LLAMA_BUILD_SERVER=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_TESTS=OFF",
)


def folder(cache: Path | None = None) -> Path:
    """Where the programs are, or will be."""
    return (cache or default_cache()) / "peers" / f"llama.cpp-{VERSION}"


def installed(cache: Path | None = None) -> bool:
    """Whether the programs are there; the folder appears only when it is complete."""
    return folder(cache).is_dir()


def install(cache: Path | None = None, jobs: int | None = None) -> Path:
    """Download, check, compile and keep; does nothing when that is done. Raises PeerMissing."""
    target = folder(cache)
    if installed(cache):
        return target
    if shutil.which("cmake") is None:
        raise PeerMissing("llama.cpp needs cmake to be compiled: install it (apt install cmake)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as scratch:
            source = _source(Path(scratch))
            programs = _compile(source, Path(scratch, "build"), jobs or os.cpu_count() or 1)
            _keep(source, programs, Path(scratch, "done"))
            os.rename(Path(scratch, "done"), target)
    except OSError as error:
        raise PeerMissing(f"llama.cpp could not be put into {target}: {error}") from error
    return target


def _source(scratch: Path) -> Path:
    """The unpacked source of llama.cpp from the pinned archive."""
    options = ["--no-deps", "--no-binary", PACKAGE, "--dest", str(scratch)]
    _run(sys.executable, "-m", "pip", "download", *options, f"{PACKAGE}=={VERSION}")
    archive = scratch / ARCHIVE
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise PeerMissing(
            f"{ARCHIVE} has sha256 {found}, expected {SHA256}: it is not the pinned one"
        )
    with tarfile.open(archive) as content:
        members = [member for member in content if member.name.startswith(_SOURCE)]
        content.extractall(scratch, members, filter="data")
    return scratch / _SOURCE


def _compile(source: Path, build: Path, jobs: int) -> Path:
    """The folder of the compiled programs."""
    definitions = [f"-D{option}" for option in _OPTIONS]
    _run("cmake", "-S", str(source), "-B", str(build), *definitions)
    _run("cmake", "--build", str(build), "-j", str(jobs), "--target", *PROGRAMS)
    return build / "bin"


def _keep(source: Path, programs: Path, done: Path) -> None:
    done.mkdir()
    for name in PROGRAMS:
        shutil.copy2(programs / name, done / name)
    for name in CONVERTER:
        path = source / name
        if path.is_dir():
            shutil.copytree(path, done / name)
        else:
            shutil.copy2(path, done / name)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeerMissing(f"{' '.join(command[:3])} failed: {reason(done.stderr + done.stdout)}")


def reason(output: str) -> str:
    """The line of a failed program's output that says most: the first error, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = (line for line in lines if "error" in line.lower())
    return next(errors, lines[-1] if lines else "it said nothing")


def main() -> None:
    """Install from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, help="compilers at once (default: one per core)")
    try:
        print(install(jobs=parser.parse_args().jobs))
    except PeerMissing as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
