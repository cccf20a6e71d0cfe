"""What a model does with pictures and sounds: answer about them, and make them.

Prompts are those of calibration: the same route that turned a record into a sample to calibrate on
makes the inputs here, so what was measured is what is run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from quantlib.calibration.objectives import TokenObjective
from quantlib.calibration.paths import find, known
from quantlib.calibration.paths.route import ANSWER, HEARING, Route, Routes, objective
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.records import QUESTION, SPEECH, Record
from quantlib.calibration.streams import Sample
from quantlib.checkpoint.disk import read_json
from quantlib.errors import DataError, UsageError
from quantlib.runtime.generate import Sampling
from quantlib.runtime.media_images import DRAWERS, Drawer, Drawing, Prompts, shown
from quantlib.runtime.media_text import Written, write_text

PICTURES_AT_ONCE = 16
LONGEST_TEXT = 4096
"""Most tokens of a prompt's words, where the model takes more."""
_ANY_ANSWER = "yes"
"""Stands where an answer would be, and is cut off: a route makes whole samples."""
_WANTED = {QUESTION: "pictures", SPEECH: "sounds"}


@dataclass(frozen=True)
class Media:
    """A transformers model, dense or packed, with what lies beside its weights.

    model: in memory. tools: its tokenizer and processors. routes: what models of its type do.
    """

    model: Any
    tools: Tools
    routes: Routes

    @staticmethod
    def of(model: Any, folder: Path, seqlen: int = LONGEST_TEXT) -> Media:
        """The model of a folder; `seqlen`: the most tokens taken of a text.

        Raises UsageError for a type that has no routes.
        """
        model_type = str(model.config.model_type)
        routes = find(model_type)
        if routes is None:
            raise UsageError(
                f"nothing is known of pictures or sounds of models of type {model_type!r}: this "
                f"works with {', '.join(known())}"
            )
        config = read_json(folder / "config.json")
        return Media(model, Tools(folder, config, seqlen), routes)

    def answer(
        self,
        question: str,
        *,
        image: str | Path | Image.Image | None = None,
        audio: str | Path | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
    ) -> Written:
        """What the model says of one picture, or the words it hears in one sound.

        Raises UsageError when it reads no such thing, DataError for a file of the wrong kind, size
        or rate, and for a missing processor.
        """
        if (image is None) == (audio is None):
            raise UsageError("give a picture or a sound to answer about: one of them")
        kind = QUESTION if audio is None else SPEECH
        route = self.route(kind)
        if kind == QUESTION and not question.strip():
            raise UsageError("there is no question about the picture: write one")
        if kind == SPEECH and question.strip() and route.stream != HEARING:
            raise UsageError(
                f"{self.model.config.model_type} writes down what is said in a sound and takes no "
                "prompt beside it: leave it out"
            )
        with _as_file(image if audio is None else audio) as file:
            record = Record(kind, str(file), question, _ANY_ANSWER, file)
            route.check(self.tools, record)
            sample = route.sample(self.tools, self.model, record)
        return self.say(sample, max_new_tokens, sampling)

    def say(self, sample: Sample, max_new_tokens: int, sampling: Sampling | None = None) -> Written:
        """What the model says where the sample has its answer, without having seen that."""
        inputs = prompt_of(sample)
        limit = max_new_tokens
        if "decoder_input_ids" in inputs:
            limit = min(limit, self.tools.longest - inputs["decoder_input_ids"].shape[1])
        return write_text(self.model, self.tools.tokenizer, inputs, limit, sampling)

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        guidance: float | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Pictures of prompts: pixels float32 [prompts, 3, rows, columns] in 0..1.

        seed:        of the draws; the n-th prompt of a list has draws of its own (`uniforms`).
        guidance:    how strongly words are followed; the model's own unless said, 1 for none.
        temperature: 0 takes the likeliest code each time.
        Raises UsageError when the model makes no pictures.
        """
        drawer = self.drawer
        if not all(map(str.strip, prompts)):
            raise UsageError("the prompt is empty: write what the picture is to show")
        strength = self.tools.guidance if guidance is None else guidance
        drawing = Drawing(seed, strength, temperature)
        rows = [drawer.prompt(self.tools, prompt) for prompt in prompts]
        places = drawer.places(self.tools, self.model)
        for (ids, _), prompt in zip(rows, prompts):
            self.tools.fits(ids.new_zeros(1, ids.shape[1] + places), repr(prompt))
        pictures: dict[int, Tensor] = {}
        for batch in _of_one_length([ids.shape[1] for ids, _ in rows]):
            ids, wordless = (torch.cat([rows[number][side] for number in batch]) for side in (0, 1))
            made = drawer.draw(self.tools, self.model, Prompts(ids, wordless, batch), drawing)
            pictures |= dict(zip(batch, shown(made, self.tools.pictures)))
        return torch.stack([pictures[number] for number in range(len(prompts))])

    @property
    def drawer(self) -> Drawer:
        """How the model draws. Raises UsageError when it makes no pictures that this can draw."""
        model_type = self.model.config.model_type
        if model_type not in DRAWERS:
            raise UsageError(
                f"models of type {model_type!r} are not drawn with here: this works with "
                f"{', '.join(DRAWERS)}"
            )
        return DRAWERS[model_type]

    def route(self, kind: str) -> Route:
        """The route by which the model answers about records of this kind."""
        for route in self.routes.routes:
            if route.stream in (ANSWER, HEARING) and kind in route.kinds:
                return route
        raise UsageError(
            f"models of type {self.model.config.model_type!r} do not answer about {_WANTED[kind]}"
        )


def prompt_of(sample: Sample) -> dict[str, Any]:
    """Arguments of `generate` that leave of a sample what stands before its answer.

    Raises DataError for a sample without an answer.
    """
    asked = objective(sample)
    where = asked.where if isinstance(asked, TokenObjective) else None
    if where is None or not bool(where.any()):
        raise DataError("this sample has no answer that could be written again")
    heard = "decoder_input_ids" in sample.inputs
    ids = sample.inputs["decoder_input_ids" if heard else "input_ids"]
    length = int(where.nonzero()[0]) + 1
    inputs = {}
    for name, value in sample.inputs.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            inputs[name] = value[:, :length]
        elif name != "use_cache":
            inputs[name] = value
    return inputs


def _of_one_length(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of prompts in batches: without padding nothing has to be masked."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    return [
        group[start : start + PICTURES_AT_ONCE]
        for group in groups.values()
        for start in range(0, len(group), PICTURES_AT_ONCE)
    ]


@contextmanager
def _as_file(given: str | Path | Image.Image | None) -> Iterator[Path]:
    """A path as it is; a picture in memory as a file for the while."""
    if isinstance(given, Image.Image):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "picture.png"
            given.convert("RGB").save(file)
            yield file
        return
    path = Path(str(given)).expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    yield path
