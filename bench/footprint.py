"""What a loaded checkpoint costs: resident memory beside the file's size, seconds to load beside
seconds to read the file.

    python -P -m quantlib.bench.footprint CHECKPOINT    loads it in this process, prints JSON

A loading is measured in a process of its own, and so is what it is compared with: reading the files
into memory of that process, which is the least that any loading does. Reading them through a small
buffer, of which nothing is kept, stands beside it. The difference is large where memory is handed
out slowly: a virtual machine may get pages from its host at the moment they are first touched.
Resident memory is what loading and one step add to that of the same process with quantlib, torch
and transformers imported: those are there for any model. "Cold" is after the file's pages were
dropped from the page cache, "warm" after it was read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantlib.errors import QuantlibError

_PIECE = 8 << 20
_PROBE = (1, 2, 3)
"""Tokens of the step that follows loading: it touches what loading may have put off."""


def measure(checkpoint: Path, load_first: bool = False) -> dict[str, Any]:
    """One row: bytes of the files, resident bytes, and seconds to read (keeping nothing), to read
    into memory, to load, and from the beginning of loading to the first token, cold and warm.

    load_first: load before reading into memory. Whoever comes second may get pages that the first
        has just given back, which are cheaper; so rounds should take turns.
    Raises QuantlibError when the loading process fails.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    row: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in files)}

    for state, prepare in (("cold", drop), ("warm", read)):
        prepare(files)
        row[f"read_s_{state}"] = read(files)
        for loads in (load_first, not load_first):
            prepare(files)
            if loads:
                row |= _loaded(checkpoint, state)
            else:
                row[f"keep_s_{state}"] = read_into_memory(files)
    return row


def _loaded(checkpoint: Path, state: str) -> dict[str, float]:
    """What a loading tells, named by the state of the page cache."""
    loaded = _load_elsewhere(checkpoint)
    seconds = {f"{name}_{state}": loaded.pop(name) for name in ("load_s", "first_token_s")}
    return {**loaded, **seconds}


def read(files: Sequence[Path]) -> float:
    """Seconds to read files from beginning to end, through a buffer of 8 MiB."""
    buffer = bytearray(_PIECE)
    started = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def read_into_memory(files: Sequence[Path]) -> float:
    """Seconds that a process of its own takes to read all files into memory that it never had."""
    code = (
        "import sys, time, numpy\n"
        "started = time.perf_counter()\n"
        "kept = [numpy.fromfile(path, dtype=numpy.uint8) for path in sys.argv[1:]]\n"
        "print(time.perf_counter() - started)"
    )
    command = [sys.executable, "-P", "-c", code, *map(str, files)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def drop(files: Sequence[Path]) -> None:
    """Ask the system to forget the files' pages."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _load_elsewhere(checkpoint: Path) -> dict[str, float]:
    command = [sys.executable, "-P", "-m", "quantlib.bench.footprint", str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise QuantlibError(f"{checkpoint} cannot be loaded in its own process: {lines[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def load_here(checkpoint: Path) -> dict[str, float]:
    """Load with the native engine, run one step, and say what it took."""
    # What every model needs once is there before memory and clock are first looked at: a
    # configuration's class brings a thousand modules.
    from transformers import AutoConfig

    AutoConfig.for_model("llama")

    from quantlib.kernels.cpu import library
    from quantlib.runtime.load import load

    library.load()

    before = resident("VmRSS")
    started = time.perf_counter()
    model = load(checkpoint, "int8", engine="native")
    seconds = time.perf_counter() - started
    model.make_engine(capacity=64).prefill(_PROBE)
    first = time.perf_counter() - started
    after = resident("VmRSS")
    return {
        "load_s": seconds,
        "first_token_s": first,
        "resident_bytes": after - before,
        "peak_bytes": resident("VmHWM") - before,
    }


def resident(what: str) -> int:
    """Bytes of this process by their name in /proc/self/status: VmRSS, VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise QuantlibError(f"this system does not tell {what}")


def main() -> None:
    """Load one checkpoint and print what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    try:
        print(json.dumps(load_here(parser.parse_args().checkpoint)))
    except QuantlibError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
