"""Encoders compressed and judged without training anything: MiniLM by the articles that it finds
for their descriptions, DINOv2-small by the kinds of its pictures' nearest neighbours.

    python -P -m quantlib.bench.multimodal_encoders

Every weight is quantized, embeddings and the convolution too. A model has one task, the squared
error of its vectors, and the table shows what that means for what the vectors are used for: each
figure with its change from full precision, which is taken question by question.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlib.bench import artifacts, record
from quantlib.bench.beds.encoders import Scores, judge, open_encoder, text_bed, vision_bed
from quantlib.bench.beds.folders import CALIBRATION, MODEL
from quantlib.bench.packages import console
from quantlib.errors import QuantlibError
from quantlib.evaluation.estimate import Estimate
from quantlib.pipeline.compress import compress

BEDS: dict[str, Callable[[], Path]] = {"MiniLM": text_bed, "DINOv2-small": vision_bed}
BITS = (3.5, 4.5, 6.0)
"""Of every parameter, scales counted."""
PRESET = "fast"
"""Few records and candidates: an encoder has one task, and its rows should take minutes."""


def measure(bed: Path, work: Path, bits: Sequence[float], seeds: int) -> dict[str, Any]:
    """The figures of a bed's model in full precision, and a row for every budget and seed.

    work: gets a work directory for every seed, which serves all budgets. Raises what compressing
    and judging raise.
    """
    kind, model = open_encoder(bed / MODEL)
    before = judge(kind, model, bed)
    rows = []
    for seed in range(seeds):
        for budget in bits:
            console.print(f"Measuring {bed.name} at {budget:g} bits, seed {seed}")
            with tempfile.TemporaryDirectory(prefix=".out-") as scratch:
                result = compress(
                    bed / MODEL,
                    out=Path(scratch, "model"),
                    data=bed / CALIBRATION,
                    work=work / f"{bed.name}-{seed}",
                    bits=budget,
                    seed=seed,
                    preset=PRESET,
                    report=False,
                )
                scores = judge(*open_encoder(result.path), bed)
            rows.append(
                {
                    "bits": budget,
                    "seed": seed,
                    "bytes": result.file_bytes,
                    "true_bits": 8 * result.file_bytes / result.parameters,
                    "figures": _figures(scores),
                    "changes": _figures(_changes(before, scores)),
                }
            )
    return {"full_precision": _figures(before), "rows": rows}


def _figures(scores: Scores) -> dict[str, Any]:
    """Means with their standard errors, as JSON."""
    return {name: Estimate.mean(values).to_json() for name, values in scores.items()}


def _changes(before: Scores, after: Scores) -> Scores:
    """What every question scores more than before."""
    return {
        name: [now - was for was, now in zip(before[name], values, strict=True)]
        for name, values in after.items()
    }


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Of calibration draws, from 0.")] = 1,
) -> None:
    """Measure both, and keep results/encoders.json."""
    try:
        work = artifacts.folder() / "multimodal"
        work.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {}
        for name, bed in BEDS.items():
            found[name] = measure(bed(), work, BITS, seeds)
            path = record.write("encoders", {"preset": PRESET, "models": found})
        print(path)
    except QuantlibError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
