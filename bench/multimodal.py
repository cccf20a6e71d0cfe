"""What whole models are worth at equal bytes: every part measured, against a language model's bits.

    python -P -m quantlib.bench.multimodal speech            all rows of a bed, then its result file
    python -P -m quantlib.bench.multimodal vlm --part budgets --seeds 1
    python -P -m quantlib.bench.multimodal speech --list     what is measured, and what is missing

For every budget and seed a bed's model (`bench.beds`) is compressed twice to one file size (less
where every weight has its best candidate already): `whole` lets the search spend the bytes on all
components, `language model only` on the language model, its embeddings and its head, with the rest
in 16 bits. Both are judged on records nobody calibrated on, against the full-precision model
(`quantlib eval --suite multimodal`). Ablations leave one thing out, at the middle budget; `speech`
also has GPTQ with 5 bits for every linear.

A row is kept as soon as it is measured, and the result file with it, so the command can be stopped
and goes on where it was. A machine whose cache is empty goes on where the result file is: rows have
keys there, which name nothing of a machine.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
)
from quantlib.bench.multimodal_measure import Judging, compressed
from quantlib.bench.multimodal_table import by_task, compared, points_lost, table
from quantlib.calibration.records import read_records
from quantlib.checkpoint.disk import atomic_write_text, read_json
from quantlib.errors import CheckpointError, DataError, QuantlibError, SearchError, UsageError
from quantlib.models.source import Source
from quantlib.pipeline.reround_whole import REROUND_WHOLE_VERSION
from quantlib.pipeline.run import ROUNDING_VERSION, STATISTICS_VERSION
from quantlib.recipe import Recipe

PARTS = ("budgets", "ablations", "further")
SEEDS = 3
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

    @property
    def file(self) -> Path:
        """Where its figures are kept."""
        return self.folder() / "rows" / f"{self.name}.json"


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


def measured(row: Row, judging: Judging, *, again: bool = False) -> dict[str, Any]:
    """The figures of a row: those that are kept, if nothing they depend on has changed.

    judging: of the row's bed. again: measure anyway.
    Raises a QuantlibError when compressing or evaluating fails, except for a budget that no
    allocation fits: the row then says so.
    """
    kept = kept_row(row, judging.limit)
    if kept is not None and not again:
        return kept
    console.print(f"Measuring {row.method.name} at {row.bits:g} bits, seed {row.seed}")
    found = {
        "key": key_of(row, judging.limit),
        **record.when_and_where(),
        "method": row.method.name,
        "bits": row.bits,
        "seed": row.seed,
        **_measure(row, judging),
    }
    row.file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(row.file, json.dumps(found, indent=1) + "\n")
    return found


def state_of(row: Row, limit: int) -> str:
    """What is known of a row: "measured", "stale" (something has changed since) or "missing"."""
    if kept_row(row, limit) is not None:
        return "measured"
    return "stale" if _read(row) else "missing"


def kept_row(row: Row, limit: int) -> dict[str, Any] | None:
    """The figures of a row that was measured before; None when there are none that can be read, or
    when something that they depend on has changed."""
    known = _read(row)
    key = key_of(row, limit) if known else None
    return next((found for found in known if found.get("key") == key), None)


def _read(row: Row) -> list[dict[str, Any]]:
    """What is known of a row, whatever it depends on: this machine's figures, if they can be read,
    then those of the result file."""
    try:
        mine = [read_json(row.file)]
    except CheckpointError:
        mine = []
    named = (row.method.name, row.bits, row.seed)
    written = _written(row.bed)
    return [*mine, *(r for r in written if (r["method"], r["bits"], r["seed"]) == named)]


def _written(bed: Bed) -> list[dict[str, Any]]:
    """The rows of a bed's result file; none where there is no such file. Raises CheckpointError
    when it is damaged: its rows would be lost by writing over it."""
    path = record.path_of(_name(bed))
    if not path.exists():
        return []
    found = path.stat()
    return _rows_in(path, (found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=len(BEDS))
def _rows_in(path: Path, _: tuple[int, ...]) -> list[dict[str, Any]]:
    """The rows of a file, read once for all who ask; _: tells one state of the file from others."""
    file = read_json(path)
    return [*file.get("rows", ()), *file.get("stale_rows", ())]


def _name(bed: Bed) -> str:
    """Of its result file."""
    return f"multimodal_{bed.name}"


def key_of(row: Row, limit: int) -> str:
    """sha256 over what a row depends on: the model, the records, the method, the settings (those
    that are the recipe's own, too), and the versions of what is done with them.

    Settings that are off do not count: what a recipe learns to do later leaves older rows as they
    are, as long as nobody asks for it.
    """
    bed = row.bed.folder()
    recipe = Recipe.create(data="-", **row.bed.fields(row.method)).for_streams()
    settings = {name: value for name, value in recipe.model_dump(mode="json").items() if value}
    records = [bed / "calibration.jsonl", bed / "test.jsonl"]
    parts = [
        *(hashlib.sha256(file.read_bytes()).hexdigest() for file in records),
        *(Source.open(bed / "model").fingerprint, repr(row.method), row.bits, row.seed, limit),
        *(row.bed.plain, settings, recipe.stream_weighting),
        *(recipe.damping_of(streams=True), row.bed.version),
        *(STATISTICS_VERSION, ROUNDING_VERSION),
        *([REROUND_WHOLE_VERSION] if recipe.refine else []),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _measure(row: Row, judging: Judging) -> dict[str, Any]:
    """Compress and evaluate; the checkpoint is deleted, the work directory serves the next
    budget."""
    bed, place = row.bed.folder(), row.folder()
    place.mkdir(parents=True, exist_ok=True)
    asked = request(row.method, bed, place / "records")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".out-", dir=place) as scratch:
        out = Path(scratch, "model")
        try:
            packed = compressed(asked, row.bed, place, out, row.bits, row.seed)
        except SearchError as error:
            return {"infeasible": str(error)}
        seconds = time.monotonic() - started
        return {
            "bytes": packed.nbytes,
            "true_bits": packed.bits,
            "kept_in_16_bits": list(packed.kept),
            "left_in_16_bits": packed.left,
            "seconds": round(seconds, 1),
            "predicted": packed.predicted,
            **judging.figures(out),
        }


def main(
    bed: Annotated[str, typer.Argument(help=f"One of {', '.join(BEDS)}.")],
    part: Annotated[
        list[str] | None, typer.Option(help=f"Only this part, of {', '.join(PARTS)}. Repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of calibration draws, from 0.")] = SEEDS,
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
            print(f"{state_of(row, limit):8}  {row.name}")
        return
    everything = rows_of(bed, PARTS, max(seeds, SEEDS), kinds)
    with Judging(bed, limit) as judging:
        for row in rows:
            measured(row, judging, again=again)
            path = write_results(bed, everything, limit)
    print(table(read_json(path)["comparison"]))
    console.print(f"wrote {path.name}")


def write_results(bed: Bed, rows: Sequence[Row], limit: int) -> Path:
    """The result file of a bed, from all of these rows that are there: another part or seed that
    was measured earlier stays in it. Rows that are stale stay, too, and are compared with
    nothing."""
    known = {row.name: kept for row in rows if (kept := kept_row(row, limit)) is not None}
    found = list(known.values())
    stale = [older[0] for row in rows if row.name not in known and (older := _read(row))]
    comparison = compared(found)
    return record.write(
        _name(bed),
        {
            "bed": bed.name,
            "test_records": limit,
            "methods": {r.method.name: r.method.says for r in rows if r.name in known},
            "by_task": by_task(found),
            "points_lost": points_lost(comparison),
            "comparison": comparison,
            "rows": found,
            "stale_rows": stale,
        },
    )


if __name__ == "__main__":
    typer.run(main)
