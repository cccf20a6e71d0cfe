"""Models that write pictures as continuous vectors: `models.pisces`.

The true vectors of a picture are what the full-precision image encoder makes of it. Nothing is
chosen on the way to pixels, so what counts is how far vectors and pixels move.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from quantlib.calibration.media import read_image
from quantlib.calibration.objectives import VectorObjective
from quantlib.calibration.paths.reading import (
    TEXT_ROUTE,
    answers,
    pictures_of,
    vision,
)
from quantlib.calibration.paths.route import Route, Routes
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.paths.unified import janus_prompt, pixels_of
from quantlib.calibration.records import GENERATION, PAIR, PICTURE, QUESTION, Record
from quantlib.calibration.streams import Sample
from quantlib.errors import DataError
from quantlib.models.families import (
    EMBEDDINGS,
    GENERATION_HEAD,
    GENERATION_PROJECTOR,
    IMAGE_DECODER,
    IMAGE_ENCODER,
    LANGUAGE_MODEL,
)
from quantlib.models.pisces import MODEL_TYPE, standardised

_PICTURES = (GENERATION, QUESTION, PICTURE, PAIR)
TIMES = (0.0, 0.25, 0.5, 0.75)
"""How much of a picture is in the noise that the decoder is given, from none on."""


def predicted_vectors(
    model: Any,
    input_ids: Tensor,
    vectors: Tensor,
    unconditional_ids: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Vectors [1, count, size] behind a prompt, teacher-forced and guided as `generate` guides
    them."""
    rows = [input_ids] if unconditional_ids is None else [input_ids, unconditional_ids]
    found: Tensor = model.predicted_vectors(torch.cat(rows), vectors.repeat(len(rows), 1, 1))
    if unconditional_ids is None:
        return found
    asked, unasked = found.chunk(2)
    return standardised(unasked + guidance * (asked - unasked))


def clean_pictures(model: Any, noisy: Tensor, time: Tensor, vectors: Tensor) -> Tensor:
    """What the decoder sees behind noise: [times, 3, rows, columns]."""
    found: Tensor = model.model.image_decoder(noisy, time, vectors.repeat(len(time), 1, 1))
    return found


def image_vectors(model: Any, pixel_values: Tensor) -> Tensor:
    """What stands for a picture when it is written."""
    found: Tensor = model.encode_image(pixel_values)
    return found


def _itself(output: Tensor) -> Tensor:
    return output


@torch.no_grad()
def _vectors(tools: Tools, model: Any, record: Record) -> tuple[Tensor, Tensor]:
    """The picture [1, 3, rows, columns] and its vectors [1, count, size]."""
    pixels = pixels_of(tools, record)["pixel_values"]
    return pixels, model.encode_image(pixels)


def _writing(tools: Tools, model: Any, record: Record) -> Sample:
    ids, wordless = janus_prompt(tools, record.text)
    _, vectors = _vectors(tools, model, record)
    tools.fits(
        torch.cat([ids, torch.zeros_like(vectors[..., 0], dtype=ids.dtype)], 1), record.where
    )
    guided = tools.guidance > 1
    inputs = {
        "input_ids": ids,
        "vectors": vectors,
        "unconditional_ids": wordless if guided else None,
        "guidance": tools.guidance if guided else 1.0,
    }
    written = torch.ones_like(vectors[0, 1:, 0], dtype=ids.dtype)
    of_row = torch.cat([torch.zeros_like(ids[0]), written])
    return Sample(inputs, VectorObjective(_itself, vectors), of_row.repeat(2 if guided else 1))


def _decoding(tools: Tools, model: Any, record: Record) -> Sample:
    """The same noise for the same picture, whoever decodes it."""
    pixels, vectors = _vectors(tools, model, record)
    generator = torch.Generator().manual_seed(zlib.crc32(record.file.name.encode()))
    noise = torch.randn(pixels.shape, generator=generator)
    time = torch.tensor(TIMES, dtype=pixels.dtype)
    share = time[:, None, None, None]
    target = pixels.repeat(len(time), 1, 1, 1)
    inputs = {"noisy": share * target + (1 - share) * noise, "time": time, "vectors": vectors}
    return Sample(inputs, VectorObjective(_itself, target))


def _encoding(tools: Tools, _: Any, record: Record) -> Sample:
    return Sample(pixels_of(tools, record), VectorObjective(_itself))


def _check_picture(tools: Tools, record: Record) -> None:
    read_image(record.file)


def _side(tools: Tools) -> int:
    return int(vision(tools, "image_size"))


def _tokens(tools: Tools, _: Tensor) -> int:
    return int(vision(tools, "image_size") // vision(tools, "patch_size")) ** 2


def _check_writing(tools: Tools, record: Record) -> None:
    janus_prompt(tools, record.text)
    side, size = _side(tools), tuple(pixels_of(tools, record)["pixel_values"].shape[-2:])
    if size != (side, side):
        raise DataError(
            f"the image processor in {tools.folder} makes pictures of {size[0]} x {size[1]} "
            f"pixels, and config.json says {side} x {side}: fetch both again"
        )


FAMILIES = (
    Routes(
        (MODEL_TYPE,),
        (
            TEXT_ROUTE,
            answers(pictures_of(_side, _tokens)),
            Route(
                "image",
                (GENERATION,),
                (LANGUAGE_MODEL, EMBEDDINGS, GENERATION_PROJECTOR, GENERATION_HEAD),
                _writing,
                _check_writing,
                run=predicted_vectors,
                modalities=("text", "image vector"),
            ),
            Route(
                "decoder",
                _PICTURES,
                (IMAGE_DECODER,),
                _decoding,
                _check_picture,
                run=clean_pictures,
            ),
            Route(
                "codes", _PICTURES, (IMAGE_ENCODER,), _encoding, _check_picture, run=image_vectors
            ),
        ),
    ),
)
