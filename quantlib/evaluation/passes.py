"""One model through everything that is evaluated: what is given, what it says, what it makes.

`Questions` are prepared once, by the full-precision model where there is one: tokens, pixels, and
the image codes that its own encoder makes of true pictures. Both models then get the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quantlib.calibration.objectives import TokenObjective, VectorObjective
from quantlib.calibration.paths.route import ANSWER, HEARING, Route, objective
from quantlib.calibration.records import GENERATION, KINDS, SPEECH, Record
from quantlib.calibration.streams import Sample
from quantlib.errors import UsageError
from quantlib.evaluation.judge import Judge
from quantlib.evaluation.observe import Observed, Tick, observe
from quantlib.runtime.media import Media
from quantlib.runtime.media_images import shown

IMAGE, DECODER, GUIDED = "image", "decoder", "image under guidance"
"""Streams with a meaning here; the last is the first, with the rows that drawing has, too."""


@dataclass(frozen=True)
class Options:
    """How answers are written and pictures drawn.

    shown: pictures that are drawn where no judge looks at them.
    """

    seed: int = 0
    guidance: float | None = None
    temperature: float = 1.0
    max_new_tokens: int = 128
    shown: int = 8


@dataclass(frozen=True)
class Asked:
    """One stream: records, and their samples in the same order."""

    route: Route
    records: Sequence[Record]
    samples: Sequence[Sample]

    @property
    def task(self) -> str:
        """The stream's name; "speech" for answers about sounds."""
        heard = self.route.stream in (ANSWER, HEARING) and SPEECH in self.route.kinds
        return "speech" if heard else self.route.stream


@dataclass(frozen=True)
class Questions:
    """All that both models are asked.

    streams: by name. drawn: records whose pictures are drawn; their prompts are `draw`'s list.
    skipped: sentences about what is not evaluated.
    """

    streams: Mapping[str, Asked]
    drawn: Sequence[Record]
    judge: Judge | None
    options: Options
    skipped: Sequence[str]

    @property
    def steps(self) -> int:
        """Of one model's pass, for a progress bar."""
        samples = sum(len(asked.samples) for asked in self.streams.values())
        return samples + sum(map(len, self.written.values())) + len(self.drawn)

    @property
    def written(self) -> dict[str, Sequence[Sample]]:
        """Stream -> samples whose answers are written again, word by word."""
        return {
            name: asked.samples for name, asked in self.streams.items() if name in (ANSWER, HEARING)
        }


@dataclass
class Pass:
    """What one model did. observed, answers: by stream. pictures: [drawn, 3, rows, columns]."""

    observed: dict[str, Observed] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    pictures: Tensor | None = None

    def close(self) -> None:
        """Give back the disk space of kept log-probabilities."""
        for observed in self.observed.values():
            if observed.said is not None:
                observed.said.close()


def prepare(
    media: Media, records: Sequence[Record], judge: Judge | None, options: Options, limit: int
) -> Questions:
    """Samples of every route of the model that has records: at most `limit` of each.

    Raises UsageError when none has, DataError for media of the wrong kind, size or rate, and for
    missing processors.
    """
    streams: dict[str, Asked] = {}
    skipped: list[str] = []
    for route in media.routes.routes:
        chosen = _some([record for record in records if record.kind in route.kinds], limit, options)
        if not chosen:
            skipped.append(
                f"{route.stream} is not evaluated: the data has no record with {_keys(route.kinds)}"
            )
            continue
        for record in chosen:
            route.check(media.tools, record)
        samples = [route.sample(media.tools, media.model, record) for record in chosen]
        streams[route.stream] = Asked(route, chosen, samples)
    if not streams:
        read = " or ".join(_keys(route.kinds) for route in media.routes.routes)
        raise UsageError(
            f"nothing can be evaluated: a model of type {media.model.config.model_type} reads "
            f"records with {read}, and the data has none"
        )
    _guide(streams)
    _decode_whole(streams)
    drawn, reason = _to_draw(media, records, judge, options, limit)
    strange = sorted({record.kind for record in records} - _read(media))
    skipped += [f"records of kind {kind} are left out: the model reads no such" for kind in strange]
    return Questions(streams, drawn, judge, options, [*skipped, *reason])


def run(media: Media, questions: Questions, reference: Pass | None, keep: bool, tick: Tick) -> Pass:
    """One model through all questions. keep: it is the reference of a later pass."""
    found = Pass()
    for name, asked in questions.streams.items():
        theirs = None if reference is None else reference.observed[name]
        samples = asked.samples if theirs is None else asked.samples[: theirs.count]
        seen = observe(media.model, asked.route, samples, theirs, keep, tick)
        if name == DECODER:
            seen.vectors = [as_pixels(media, pixels) for pixels in seen.vectors]
        found.observed[name] = seen
    for name, samples in questions.written.items():
        found.answers[name] = []
        for sample in samples:
            written = media.say(sample, questions.options.max_new_tokens)
            found.answers[name].append(written.text)
            tick()
    if questions.drawn:
        options = questions.options
        found.pictures = media.draw(
            [record.text for record in questions.drawn],
            seed=options.seed,
            guidance=options.guidance,
            temperature=options.temperature,
        )
        for _ in questions.drawn:
            tick()
    return found


def as_pixels(media: Media, pixels: Tensor) -> Tensor:
    """An image decoder's output [..., 3, rows, columns], or what an encoder reads, in 0..1."""
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    return shown(flat, media.tools.pictures).reshape(pixels.shape)


def truth(media: Media, asked: Asked) -> list[Tensor] | None:
    """What a stream of numbers should be: true vectors, or pixels in 0..1 for an image decoder;
    None where the samples do not say."""
    targets = []
    for sample in asked.samples:
        wanted = objective(sample)
        if not isinstance(wanted, VectorObjective) or wanted.target is None:
            return None
        pixels = asked.route.stream == DECODER
        targets.append(as_pixels(media, wanted.target) if pixels else wanted.target.float())
    return targets


def _guide(streams: dict[str, Asked]) -> None:
    """Divide guided samples of pictures into two streams: what the model says of the next code, of
    which a likelihood has a meaning, and what is drawn from, of which it has none."""
    asked = streams.get(IMAGE)
    if asked is None or not any("unconditional_ids" in s.inputs for s in asked.samples):
        return
    plain = [
        replace(s, inputs={**s.inputs, "unconditional_ids": None, "guidance": 1.0})
        for s in asked.samples
    ]
    streams[IMAGE] = replace(asked, samples=plain)
    if any(s.inputs.get("unconditional_ids") is not None for s in asked.samples):
        streams[GUIDED] = replace(asked, samples=[_without_truth(s) for s in asked.samples])


def _without_truth(sample: Sample) -> Sample:
    asked = objective(sample)
    if isinstance(asked, TokenObjective):
        return replace(sample, loss=replace(asked, labels=None))
    if isinstance(asked, VectorObjective):
        return replace(sample, loss=replace(asked, target=None))
    return sample


def _decode_whole(streams: dict[str, Asked]) -> None:
    """Samples of a decoder that begins with noise show it several shares of a picture (the first
    is none): here it decodes one picture from there, with all its steps."""
    asked = streams.get(DECODER)
    if asked is None or not all("noisy" in sample.inputs for sample in asked.samples):
        return
    samples = []
    for sample in asked.samples:
        wanted = objective(sample)
        if isinstance(wanted, VectorObjective) and wanted.target is not None:
            sample = replace(sample, loss=replace(wanted, target=wanted.target[:1]))
        samples.append(sample)
    streams[DECODER] = replace(asked, route=replace(asked.route, run=_from_noise), samples=samples)


def _from_noise(model: Any, noisy: Tensor, time: Tensor, vectors: Tensor) -> Tensor:
    """Pictures [1, 3, rows, columns] of vectors [1, count, size] from the noise in `noisy[0]`."""
    pixels: Tensor = model.decode_vectors(vectors, noisy[:1])
    return pixels


def _to_draw(
    media: Media, records: Sequence[Record], judge: Judge | None, options: Options, limit: int
) -> tuple[list[Record], list[str]]:
    """Records whose pictures are drawn, and why not more."""
    wanted = _some([record for record in records if record.kind == GENERATION], limit, options)
    if not wanted:
        return [], []
    try:
        _ = media.drawer
    except UsageError as error:
        return [], [f"no picture is drawn: {error}"]
    if judge is not None:
        return wanted, []
    few = wanted[: options.shown]
    return few, [
        f"{len(few)} of {len(wanted)} pictures are drawn and none is judged: give --judge for the "
        "accuracy and the Frechet distance of what is drawn"
    ]


def _some(records: Sequence[Record], limit: int, options: Options) -> list[Record]:
    """At most `limit` of them, chosen by the seed, in their order."""
    if len(records) <= limit:
        return list(records)
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(records), generator=generator)[:limit].sort().values
    return [records[index] for index in chosen.tolist()]


def _read(media: Media) -> set[str]:
    return {kind for route in media.routes.routes for kind in route.kinds}


def _keys(kinds: Sequence[str]) -> str:
    return " or ".join(", ".join(KINDS[kind]) for kind in kinds)
