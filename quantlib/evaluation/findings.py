"""From what two models did (`passes`) to the figures, sentences and pictures of a result."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.calibration.media import read_image
from quantlib.calibration.paths.route import ANSWER, HEARING
from quantlib.calibration.records import GENERATION, KINDS, SPEECH, Record
from quantlib.evaluation.figures import (
    Figure,
    agreement,
    answer_figures,
    decoder_figures,
    distance_figures,
    judged_figures,
    speech_figures,
    token_figures,
    vector_figures,
)
from quantlib.evaluation.observe import KEPT_BYTES
from quantlib.evaluation.passes import DECODER, GUIDED, IMAGE, Asked, Pass, Questions
from quantlib.evaluation.suite import PicturePair
from quantlib.runtime.media_images import to_pictures
from quantlib.search.budget import format_size

Truth = Mapping[str, list[Tensor] | None]
"""Stream -> what its numbers should be (`passes.truth`)."""
CODES = "codes"
"""The stream of an image encoder, which has no truth but what the reference says."""
_WHAT = {IMAGE: "image code", GUIDED: "image code", CODES: "image code"}
"""What a stream predicts; the others predict tokens."""
DRAWN = "pictures drawn"
"""The task of pictures that were drawn from a prompt."""


@dataclass(frozen=True)
class Found:
    """One evaluation: questions, what the model and the reference (if any) did, and the truth."""

    questions: Questions
    ours: Pass
    theirs: Pass | None
    true: Truth

    @property
    def seed(self) -> int:
        """Of resampling."""
        return self.questions.options.seed


def all_figures(found: Found) -> tuple[list[Figure], list[str]]:
    """Stream by stream, in the family's order; and what cannot be said."""
    figures: list[Figure] = []
    skipped: list[str] = []
    for name, asked in found.questions.streams.items():
        observed = found.ours.observed[name]
        if name == DECODER:
            rows = _decoded(found, asked)
        elif observed.vectors:
            rows = _vectors(found, name)
        else:
            rows = _told(found, name, asked) + _written(found, name, asked)
        if not rows and name != GUIDED:
            skipped.append(f"{name} has no truth to compare with: give --against")
        if observed.count < len(asked.samples):
            skipped.append(
                f"of {name}, {observed.count} of {len(asked.samples)} records are compared: what "
                f"the reference says of them takes {format_size(KEPT_BYTES)}"
            )
        figures += rows
    return figures + _drawn(found), skipped


def side_by_side(found: Found) -> list[PicturePair]:
    """The first pictures that were drawn."""
    ours, theirs = found.ours.pictures, None if found.theirs is None else found.theirs.pictures
    if ours is None:
        return []
    count = found.questions.options.shown
    after = _pngs(ours[:count])
    before: Sequence[str | None] = [None] * len(after) if theirs is None else _pngs(theirs[:count])
    return [
        PicturePair(record.text, first, second)
        for record, first, second in zip(found.questions.drawn, before, after)
    ]


def used_records(questions: Questions) -> dict[str, int]:
    """How many records of each kind were used for anything."""
    used = {id(r): r for asked in questions.streams.values() for r in asked.records}
    kinds = [record.kind for record in used.values()]
    return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}


# -- one stream ------------------------------------------------------------------------------------


def _told(found: Found, name: str, asked: Asked) -> list[Figure]:
    """Teacher-forced predictions. Where nobody knows the truth only agreement has a meaning."""
    what = _WHAT.get(name, "token")
    known = None if found.theirs is None else found.theirs.observed[name].scores
    task = asked.task if name in (ANSWER, HEARING) else name
    rows = token_figures(task, what, found.ours.observed[name].scores, known, found.seed)
    if name in (GUIDED, CODES):
        return [figure for figure in rows if figure.name in agreement(what)]
    return rows


def _written(found: Found, name: str, asked: Asked) -> list[Figure]:
    """Answers that the model wrote itself."""
    if name not in found.ours.answers:
        return []
    true = [record.answer for record in asked.records]
    known = None if found.theirs is None else found.theirs.answers[name]
    make = speech_figures if SPEECH in asked.route.kinds else answer_figures
    return make(found.ours.answers[name], true, known, found.seed)


def _vectors(found: Found, name: str) -> list[Figure]:
    """Vectors beside the true ones, where there are such, and beside the reference's."""
    mine, true = found.ours.observed[name].vectors, found.true[name]
    known = None if found.theirs is None else found.theirs.observed[name].vectors
    figures: list[Figure] = []
    if true is not None:
        shaped = [target.reshape(vector.shape) for target, vector in zip(true, mine)]
        figures += vector_figures(name, "true vectors", mine, shaped, known, found.seed)
    if known is not None:
        of = "the reference's vectors"
        figures += vector_figures(name, of, mine, known, seed=found.seed)
    return figures


def _decoded(found: Found, asked: Asked) -> list[Figure]:
    """The image decoder alone: what it decodes is given, so pictures can be compared pixel by
    pixel."""
    judge, mine = found.questions.judge, found.ours.observed[DECODER].vectors
    known = None if found.theirs is None else found.theirs.observed[DECODER].vectors
    figures = decoder_figures(mine, known, found.true[DECODER], found.seed)
    rows = [i for i, record in enumerate(asked.records) if record.kind == GENERATION]
    if judge is None or not rows:
        return figures
    wanted = [judge.asked(asked.records[row].text) for row in rows]
    seen = judge.look(torch.cat([mine[row] for row in rows]))
    before = None if known is None else judge.look(torch.cat([known[row] for row in rows]))
    return figures + judged_figures(DECODER, wanted, seen, before, found.seed)


def _drawn(found: Found) -> list[Figure]:
    """Pictures that were drawn with the same random numbers, as a judge sees them."""
    judge, pictures = found.questions.judge, found.ours.pictures
    if judge is None or pictures is None:
        return []
    records = found.questions.drawn
    theirs = None if found.theirs is None else found.theirs.pictures
    seen, before = judge.look(pictures), None if theirs is None else judge.look(theirs)
    wanted = [judge.asked(record.text) for record in records]
    true = judge.look(torch.stack([_picture(record, pictures[0]) for record in records]))
    return [
        *judged_figures(DRAWN, wanted, seen, before, found.seed),
        *distance_figures(DRAWN, seen, before, true, found.seed),
    ]


def _picture(record: Record, like: Tensor) -> Tensor:
    """The true picture of a record in the size of a drawn one, [3, rows, columns] in 0..1."""
    image = read_image(record.file).resize((like.shape[2], like.shape[1]))
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).movedim(-1, 0).float() / 255


def _pngs(pixels: Tensor) -> list[str]:
    """PNG files as base64."""
    files = []
    for picture in to_pictures(pixels):
        file = io.BytesIO()
        picture.save(file, "PNG")
        files.append(base64.b64encode(file.getvalue()).decode("ascii"))
    return files
