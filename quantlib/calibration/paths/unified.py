"""Models that read and write pictures: Janus, and what it shares with others.

A picture to be written is known by its codes, which the model's own image encoder makes of the
target: teacher forcing. So its samples need the full-precision model, and stay the same for every
other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantlib.calibration import forwards
from quantlib.calibration.media import read_image
from quantlib.calibration.objectives import TokenObjective, VectorObjective
from quantlib.calibration.paths.reading import (
    TEXT_ROUTE,
    answers,
    pictures_of,
    require_side,
    vision,
)
from quantlib.calibration.paths.route import Route, Routes
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.records import GENERATION, PAIR, PICTURE, QUESTION, Record
from quantlib.calibration.streams import Sample
from quantlib.errors import DataError
from quantlib.models.families import (
    EMBEDDINGS,
    GENERATION_EMBEDDINGS,
    GENERATION_HEAD,
    GENERATION_PROJECTOR,
    IMAGE_DECODER,
    IMAGE_ENCODER,
    LANGUAGE_MODEL,
)

PICTURES = (GENERATION, QUESTION, PICTURE, PAIR)
"""Records with a picture, whatever it is for."""
WRITTEN = ("text", "image token")
"""What tokens of the language model are, where pictures are written as codes."""


def itself(output: Tensor) -> Tensor:
    """What a run puts out is what an objective reads."""
    return output


def pixels_of(tools: Tools, record: Record) -> dict[str, Tensor]:
    """The picture of a record as the image encoder takes it: `pixel_values` [1, 3, H, W], and what
    else the image processor says of it."""
    image = read_image(record.file)
    with tools.taking(image, record):
        found = tools.pictures(images=[image], return_tensors="pt")
    return {key: value for key, value in dict(found).items() if isinstance(value, Tensor)}


def check_picture(tools: Tools, record: Record) -> None:
    """Raise DataError unless the record's picture can be read and processed."""
    pixels_of(tools, record)


def _janus_side(tools: Tools) -> int:
    return int(vision(tools, "image_size"))


def _janus_tokens(tools: Tools, _: Tensor) -> int:
    return int(vision(tools, "image_size") // vision(tools, "patch_size")) ** 2


@torch.no_grad()
def janus_codes(model: Any, pixels: Tensor) -> Tensor:
    """int64 [1, codes] of a picture."""
    codes: Tensor = model.model.vqmodel.encode(pixels).image_tokens
    return codes.reshape(len(pixels), -1)


def janus_prompt(tools: Tools, prompt: str) -> tuple[Tensor, Tensor]:
    """Token ids int64 [1, T] that ask for a picture and begin it, and the same without the words:
    what classifier-free guidance compares with.

    Raises DataError when the generation config does not name the token that begins a picture.
    """
    text = tools.drawn(prompt)
    found = tools.processor(
        text=[text],
        generation_mode="image",
        return_tensors="pt",
        add_special_tokens=tools.adds_special(text),
    )
    ids: Tensor = found["input_ids"]
    begin = (tools.generation.get("generation_kwargs") or {}).get("boi_token_id")
    pad = tools.generation.get("pad_token_id", tools.token("pad"))
    if begin is None or pad is None:
        missing = "pad_token_id" if begin is not None else "generation_kwargs.boi_token_id"
        raise DataError(
            f"{tools.folder}/generation_config.json does not name {missing}, which writing "
            "pictures needs: add it"
        )
    bos = tools.generation.get("bos_token_id", tools.token("bos"))
    kept = (ids == begin) | (ids == (-1 if bos is None else bos))
    return ids, torch.where(kept, ids, torch.full_like(ids, int(pad)))


def _janus_writing(tools: Tools, model: Any, record: Record) -> Sample:
    ids, wordless = janus_prompt(tools, record.text)
    codes = janus_codes(model, pixels_of(tools, record)["pixel_values"])
    tools.fits(torch.cat([ids, codes], 1), record.where)
    inputs = {"input_ids": ids, "image_codes": codes, **guidance_of(tools, wordless)}
    return Sample(inputs, TokenObjective(None, codes[0], itself), rows_written(inputs, codes))


def guidance_of(tools: Tools, wordless: Tensor) -> dict[str, Any]:
    """Inputs that say how strongly a picture follows its prompt."""
    if tools.guidance <= 1:
        return {"unconditional_ids": None, "guidance": 1.0}
    return {"unconditional_ids": wordless, "guidance": tools.guidance}


def rows_written(inputs: Mapping[str, Any], written: Tensor) -> Tensor:
    """Indices into WRITTEN of the tokens that run, row by row: the last one that is written is
    predicted, and not read."""
    prompt = torch.zeros_like(inputs["input_ids"][0])
    of_row = torch.cat([prompt, torch.ones_like(written[0, 1:])])
    return of_row.repeat(1 if inputs["unconditional_ids"] is None else 2)


def _janus_check_writing(tools: Tools, record: Record) -> None:
    janus_prompt(tools, record.text)
    require_side(tools, pixels_of(tools, record)["pixel_values"], _janus_side(tools))


def _janus_decoding(tools: Tools, model: Any, record: Record) -> Sample:
    pixels = pixels_of(tools, record)["pixel_values"]
    objective = VectorObjective(itself, pixels)
    return Sample({"image_codes": janus_codes(model, pixels)}, objective)


def _coding(tools: Tools, _: Any, record: Record) -> Sample:
    return Sample(pixels_of(tools, record), TokenObjective(read=itself))


CODES = Route("codes", PICTURES, (IMAGE_ENCODER,), _coding, check_picture, run=forwards.code_logits)

JANUS = Routes(
    ("janus",),
    (
        TEXT_ROUTE,
        answers(pictures_of(_janus_side, _janus_tokens)),
        Route(
            "image",
            (GENERATION,),
            (
                LANGUAGE_MODEL,
                EMBEDDINGS,
                GENERATION_EMBEDDINGS,
                GENERATION_PROJECTOR,
                GENERATION_HEAD,
            ),
            _janus_writing,
            _janus_check_writing,
            run=forwards.janus_image_logits,
            modalities=WRITTEN,
        ),
        Route(
            "decoder",
            PICTURES,
            (IMAGE_DECODER,),
            _janus_decoding,
            check_picture,
            run=forwards.decoded_image,
        ),
        CODES,
    ),
)

FAMILIES = (JANUS,)
