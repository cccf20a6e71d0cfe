"""How long W4A4KV4 takes a user, from a folder to a checkpoint that runs, by stage.

    python -P -m quantlib.bench.w4a4_time                   two threads, SmolLM2 (`bench.assets`)
    python -P -m quantlib.bench.w4a4_time --model FOLDER --data TEXT --work WORK

The product's own commands, each in a process of its own: `measure --scheme resq --predict rows`
(gradients, bases, statistics, a sample of the roundings, losses of cache formats), `search`,
`apply`. What counts is the wall time of all of them, the imports of three processes included. A
run that was killed goes on where it stopped when --work names its folder, and is then not recorded:
it would look too fast.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantlib.bench import assets, record

NAME = "w4a4_time"
LIMIT = 25 * 60
"""Seconds that the whole may take on two cores."""
BITS, ACTIVATIONS, KV = "4.4", "4.5", "5.2"
WINDOWS, SEQLEN = 24, 512


def commands(model: Path, data: Path, work: Path, out: Path) -> dict[str, list[str]]:
    """What a user types, by the name of the command."""
    how = ["--scheme", "resq", "--activations", ACTIVATIONS, "--kv", KV, "--predict", "rows"]
    size = ["--windows", str(WINDOWS), "--seqlen", str(SEQLEN)]
    given = [str(model), "--data", str(data), "--work", str(work), *size, *how, "--json"]
    limits = ["--bits", BITS, "--activations", ACTIVATIONS, "--json"]
    return {
        "measure": ["measure", *given],
        "search": ["search", "--work", str(work), *limits],
        "apply": ["apply", str(work / "plan.json"), "--output", str(out), "--json"],
    }


def timed(arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Run one command: its wall time, and its stages where it tells them, in seconds.

    Raises SystemExit with what the command said when it fails.
    """
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from quantlib.cli import main; main()", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"quantlib {' '.join(arguments)} failed:\n{done.stderr}")
    told = json.loads(done.stdout)
    row: dict[str, Any] = {"seconds": round(seconds, 1)}
    if isinstance(told.get("seconds"), dict):
        row["stages"] = {name: round(spent, 1) for name, spent in told["seconds"].items()}
    return row


def measure(model: Path, data: Path, work: Path, threads: int) -> dict[str, Any]:
    """Every command's row, the whole, and the checkpoint's size. The checkpoint lies in `work`."""
    out = work / "checkpoint"
    shutil.rmtree(out, ignore_errors=True)
    rows: dict[str, Any] = {}
    for name, arguments in commands(model, data, work, out).items():
        rows[name] = timed(arguments, threads)
        print(f"quantlib {name}: {rows[name]}", flush=True)
    total = sum(row["seconds"] for row in rows.values())
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {
        "commands": rows,
        "seconds": round(total, 1),
        "limit": LIMIT,
        "holds": total <= LIMIT,
        "bytes": size,
    }


def main() -> None:
    """Time all of it once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="default: the calibration text")
    parser.add_argument("--work", type=Path, help="kept; default: a folder that is removed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    model = options.model or assets.fetch_smollm2()
    data = options.data or assets.wikipedia_text("calibration")
    if options.work is not None:
        fresh = not options.work.exists()
        found = measure(model, data, options.work, options.threads)
    else:
        fresh = True
        with tempfile.TemporaryDirectory() as folder:
            found = measure(model, data, Path(folder) / "work", options.threads)
    limits = {"bits": float(BITS), "activations": float(ACTIVATIONS), "kv": float(KV)}
    settings = {"model": model.name, "threads": options.threads, **limits}
    settings |= {"windows": WINDOWS, "seqlen": SEQLEN}
    print(f"{found['seconds'] / 60:.1f} minutes of the {LIMIT / 60:.0f} allowed")
    if fresh:
        print(record.write(NAME, {"settings": settings, **found}))
    else:
        print("not recorded: the work folder was there before")


if __name__ == "__main__":
    main()
