"""Result files: what was measured, when, on what, and by which command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantlib.checkpoint.disk import atomic_write_text
from quantlib.checkpoint.provenance import versions

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The processor and its cores, as the system names them."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def when_and_where() -> dict[str, str]:
    """Date and machine of a measurement, for files whose rows are of several."""
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": machine()}


def path_of(name: str) -> Path:
    """The result file of this name."""
    return RESULTS / f"{name}.json"


def write(name: str, rows: dict[str, Any]) -> Path:
    """Keep `rows` as `results/NAME.json` with date, machine, versions and the command that made
    them."""
    words = [_module(), *(Path(w).name if _is_path(w) else w for w in sys.argv[1:])]
    head = {
        **when_and_where(),
        "versions": versions(),
        "command": "python -P -m quantlib.bench." + shlex.join(words),
    }
    path = path_of(name)
    RESULTS.mkdir(exist_ok=True)
    atomic_write_text(path, json.dumps({**head, **rows}, indent=1) + "\n")
    return path


def of_kernels(name: str) -> str:
    """`name` with the instruction set that the CPU kernels run on: what they take on another one is
    another result, which must not replace this one."""
    from quantlib.kernels.cpu import library  # not to load it for result files of no kernels

    loaded = library.load()
    return f"{name}_{loaded.isa if loaded else 'reference'}"


def _is_path(word: str) -> bool:
    """Whether an argument is a path, of which the name is kept: schemes have slashes, too."""
    return "/" in word and (Path(word).is_absolute() or Path(word).exists())


def _module() -> str:
    """The module that was run, as a name below `quantlib.bench`."""
    path = Path(sys.argv[0]).resolve()
    inside = path.is_relative_to(RESULTS.parent)
    return ".".join(path.relative_to(RESULTS.parent).with_suffix("").parts) if inside else path.stem
