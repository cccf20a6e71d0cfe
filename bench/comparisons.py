"""What `bench.multimodal` compares: the beds, their budgets, and ways to spend the same bytes.

A method changes what quantlib is told and nothing else: data, rounding, candidates and the size of
the file are the same, so a difference is the method's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlib.bench.beds import speech, unified, unified_continuous, vlm
from quantlib.calibration.paths import find
from quantlib.calibration.records import GENERATION, KINDS, TEXT, Record, read_records
from quantlib.checkpoint.disk import atomic_write_text
from quantlib.errors import DataError
from quantlib.models.families import EMBEDDINGS, HEAD, LANGUAGE_MODEL
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.recipe import NATIVE_SCHEMES
from quantlib.search.tasks import Objective

WORDS = (LANGUAGE_MODEL, EMBEDDINGS, HEAD)
"""Components that tools for language models compress."""
GUARDS = (0.25, 0.5, 1.0)
"""Shares for guarded methods; the first that a plan can keep is taken. A predicted loss may be off
by a factor of four (the intervals of `answer` in the bed `unified`), and so may the ratio of two:
what is predicted to be a little less could be more."""
UNIFORM_LINEARS = "linear=w5g64zs5"
QUICK = {
    "windows": 16,
    "passes": 1,
    "probes": 4,
    "probe_windows": 4,
    "schemes": ("w2g32z4s4", "w3g32z4s4", "w4g32zs4", "w5g32zs5", "w6g32zs6", "w8g64zs6"),
}
"""Of a recipe for the bed that is twenty times as large as the others: few records and candidates,
so that a seed's six rows take minutes of one core."""


@dataclass(frozen=True)
class Method:
    """One way to spend the bytes.

    says:    what it is, for the reader of the table.
    kinds:   of the records that are calibrated on; None: all.
    only:    components that are quantized, the others kept in 16 bits; None: all.
    plain:   components that its records do not run, of whose inputs nothing is known, are rounded
             to the nearest, to the bed's `plain`. False: they are kept in 16 bits.
    recipe:  fields of the recipe. pins: as --pin takes them.
    first_task: the objective is the model's first task, and no other.
    guarded: no task is predicted to lose more than a share (GUARDS) of what it loses when the bytes
             are spent on WORDS alone, where they suffice for that: what would be a victory of one
             task over another is none.
    """

    name: str
    says: str
    kinds: tuple[str, ...] | None = None
    only: tuple[str, ...] | None = None
    plain: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    pins: tuple[str, ...] = ()
    first_task: bool = False
    guarded: bool = False

    def records(self, records: Iterable[Record]) -> list[Record]:
        """Those it calibrates on."""
        return [record for record in records if self.kinds is None or record.kind in self.kinds]


WHOLE = Method(
    "whole",
    "all components, every task measured; no task is predicted to lose more than a quarter of what "
    "it loses with bits for the language model alone (half, or as much, where that is impossible)",
    guarded=True,
)
LANGUAGE_ONLY = Method(
    "language model only", "bits for the language model's weights, the rest in 16", only=WORDS
)
ABLATIONS = (
    Method(
        "no generation",
        "calibrated without generating: what only generation runs is rounded to the nearest",
        kinds=tuple(kind for kind in KINDS if kind != GENERATION),
        plain=True,
    ),
    Method(
        "text only",
        "calibrated on text: what text does not run is rounded to the nearest",
        kinds=(TEXT,),
        plain=True,
    ),
    Method("unweighted", "Hessians of all tokens alike", recipe={"weighting": "none"}),
    Method("one task", "the first task counts, and no other", first_task=True),
)
UNIFORM = Method(
    "uniform linears",
    "plain GPTQ of all linears to 5 bits, embeddings and convolutions cut to fit the size",
    recipe={"weighting": "none", "passes": 0, "schemes": NATIVE_SCHEMES},
    pins=(UNIFORM_LINEARS,),
)


REFINED = Method(
    "whole refined",
    "the plan of `whole`, its blocks rounded again with the inputs that rounded parts produce",
    recipe={"refine": True},
    guarded=True,
)


@dataclass(frozen=True)
class Bed:
    """A test-bed: its folder, and budgets in bits of every parameter (scales counted).

    middle:  the budget that ablations are run at.
    plain:   scheme, within that budget, of what a method rounds to the nearest.
    further: methods to compare with, at the middle budget, that make sense in this bed.
    recipe:  fields of the recipe that all its methods share, where the defaults take too long.
    version: raise when the same request comes to be compressed or judged in another way than
             before: rows of an older one are stale. 2: weights may stay in 16 bits, embeddings have
             blocks of rows, and factors are fitted with other components as they are. 3: blocks of
             rows have a factor of their own, which changes beds with a large vocabulary. 5: blocks
             of every narrowest width have one, and Whisper's encoder positions are a weight.
    """

    name: str
    folder: Callable[[], Path]
    bits: tuple[float, ...]
    middle: float
    plain: str
    further: tuple[Method, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    version: int = 2

    def fields(self, method: Method) -> dict[str, Any]:
        """Of the recipe, where a method is not told otherwise."""
        return {**self.recipe, **method.recipe}


# Of the unified models two thirds and a half are no language model: what is left in 16 bits there
# takes 10 and 8 bits of every parameter. Below that only `whole` can be had, and the three larger
# budgets are those at which the language model gets some 3, 4 and 6 bits. Of Whisper the encoder
# is a fifth, and 5 bits are less than it leaves the rest.
BEDS = {
    bed.name: bed
    for bed in (
        Bed(
            "unified",
            unified.BED.fetch,
            (3.0, 3.5, 4.5, 11.25, 11.75, 12.5),
            3.5,
            "w3g64z4s4",
            (REFINED,),
        ),
        Bed(
            "unified-continuous",
            unified_continuous.BED.fetch,
            (3.5, 4.5, 9.25, 10.0, 11.0),
            3.5,
            "w3g64z4s4",
        ),
        Bed("vlm", vlm.bed, (4.5, 5.25, 6.0), 4.5, "w4g64z5s5", recipe=QUICK, version=3),
        Bed(
            "speech",
            speech.bed,
            (5.0, 5.5, 6.0, 7.0),
            5.0,
            "w4g64z5s5",
            (UNIFORM, REFINED),
            recipe={"windows": speech.CLIPS},
            version=5,
        ),
    )
}


@dataclass(frozen=True)
class Request:
    """What a method asks of the pipeline in a bed.

    data:   its file of records.
    unread: components with weights that these records do not run.
    spared: components that the method leaves in 16 bits, though something is known of them.
    """

    data: Path
    unread: tuple[str, ...]
    spared: tuple[str, ...]
    method: Method

    @property
    def kept(self) -> tuple[str, ...]:
        """Components that stay in 16 bits."""
        unread = () if self.method.plain else self.unread
        return tuple(sorted({*unread, *self.spared}))

    def objective(self, tasks: Iterable[str]) -> Objective:
        """What is minimised. tasks: the model's, in order."""
        others = list(tasks)[1:] if self.method.first_task else []
        return Objective(dict.fromkeys(others, 0.0))


def request(method: Method, bed: Path, work: Path) -> Request:
    """What a method asks for in a bed.

    work: gets the records, if they are not all of the bed's. Raises DataError when a method leaves
    no record, ModelError as `ModelMap.from_source`.
    """
    source = Source.open(bed / "model")
    everything = read_records(bed / "calibration.jsonl")
    chosen = method.records(everything)
    if not chosen:
        raise DataError(f"{method.name}: {bed.name} has no record of kind {method.kinds}")
    model_map = ModelMap.from_source(source)
    weights = {weight.component for weight in model_map.weights}
    unread = unreached(source, model_map, chosen) & weights
    spared = set() if method.only is None else weights - {*method.only} - unread
    data = bed / "calibration.jsonl"
    if len(chosen) < len(everything):
        data = work / f"{method.name.replace(' ', '-')}.jsonl"
        write_chosen(chosen, data)
    return Request(data, tuple(sorted(unread)), tuple(sorted(spared)), method)


def unreached(source: Source, model_map: ModelMap, records: Iterable[Record]) -> set[str]:
    """Components that records of these kinds do not run."""
    kinds = {record.kind for record in records}
    routes = find(source.model_type)
    reached = {
        name
        for route in (routes.routes if routes else ())
        if kinds & set(route.kinds)
        for name in route.reaches
    }
    return {component.name for component in model_map.components()} - reached


def tasks_of(source: Source, records: Iterable[Record]) -> list[str]:
    """The tasks that a model has records for, in its family's order."""
    kinds = {record.kind for record in records}
    routes = find(source.model_type)
    return [route.stream for route in (routes.routes if routes else ()) if kinds & {*route.kinds}]


def write_chosen(records: Iterable[Record], path: Path) -> None:
    """A file of records that lie elsewhere: their media by absolute paths."""
    rows = []
    for record in records:
        row: dict[str, Any] = dict(record.extra)
        for key in KINDS[record.kind]:
            if key in ("image", "audio", "target"):
                row[key] = str(record.file.resolve())
            else:
                row[key] = record.answer if key == "answer" else record.text
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, "".join(rows))
