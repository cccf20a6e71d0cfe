"""Where compiled kernels are kept: by a hash of everything that they are made of.

A cubin's name says which kernel and architecture it is for, and carries the hash of the source, all
that it includes, and the macros. So a file that is found is the right one, whoever made it: those
of a wheel lie in `prebuilt/` beside this file (`make cubins` writes such files), those compiled at
run time in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from quantlib.kernels.cpu.build import cache_folder
from quantlib.kernels.cuda.compile import ARCHITECTURES

PREBUILT = Path(__file__).with_name("prebuilt")


def file_name(source: Path, macros: Mapping[str, int], architecture: int) -> str:
    """For example `decode_gemm-sm_80-0123456789abcdef01234567.cubin`."""
    name = ARCHITECTURES[architecture]
    digest = hashlib.sha256(repr((sorted(macros.items()), name)).encode())
    seen: set[str] = set()
    left = [source.name]
    while left:
        part = left.pop()
        path = source.parent / part
        if part in seen or not path.is_file():
            continue
        seen.add(part)
        text = path.read_bytes()
        digest.update(part.encode() + b"\0" + text + b"\0")
        left += sorted(re.findall(r'#include "([^"]+)"', text.decode()))
    return f"{source.stem}-{name}-{digest.hexdigest()[:24]}.cubin"


def find(name: str) -> bytes | None:
    """A cubin by its file's name, from the package or from the user's cache."""
    for folder in (PREBUILT, user_folder()):
        path = folder / name
        if path.is_file():
            return path.read_bytes()
    return None


def keep(name: str, cubin: bytes) -> None:
    """Put a cubin into the user's cache: the file appears when it is whole. A cache that cannot be
    written is done without."""
    folder = user_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".made-", delete=False) as made:
            made.write(cubin)
        os.replace(made.name, folder / name)
    except OSError:
        return


def user_folder() -> Path:
    """Where cubins that were compiled here are kept."""
    return cache_folder() / "cuda"
