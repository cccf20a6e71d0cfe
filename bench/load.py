"""How long a large checkpoint takes to load: Llama-3.1-8B's shape, 4.5 GB of random codes.

    python -P -m quantlib.bench.load [--checkpoint OUT] [--rounds N]

Rearranging weights for the kernels is part of loading: nothing is put off but what the first step
allocates for itself, so the time to the first token is kept beside it. Every loading has a process
of its own and stands beside another that reads the files into its memory and does nothing with
them, with their pages dropped before both ("cold") or still there ("warm"); rounds take turns in
which comes first, and what counts is the median of their ratios. Reading through a small buffer is
timed, too, and not judged by. Needs 4.5 GB of disk, and twice as much memory beside the page cache,
unless --checkpoint names another model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlib.bench import artifacts, footprint, record, targets
from quantlib.bench.checkpoints import LLAMA_8B
from quantlib.bench.timing import quartiles
from quantlib.errors import QuantlibError

STATES = ("cold", "warm")
MOST_READS = 2.0
"""Promised: loading takes at most so many times what reading the files into memory takes."""


def measure(model: str, checkpoint: Path, rounds: int) -> dict[str, Any]:
    """All rounds, their medians, and whether the promises are kept."""
    rows = []
    for index in range(rounds):
        found = footprint.measure(checkpoint, load_first=index % 2 == 1)
        rows.append({"model": model, **found})
        print(_sentence(rows[-1]), flush=True)
    medians = {state: _medians(rows, state) for state in STATES}
    worst = max(rows, key=lambda row: row["resident_bytes"])
    allowed = 1.1 * worst["bytes"] + targets.SPARE_BYTES
    used = max(worst["resident_bytes"], 1)  # a small model may fit into what is there already
    judged = [
        targets.Target(
            model, f"twice the time to read over loading, {state}", MOST_READS / found["reads"], 1.0
        )
        for state, found in medians.items()
    ]
    judged.append(targets.Target(model, "memory allowed over used", allowed / used, 1.0))
    return {
        "model": model,
        "rounds": rounds,
        "medians": medians,
        "rows": rows,
        "targets": [target.to_json() for target in judged],
    }


def _medians(rows: Sequence[Mapping[str, Any]], state: str) -> dict[str, float]:
    """Of one state: seconds to read, to read into memory, to load, to the first token, and loading
    over reading into memory."""
    names = ("read_s", "keep_s", "load_s", "first_token_s")
    found = {name: quartiles([row[f"{name}_{state}"] for row in rows]).median for name in names}
    ratios = [row[f"load_s_{state}"] / row[f"keep_s_{state}"] for row in rows]
    return {**found, "reads": quartiles(ratios).median}


def _sentence(row: Mapping[str, Any]) -> str:
    parts = [
        f"{state}: read in {row[f'read_s_{state}']:.2f} s, into memory in "
        f"{row[f'keep_s_{state}']:.2f} s, loaded in {row[f'load_s_{state}']:.2f} s"
        f", first token after {row[f'first_token_s_{state}']:.2f} s"
        for state in STATES
    ]
    return (
        f"{row['bytes'] / 1e9:.2f} GB; {'; '.join(parts)}; "
        f"{row['resident_bytes'] / 1e9:.2f} GB resident"
    )


def main() -> None:
    """Measure and keep the result. Raises QuantlibError when the model cannot be loaded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="a packed checkpoint that the engine runs")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.checkpoint is not None:
        found = measure(options.checkpoint.name, options.checkpoint, options.rounds)
    else:
        artifacts.folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=artifacts.folder()) as scratch:
            checkpoint = artifacts.llama_8b(Path(scratch))
            found = measure(LLAMA_8B.name, checkpoint, options.rounds)
    print(record.write("load", found))


if __name__ == "__main__":
    try:
        main()
    except QuantlibError as error:
        raise SystemExit(str(error)) from error
