"""Both directions of a multimodal model by one command: what it understands, and what it makes.

The full-precision model goes first and prepares the questions; what it said stays on the disk, and
its memory is given back before the other model is opened. Which figures apply follows from what the
model's type does (`calibration.paths`) and from the kinds of records; what cannot be evaluated is
said in a sentence.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlib.calibration.records import Record, read_records
from quantlib.errors import UsageError
from quantlib.evaluation.compare import (
    StageProgress,
    is_packed,
    load_dense,
    model_folder,
    weight_bytes,
)
from quantlib.evaluation.findings import Found, Truth, all_figures, side_by_side, used_records
from quantlib.evaluation.judge import load_judge
from quantlib.evaluation.passes import Options, Questions, prepare, run, truth
from quantlib.evaluation.suite import SuiteResult
from quantlib.runtime.media import Media

OpenModel = Callable[[Path], Any]
"""Folder -> model in memory."""

SEQLEN = 512
"""Most tokens of a text that are scored."""


@dataclass(frozen=True)
class Given:
    """What is evaluated with.

    data:  a file of records. judge: a file of `evaluation.judge`, for pictures.
    limit: the most records of a stream.
    load:  opens a folder, if not as `open_model` does.
    chosen: the `Record.where` of the records that are used, as calibration held them back; None:
           all.
    """

    data: str | Path
    judge: str | Path | None = None
    limit: int = 64
    options: Options = field(default_factory=Options)
    load: OpenModel | None = None
    progress: StageProgress | None = None
    chosen: Collection[str] | None = None

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise UsageError(f"limit is {self.limit}: use 1 record or more")

    def records(self) -> list[Record]:
        """Those that are used. Raises DataError as `read_records`."""
        found = read_records(self.data)
        return [r for r in found if self.chosen is None or r.where in self.chosen]

    def open(self, folder: Path) -> Any:
        """The model of a folder, in memory."""
        return (self.load or open_model)(folder)


class Baseline:
    """The questions, and what the full-precision model did with them: once, for several models.

        with Baseline("model", Given("test.jsonl")) as baseline:
            for out in checkpoints:
                print(baseline.evaluate(out).rows())

    It keeps samples in memory and log-probabilities on the disk, and no model.
    """

    def __init__(self, against: str | Path, given: Given) -> None:
        """Raises as `evaluate_suite`."""
        self.folder, self.given = model_folder(against), given
        media, self.questions, self.true = _asked(self.folder, given)
        ticks = _ticks(given, "reference", self.questions)
        self.reference = run(media, self.questions, None, True, ticks)

    def evaluate(self, model: str | Path) -> SuiteResult:
        """The figures of a folder beside this."""
        began, target = time.monotonic(), model_folder(model)
        gc.collect()  # the other model's memory, before this one is opened
        media = _second(self.given.open(target), self.folder, target)
        ticks = _ticks(self.given, "model", self.questions)
        ours = run(media, self.questions, self.reference, False, ticks)
        found = Found(self.questions, ours, self.reference, self.true)
        return _result(target, self.folder, self.given, media, found, began)

    def close(self) -> None:
        """Give the disk space back."""
        self.reference.close()

    def __enter__(self) -> Baseline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def evaluate_suite(
    model: str | Path,
    against: str | Path | None,
    data: str | Path,
    *,
    judge: str | Path | None = None,
    limit: int = 64,
    options: Options | None = None,
    load: OpenModel | None = None,
    progress: StageProgress | None = None,
    chosen: Collection[str] | None = None,
) -> SuiteResult:
    """Evaluate the folder `model`, against the folder `against` if given, on records of `data`.

    Either folder holds a model of transformers or a packed checkpoint; processors and tokenizer are
    those of `against`, where there is one. The other arguments are fields of `Given`.
    Raises UsageError when nothing applies, DataError for records, media or a judge that cannot be
    used, ModelError and CheckpointError for folders.
    """
    began, target = time.monotonic(), model_folder(model)
    given = Given(data, judge, limit, options or Options(), load, progress, chosen)
    if against is not None:
        with Baseline(against, given) as baseline:
            return replace(baseline.evaluate(model), seconds=time.monotonic() - began)
    media, questions, true = _asked(target, given)
    ours = run(media, questions, None, False, _ticks(given, "model", questions))
    return _result(target, None, given, media, Found(questions, ours, None, true), began)


def _asked(folder: Path, given: Given) -> tuple[Media, Questions, Truth]:
    """The model of a folder, and the questions as it prepares them."""
    records = given.records()
    judge = None if given.judge is None else load_judge(given.judge)
    media = Media.of(given.open(folder), folder, SEQLEN)
    questions = prepare(media, records, judge, given.options, given.limit)
    return media, questions, {name: truth(media, a) for name, a in questions.streams.items()}


def _result(
    target: Path, base: Path | None, given: Given, media: Media, found: Found, began: float
) -> SuiteResult:
    options = given.options
    guidance = media.tools.guidance if options.guidance is None else options.guidance
    figures, skipped = all_figures(found)
    return SuiteResult(
        model=str(target),
        against=None if base is None else str(base),
        model_bytes=weight_bytes(target),
        against_bytes=None if base is None else weight_bytes(base),
        data=str(given.data),
        held_back=given.chosen is not None,
        data_sha256=hashlib.sha256(Path(given.data).expanduser().read_bytes()).hexdigest(),
        judge=None if given.judge is None else str(given.judge),
        seed=options.seed,
        guidance=guidance if found.questions.drawn else None,
        temperature=options.temperature,
        records=used_records(found.questions),
        figures=figures,
        skipped=[*found.questions.skipped, *skipped],
        images=side_by_side(found),
        seconds=time.monotonic() - began,
    )


def _second(model: Any, base: Path, target: Path) -> Media:
    """The model to evaluate with the reference's tokenizer and processors, which made the
    questions."""
    media = Media.of(model, base, SEQLEN)
    theirs, ours = media.tools.config["model_type"], model.config.model_type
    if theirs != ours:
        raise UsageError(
            f"{target} is of type {ours!r} and {base} of type {theirs!r}: they cannot be compared; "
            "give the model it was made from"
        )
    return media


def open_model(folder: Path) -> Any:
    """A packed checkpoint by the runtime, any other folder by transformers in float32."""
    if not is_packed(folder):
        return load_dense(folder)[0]
    from quantlib.runtime.load import load

    return load(folder, engine="plain").model


def _ticks(given: Given, stage: str, questions: Questions) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if given.progress is not None:
            given.progress(stage, done, questions.steps)

    return tick
