"""Where the compilers are: nvcc, NVRTC, nvdisasm, from a CUDA toolkit or from Python packages.

None of them is needed to use quantlib. A toolkit is found by PATH, CUDA_HOME or CUDA_PATH; the
packages are `nvidia-cuda-nvcc`, `nvidia-cuda-nvrtc` and `nvidia-cuda-nvdisasm`, whose files lie
under `nvidia/` in site-packages; Triton brings nvdisasm too.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path


@lru_cache
def find_nvcc() -> Path | None:
    """The CUDA compiler, if it is here."""
    return _program("nvcc")


@lru_cache
def find_nvdisasm() -> Path | None:
    """The disassembler of machine code, if it is here."""
    return _program("nvdisasm")


@lru_cache
def find_nvrtc() -> Path | None:
    """The library that compiles CUDA at run time, if it is here."""
    folders = [*_toolkits(("lib64", "lib")), *_packages("lib")]
    # The newest first; builtins are a part of it.
    found = (
        path
        for folder in folders
        for path in sorted(folder.glob("libnvrtc.so*"), reverse=True)
        if "builtins" not in path.name
    )
    return next(found, None)


def _program(name: str) -> Path | None:
    if found := shutil.which(name):
        return Path(found)
    folders = [*_toolkits(("bin",)), *_packages("bin")]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _toolkits(parts: tuple[str, ...]) -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            yield from (Path(root, part) for part in parts)


def _packages(part: str) -> Iterator[Path]:
    """Folders `part` of the packages that NVIDIA and Triton publish, on the import path."""
    for entry in sys.path:
        nvidia = Path(entry or ".", "nvidia")
        yield from sorted(nvidia.glob(f"cu*/{part}"), reverse=True)
        yield from sorted(nvidia.glob(f"cuda_*/{part}"))
        yield Path(entry or ".", "triton", "backends", "nvidia", part)
