"""What whole models are worth at equal bytes: every part measured, against a language model's bits.

    python -P -m quantlib.bench.multimodal speech            all rows of a bed, then its result file
    python -P -m quantlib.bench.multimodal vlm --part budgets --seeds 1
    python -P -m quantlib.bench.multimodal speech --list     what is measured, and what is missing

For every budget and seed a bed's model (`bench.beds`) is compressed twice to the same file size:
`whole` lets the search spend the bytes on all components, `language model only` on the language
model, its embeddings and its head, with the rest in 16 bits. Both are judged on records nobody
calibrated on, against the full-precision model (`quantlib eval --suite multimodal`). Ablations
leave one thing out, at the middle budget; `speech` also has GPTQ with 5 bits for every linear.

A row is kept as soon as it is measured, so the command can be stopped and goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from quantlib.bench import artifacts, record
from quantlib.bench.comparisons import (
    ABLATIONS,
    BEDS,
    LANGUAGE_ONLY,
    WHOLE,
    Bed,
    Method,
    request,
    tasks_of,
)
from quantlib.bench.multimodal_table import compared, table
from quantlib.calibration.records import read_records
from quantlib.checkpoint.disk import atomic_write_text, read_json
from quantlib.errors import CheckpointError, DataError, QuantlibError, SearchError, UsageError
from quantlib.evaluation.multimodal import evaluate_suite
from quantlib.evaluation.passes import Options
from quantlib.models.source import Source
from quantlib.pipeline.compress import compress

PARTS = ("budgets", "ablations", "further")
JUDGE = "judge.safetensors"
LIMIT = 100
"""Test records of each stream."""

console = Console(stderr=True)


@dataclass(frozen=True)
class Row:
    """One model that is measured: a method in a bed under a budget (bits of every parameter)."""

    bed: Bed
    method: Method
    bits: float
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.method.name.replace(' ', '-')}-{self.bits:g}-{self.seed}"

    def folder(self) -> Path:
        """Where rows and work directories of the bed lie."""
        return artifacts.folder() / "multimodal" / self.bed.name


def rows_of(bed: Bed, parts: Iterable[str], seeds: int, kinds: set[str]) -> list[Row]:
    """All rows of some parts. kinds: of the bed's records; an ablation that would leave out what
    the bed has none of, or all it has, is left out itself."""
    found = []
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"unknown part {part!r}: use {', '.join(PARTS)}")
        for seed in range(seeds):
            if part == "budgets":
                methods = (WHOLE, LANGUAGE_ONLY)
                found += [Row(bed, m, bits, seed) for bits in bed.bits for m in methods]
            elif part == "ablations":
                applicable = [m for m in ABLATIONS if _differs(m, kinds)]
                found += [Row(bed, m, bed.middle, seed) for m in (WHOLE, *applicable)]
            elif bed.further:
                found += [Row(bed, m, bed.middle, seed) for m in (WHOLE, *bed.further)]
    return list({row.name: row for row in found}.values())


def _differs(method: Method, kinds: set[str]) -> bool:
    if method.kinds is None:
        return len(kinds) > 1 or not method.first_task
    return set() < kinds & set(method.kinds) < kinds


def measured(row: Row, limit: int, *, again: bool = False) -> dict[str, Any]:
    """The figures of a row: those that are kept, if nothing they depend on has changed.

    limit: the most test records of a stream. again: measure anyway.
    Raises a QuantlibError when compressing or evaluating fails, except for a budget that no
    allocation fits: the row then says so.
    """
    key = key_of(row, limit)
    file = row.folder() / "rows" / f"{row.name}.json"
    kept = kept_row(file)
    if kept is not None and kept["key"] == key and not again:
        return kept
    console.print(f"Measuring {row.method.name} at {row.bits:g} bits, seed {row.seed}")
    found = {
        "key": key,
        "method": row.method.name,
        "bits": row.bits,
        "seed": row.seed,
        **_measure(row, limit),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps(found, indent=1) + "\n")
    return found


def kept_row(file: Path) -> dict[str, Any] | None:
    """A row that was measured before, None when there is none that can be read."""
    try:
        found = read_json(file)
    except CheckpointError:
        return None
    return found if "key" in found else None


def key_of(row: Row, limit: int) -> str:
    """sha256 over what a row depends on: the model, the records, the method, the settings."""
    bed = row.bed.folder()
    records = [bed / "calibration.jsonl", bed / "test.jsonl"]
    parts = [
        *(hashlib.sha256(file.read_bytes()).hexdigest() for file in records),
        *(Source.open(bed / "model").fingerprint, repr(row.method), row.bits, row.seed, limit),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _measure(row: Row, limit: int) -> dict[str, Any]:
    """Compress and evaluate; the checkpoint is deleted, the work directory serves the next
    budget."""
    bed, place = row.bed.folder(), row.folder()
    place.mkdir(parents=True, exist_ok=True)
    asked = request(row.method, bed, place / "records")
    tasks = tasks_of(Source.open(bed / "model"), read_records(asked.data))
    arguments = asked.arguments(tasks)
    shared = json.dumps([str(asked.data), asked.keep, dict(row.method.recipe), row.method.pins])
    work = place / f"work-{hashlib.sha256(shared.encode()).hexdigest()[:12]}-{row.seed}"
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".out-", dir=place) as scratch:
        try:
            result = compress(
                bed / "model",
                out=Path(scratch, "model"),
                work=work,
                bits=row.bits,
                seed=row.seed,
                report=False,
                **arguments,
            )
        except SearchError as error:
            return {"infeasible": str(error)}
        seconds = time.monotonic() - started
        judge = bed / JUDGE
        figures = evaluate_suite(
            result.path,
            bed / "model",
            bed / "test.jsonl",
            judge=judge if judge.is_file() else None,
            limit=limit,
            options=Options(seed=0),
        )
    return {
        "bytes": result.file_bytes,
        "true_bits": 8 * result.file_bytes / result.parameters,
        "kept_in_16_bits": list(asked.keep),
        "seconds": round(seconds, 1),
        "predicted": dict(result.plan.predicted),
        "figures": [figure.to_json() for figure in figures.figures],
        "skipped": figures.skipped,
    }


def main(
    bed: Annotated[str, typer.Argument(help=f"One of {', '.join(BEDS)}.")],
    part: Annotated[
        list[str] | None, typer.Option(help=f"Only this part, of {', '.join(PARTS)}. Repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of calibration draws, from 0.")] = 3,
    bits: Annotated[
        list[float] | None, typer.Option(help="Only rows of this budget. May be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Test records of each stream.")] = LIMIT,
    again: Annotated[bool, typer.Option(help="Measure rows that are kept, too.")] = False,
    only_list: Annotated[
        bool, typer.Option("--list", help="Print the rows and whether they are there.")
    ] = False,
) -> None:
    """Measure a test-bed and write bench/results/multimodal_BED.json.

    Example: python -P -m quantlib.bench.multimodal speech --part budgets --seeds 1
    """
    try:
        if bed not in BEDS:
            raise UsageError(f"unknown bed {bed!r}: use {', '.join(BEDS)}")
        _run(BEDS[bed], part or list(PARTS), seeds, set(bits or ()), limit, again, only_list)
    except QuantlibError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from error


def _run(
    bed: Bed,
    parts: Sequence[str],
    seeds: int,
    bits: set[float],
    limit: int,
    again: bool,
    only_list: bool,
) -> None:
    kinds = {one.kind for one in read_records(bed.folder() / "calibration.jsonl")}
    rows = [row for row in rows_of(bed, parts, seeds, kinds) if not bits or row.bits in bits]
    if not rows:
        raise DataError(f"nothing of bed {bed.name} fits --part and --bits")
    if only_list:
        for row in rows:
            kept = kept_row(row.folder() / "rows" / f"{row.name}.json")
            there = kept is not None and kept["key"] == key_of(row, limit)
            print(f"{'measured' if there else 'missing '}  {row.name}")
        return
    found = [measured(row, limit, again=again) for row in rows]
    comparison = compared(found)
    print(table(comparison))
    path = record.write(
        f"multimodal_{bed.name}",
        {
            "bed": bed.name,
            "test_records": limit,
            "methods": {row.method.name: row.method.says for row in rows},
            "comparison": comparison,
            "rows": [
                {name: value for name, value in row.items() if name != "key"} for row in found
            ],
        },
    )
    console.print(f"wrote {path.name}")


if __name__ == "__main__":
    typer.run(main)
