"""The records of a run, by stream: those that are calibrated on, and those that are held back.

Every kind of record is divided once, so what is held back from one stream is seen by none. Streams
draw from the kinds that their route reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantlib.calibration.data import TextSource
from quantlib.calibration.paths.route import Route, Routes
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.records import KINDS, TEXT, Record
from quantlib.calibration.streams import Sample, Stream
from quantlib.errors import DataError
from quantlib.models.listing import some
from quantlib.models.modelmap import ModelMap

HELD_BACK_SHARE = 5
"""Of a kind with few records, one in so many is held back."""
RESERVE = 4
"""How many times a stream's samples are kept as further ones, for experts that saw too little."""
CHARACTERS_PER_TOKEN = 4
"""Of text that is cut into pieces about as long as a sample."""


@dataclass(frozen=True)
class Workload:
    """What a model is calibrated and judged on.

    routes: those that have records, in the family's order; the others are what each of them has,
            by stream. reserve: further records, for experts that saw too little.
    """

    tools: Tools
    routes: tuple[Route, ...]
    calibration: Mapping[str, tuple[Record, ...]]
    held_back: Mapping[str, tuple[Record, ...]]
    reserve: Mapping[str, tuple[Record, ...]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the streams."""
        return tuple(route.stream for route in self.routes)

    def route(self, stream: str) -> Route:
        """The route of a stream. Raises DataError when there is none."""
        for route in self.routes:
            if route.stream == stream:
                return route
        raise DataError(f"there is no stream {stream!r}: there are {', '.join(self.tasks)}")

    def stream(self, name: str, model: Any) -> Stream:
        """A stream of calibration samples; they are made when they are needed."""
        route = self.route(name)
        return Stream(
            name,
            _Samples(self.tools, route, model, self.calibration[name]),
            route.run,
            modalities=route.modalities,
            reserve=_Samples(self.tools, route, model, self.reserve[name]),
        )

    def judging(self, name: str, model: Any) -> Iterator[Sample]:
        """The held-back samples of a stream, as the full-precision model makes them."""
        yield from _Samples(self.tools, self.route(name), model, self.held_back[name])

    def check(self) -> None:
        """Raise DataError for what is wrong with the media, or with the files beside the model."""
        for route in self.routes:
            name = route.stream
            for record in (*self.calibration[name], *self.held_back[name]):
                route.check(self.tools, record)

    def described(self, stream: str, records: Sequence[Record]) -> list[Any]:
        """What the samples of these records depend on, as JSON values to hash."""
        tools = self.tools
        made = [tools.seqlen, tools.guidance, _files_digest(tools)]
        return [stream, made, [_record_digest(record) for record in records]]


@dataclass(frozen=True)
class _Samples:
    """Samples of records, made anew at each iteration: pixels of all are never in memory."""

    tools: Tools
    route: Route
    model: Any
    records: tuple[Record, ...]

    def __iter__(self) -> Iterator[Sample]:
        for record in self.records:
            yield self.route.sample(self.tools, self.model, record)


def divide(
    routes: Routes,
    tools: Tools,
    records: Sequence[Record],
    *,
    components: Collection[str],
    samples: int,
    held_back: int,
    seed: int,
) -> Workload:
    """The workload of a model.

    components: that are quantized: what runs none of them is no stream.
    samples, held_back: the most records of a stream that are calibrated on, and held back.
    Raises DataError for records that the model has no use for, and where a kind has a single one.
    """
    read = {kind for route in routes.routes for kind in route.kinds}
    strange = next((record for record in records if record.kind not in read), None)
    if strange is not None:
        raise DataError(
            f"{strange.where}: a record of kind {strange.kind}, and a model of type "
            f"{tools.config['model_type']} reads {', '.join(sorted(read))}: leave it out"
        )
    kept: dict[str, list[Record]] = {}
    judged: dict[str, list[Record]] = {}
    for number, kind in enumerate(KINDS):
        mine = [record for record in records if record.kind == kind]
        if not mine:
            continue
        if len(mine) == 1:
            raise DataError(
                f"{mine[0].where}: the only record of kind {kind}: one is calibrated on and one "
                "held back, so give at least 2"
            )
        generator = torch.Generator().manual_seed(seed + number)
        drawn = [mine[i] for i in torch.randperm(len(mine), generator=generator).tolist()]
        apart = min(held_back, max(1, len(mine) // HELD_BACK_SHARE))
        judged[kind], kept[kind] = drawn[:apart], drawn[apart:]
    used = tuple(
        route
        for route in routes.routes
        if any(kind in kept for kind in route.kinds) and set(route.reaches) & {*components}
    )
    chosen = {route.stream: _of(kept, route) for route in used}
    return Workload(
        tools,
        used,
        {name: tuple(mine[:samples]) for name, mine in chosen.items()},
        {route.stream: tuple(_of(judged, route)[:held_back]) for route in used},
        {name: tuple(mine[samples : (1 + RESERVE) * samples]) for name, mine in chosen.items()},
    )


def require_reached(model_map: ModelMap, routes: Routes, workload: Workload) -> None:
    """Raise DataError when streams without a record leave components unknown: it says which are
    empty, what that means, and what can be done."""
    reached = {name for route in workload.routes for name in route.reaches}
    wanted = dict.fromkeys(w.component for w in model_map.weights)
    unknown = [name for name in wanted if name not in reached]
    if not unknown:
        return
    helpful = [r for r in routes.routes if r not in workload.routes and set(r.reaches) & {*unknown}]
    if not helpful:
        raise DataError(
            "nothing that quantlib does with a model of type "
            f"{workload.tools.config['model_type']} runs {some(unknown)}: keep them as they are "
            f"with {keep_options(unknown)}"
        )
    empty = ", ".join(f"{route.stream} (records with {_keys(route)})" for route in helpful)
    streams = "the stream" if len(helpful) == 1 else "any of the streams"
    raise DataError(
        f"the calibration data has no record for {streams} {empty}: nothing would be known of "
        f"{', '.join(unknown)}. Add such records, or keep these components as they are with "
        f"{keep_options(unknown)}"
    )


def keep_options(components: Sequence[str]) -> str:
    """What a user adds to a command so that components stay as they are."""
    return " ".join(f"--keep {name}" for name in components)


def text_records(source: TextSource, seqlen: int) -> list[Record]:
    """Plain text as records: its paragraphs, long ones cut into pieces of about `seqlen` tokens."""
    size = max(1, CHARACTERS_PER_TOKEN * seqlen)
    pieces = [
        piece
        for paragraph in source.text.split("\n\n")
        for piece in _pieces(paragraph.strip(), size)
    ]
    return [
        Record(TEXT, f"{source.spec}, piece {number}", piece)
        for number, piece in enumerate(pieces, start=1)
    ]


def _pieces(text: str, size: int) -> Iterator[str]:
    """Pieces of at most about `size` characters, cut behind a space where there is one."""
    while len(text) > size:
        cut = text.rfind(" ", size // 2, size)
        cut = size if cut < 0 else cut
        yield text[:cut]
        text = text[cut:].strip()
    if text:
        yield text


def _of(records: Mapping[str, list[Record]], route: Route) -> list[Record]:
    return [record for kind in route.kinds for record in records.get(kind, [])]


def _keys(route: Route) -> str:
    return " or ".join(", ".join(KINDS[kind]) for kind in route.kinds)


def _record_digest(record: Record) -> list[str]:
    media = "" if record.media is None else _file_digest(record.media)
    return [record.kind, record.text, record.answer, media]


def _files_digest(tools: Tools) -> list[list[str]]:
    """Of the small files beside the model that say how words and media become numbers."""
    kinds = ("token", "vocab", "merges", "preprocessor", "processor", "chat_template", "generation")
    files = sorted(path for path in tools.folder.iterdir() if path.name.startswith(kinds))
    return [[path.name, _file_digest(path)] for path in files if path.is_file()]


def _file_digest(path: Any) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
