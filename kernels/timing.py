"""The cost table: what one product takes on this machine, in milliseconds, measured once and kept.

A latency budget needs to know what every weight would cost in every scheme, before there is a
checkpoint. So the real kernels are timed, by a C entry point that runs the loop of the decoder
engine (`cpu/src/timing.cpp`): within one parallel region, the threads share the strips of one copy
of the weight after the other and wait at its end, all copies together much larger than the caches.
What a running model adds to their sum is measured on a running model
(`quantlib.runtime.stopwatch`).

Operations are timed in turns, several times each: a disturbance hits all of them a little instead
of one of them badly. It only ever adds time, so the lower quartile counts (`undisturbed`). The
table is kept as JSON in the user's cache folder under a fingerprint of the machine (processor,
cores, instruction set, the kernels' own hash, threads); anything else than this machine's valid
table is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from quantlib.errors import UsageError
from quantlib.kernels.cpu import build, library, stopwatch

__all__ = ["Machine", "Op", "TimingTable", "this_machine", "undisturbed"]

FORMAT, VERSION = "quantlib-timing", 2
ROUNDS = 5
"""Turns in which the operations are timed."""
PASSES = 3
"""Passes over all copies in one turn."""

Clock = Callable[["Op", int, int], Sequence[float]]
"""(operation, threads, passes) -> seconds of each pass: `stopwatch.seconds`, or a test's own."""
Tick = Callable[[str], None]


def undisturbed(times: Sequence[float]) -> float:
    """What something takes while nothing else runs: the lower quartile of measured times. What
    else is going on makes single measurements longer, and never shorter."""
    return sorted(times)[len(times) // 4]


@dataclass(frozen=True, order=True)
class Op:
    """`tokens` rows of activations times a weight [rows, columns] in `scheme`.

    mode: of the activations: "exact", "int8", or 8 bits with a scale for every so many columns:
          "int8g64".
    """

    rows: int
    columns: int
    scheme: str
    tokens: int
    mode: str

    @property
    def key(self) -> str:
        """Its name in the table: `int8 576x1536 w4g64 M=1`."""
        return f"{self.mode} {self.rows}x{self.columns} {self.scheme} M={self.tokens}"

    @property
    def act_group(self) -> int:
        """Columns of activations that share a scale; 0: all of a token."""
        return int(self.mode.removeprefix("int8g")) if self.mode.startswith("int8g") else 0


@dataclass(frozen=True)
class Machine:
    """What timings depend on, besides the operation."""

    cpu: str
    cores: int
    isa: str
    kernels: str
    threads: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.cpu}, {threads}, {self.isa}"


def this_machine(threads: int) -> Machine:
    """Raises UsageError when there are no compiled kernels to time."""
    kernels = library.load()
    if kernels is None:
        raise UsageError(
            "latency budgets need the compiled kernels, which there are none of on this machine: "
            "install a C++ compiler (on Debian: apt install g++), or give a size instead"
        )
    return Machine(_processor(), os.cpu_count() or 1, kernels.isa, build.library_name(), threads)


@dataclass
class TimingTable:
    """Milliseconds by key. Keys are those of `Op`, and of others that measure something here.

    problem: why the stored table could not be used, a sentence; empty when it could, or when there
    was none.
    """

    machine: Machine
    path: Path
    ms: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    @staticmethod
    def load(machine: Machine, folder: Path | None = None) -> TimingTable:
        """The table of a machine from `folder` (the user's cache by default), maybe an empty one.

        A file that is damaged or was measured on another machine counts as empty; `problem` says
        so.
        """
        path = (folder or table_folder()) / f"{machine.fingerprint[:16]}.json"
        table = TimingTable(machine, path)
        try:
            table.ms = _read(path, machine)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            table.problem = f"the timings in {path} {error}: they are measured again"
        return table

    def missing(self, ops: Iterable[Op]) -> list[Op]:
        """Those of `ops` that have not been measured, each once, in order."""
        return [op for op in dict.fromkeys(ops) if op.key not in self.ms]

    def measure(
        self, ops: Iterable[Op], clock: Clock | None = None, tick: Tick | None = None
    ) -> None:
        """Measure what is missing of `ops`, with `stopwatch.seconds` unless said, and keep it.

        `tick` is called after each of the ROUNDS * len(missing(ops)) measurements.
        """
        clock = clock or stopwatch.seconds
        missing = self.missing(ops)
        seconds: dict[str, list[float]] = {op.key: [] for op in missing}
        for _ in range(ROUNDS):
            for op in missing:
                seconds[op.key] += clock(op, self.machine.threads, PASSES)
                if tick is not None:
                    tick(op.key)
        self.add({key: 1e3 * undisturbed(times) for key, times in seconds.items()})

    def add(self, ms: Mapping[str, float]) -> None:
        """Put measurements into the table and its file.

        Others may have measured meanwhile: what they wrote is kept. A cache that cannot be written
        costs the next run its time, and nothing else.
        """
        if not ms:
            return
        with contextlib.suppress(OSError, ValueError):
            self.ms = {**_read(self.path, self.machine), **self.ms}
        self.ms.update(ms)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "machine": asdict(self.machine),
            "unit": "ms",
            "ms": dict(sorted(self.ms.items())),
        }
        try:
            _write(self.path, json.dumps(document, indent=1) + "\n")
        except OSError as error:
            self.problem = f"the timings cannot be kept in {self.path}: {error.strerror or error}"


def table_folder() -> Path:
    """Where tables are kept: `quantlib/timing` in the user's cache."""
    return build.cache_folder().with_name("timing")


def _read(path: Path, machine: Machine) -> dict[str, float]:
    """Raises OSError or ValueError, whose text goes on from "the timings in PATH"."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        kind, ms = (data["format"], data["version"]), data["ms"]
        made_on = Machine(**data["machine"])
        numbers = {str(key): float(value) for key, value in ms.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("are damaged") from error
    if kind != (FORMAT, VERSION):
        raise ValueError("are of another version of quantlib")
    if made_on != machine:
        raise ValueError("were measured on another machine")
    if not all(math.isfinite(value) and value > 0 for value in numbers.values()):
        raise ValueError("are damaged")
    return numbers


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _processor() -> str:
    """The processor's name as the system knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
