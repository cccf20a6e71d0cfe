"""The result of an evaluation in both directions: what a model reads, and what it makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.figures import Figure
from quantlib.search.budget import format_size


@dataclass(frozen=True)
class PicturePair:
    """One prompt, and what the reference and the model drew of it: PNG files as base64.

    before is None without a reference.
    """

    prompt: str
    before: str | None
    after: str


@dataclass(frozen=True)
class SuiteResult:
    """What `evaluate_suite` found, with enough of its circumstances to repeat it.

    records: kind -> how many of them were used. held_back: they are those of the data that
             calibration held back.
    skipped: sentences about what could not be evaluated, and why.
    """

    model: str
    against: str | None
    model_bytes: int
    against_bytes: int | None
    data: str
    data_sha256: str
    judge: str | None
    seed: int
    guidance: float | None
    temperature: float
    records: dict[str, int]
    figures: list[Figure]
    skipped: list[str]
    images: list[PicturePair] = field(default_factory=list)
    seconds: float = 0.0
    held_back: bool = False

    def to_json(self) -> dict[str, Any]:
        """Every field, for `--json` and for the report."""
        return {
            **vars(self),
            "suite": "multimodal",
            "figures": [figure.to_json() for figure in self.figures],
            "images": [vars(pair) for pair in self.images],
        }

    def columns(self) -> tuple[str, ...]:
        """Headings of `rows`."""
        before = Path(self.against).name if self.against else "-"
        return "task", "", before, Path(self.model).name, "change"

    def rows(self) -> list[tuple[str, ...]]:
        """(task, figure, reference, model, change) as text; a task is named once."""
        sizes = "-" if self.against_bytes is None else format_size(self.against_bytes)
        rows: list[tuple[str, ...]] = [
            ("", "weights on disk", sizes, format_size(self.model_bytes), "")
        ]
        before = ""
        for figure in self.figures:
            reference = "-" if figure.reference is None else str(figure.reference)
            change = "" if figure.change is None else _signed(figure.change)
            task = "" if figure.task == before else figure.task
            rows.append((task, figure.name, reference, str(figure.model), change))
            before = figure.task
        return rows

    def footing(self) -> str:
        """On what, and how it was measured."""
        used = ", ".join(f"{count} of kind {kind}" for kind, count in self.records.items())
        seen = " that calibration held back" if self.held_back else ""
        return (
            f"records of {self.data}{seen}: {used}; ± is one standard error over records "
            "(bootstrap), and changes are taken record by record"
        )


def _signed(change: Estimate) -> str:
    return f"+{change}" if change.value > 0 else str(change)
