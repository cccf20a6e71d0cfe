"""Models of one vocabulary of words and of pictures' codes: Emu3, and Chameleon as far as
transformers has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantlib.calibration import forwards
from quantlib.calibration.objectives import TokenObjective, VectorObjective
from quantlib.calibration.paths.reading import (
    TEXT_ROUTE,
    WORDS,
    answers,
    any_side,
    parsed,
    pictures_of,
)
from quantlib.calibration.paths.route import Route, Routes
from quantlib.calibration.paths.tools import Tools, row
from quantlib.calibration.paths.unified import (
    CODES,
    PICTURES,
    WRITTEN,
    check_picture,
    guidance_of,
    itself,
    pixels_of,
    rows_written,
)
from quantlib.calibration.records import GENERATION, Record
from quantlib.calibration.streams import Sample
from quantlib.errors import DataError
from quantlib.models.families import IMAGE_DECODER
from quantlib.models.modelmap import ModelMap

DRAWN_AREA = 518_400
"""Pixels of a picture that Emu3 draws, where its processor says nothing: transformers' own."""
NO_DECODER = "nothing reads it: transformers has no image decoder for this model"


def _chameleon_unread(_: Mapping[str, Any], __: ModelMap) -> dict[str, str]:
    return {"model.vqmodel.post_quant_conv.*": NO_DECODER}


def _grid(tools: Tools, pixels: Tensor) -> tuple[int, int]:
    """(rows, columns) of codes that the image encoder makes of pixels [..., H, W]: it halves a
    picture from each of its levels to the next."""
    halvings = len(parsed(tools).vq_config.channel_multiplier) - 1
    return pixels.shape[-2] >> halvings, pixels.shape[-1] >> halvings


def _chameleon_tokens(tools: Tools, pixels: Tensor) -> int:
    rows, columns = _grid(tools, pixels)
    return rows * columns


def _emu3_tokens(tools: Tools, pixels: Tensor) -> int:
    """Every row ends with a token of its own."""
    rows, columns = _grid(tools, pixels)
    return rows * (columns + 1)


def _chameleon_encode(tools: Tools, text: str, image: Any) -> dict[str, Any]:
    found = tools.processor(
        text=text,
        images=image,
        return_tensors="pt",
        return_for_text_completion=True,
        add_special_tokens=tools.adds_special(text),
    )
    return dict(found)


CHAMELEON = Routes(
    ("chameleon",),
    (
        TEXT_ROUTE,
        answers(pictures_of(any_side, _chameleon_tokens), WORDS, _chameleon_encode),
        CODES,
    ),
    _chameleon_unread,
)


@torch.no_grad()
def _emu3_grid(model: Any, pixels: Mapping[str, Tensor]) -> Tensor:
    """Codes int64 [1, rows, columns] of a picture."""
    found = model.model.vqmodel.encode(pixels["pixel_values"], pixels["image_sizes"])
    codes: Tensor = found.image_tokens[0]
    return codes.reshape(1, *codes.shape[-2:])


def emu3_prompt(tools: Tools, prompt: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Token ids int64 [1, T] that ask for a picture of so many codes and begin it, and [1, U] of
    the same without the words: what classifier-free guidance compares with.

    Raises DataError for the processor of another model.
    """
    says = tools.processor
    if not hasattr(says, "fake_token_around_image"):
        raise DataError(f"the processor in {tools.folder} is not Emu3's: fetch it again")
    begun = f"{says.image_start_token}{rows}*{columns}{says.fake_token_around_image}"
    ids, wordless = (
        row(tools.ids(f"{says.bos_token}{words}{begun}")) for words in (tools.drawn(prompt), "")
    )
    return ids, wordless


def emu3_size(tools: Tools) -> tuple[int, int]:
    """(rows, columns) of codes of a picture that is drawn: a square of the processor's
    `image_area`, kept within the pixels of pictures that it makes to be read."""
    area = int(getattr(tools.processor, "image_area", DRAWN_AREA))
    least, most = (int(getattr(tools.pictures, f"{end}_pixels", area)) for end in ("min", "max"))
    side = round(min(max(area, least), most) ** 0.5)
    halvings = len(parsed(tools).vq_config.channel_multiplier) - 1
    return max(side >> halvings, 1), max(side >> halvings, 1)


def _emu3_writing(tools: Tools, model: Any, record: Record) -> Sample:
    """Words, the picture's size in codes, and row by row the codes as words."""
    codes = _emu3_grid(model, pixels_of(tools, record))
    ids, wordless = emu3_prompt(tools, record.text, *codes.shape[1:])
    written = model.model.vocabulary_mapping.convert_img2bpe(codes[0]).reshape(1, -1).long()
    tools.fits(torch.cat([ids, written], 1), record.where)
    inputs = {"input_ids": ids, "image_words": written, **guidance_of(tools, wordless)}
    return Sample(inputs, TokenObjective(None, written[0], itself), rows_written(inputs, written))


def _emu3_decoding(tools: Tools, model: Any, record: Record) -> Sample:
    codes = _emu3_grid(model, pixels_of(tools, record))
    return Sample({"image_codes": codes}, VectorObjective(itself))


def _check_joined(tools: Tools, record: Record) -> None:
    check_picture(tools, record)
    emu3_prompt(tools, record.text, 1, 1)


EMU3 = Routes(
    ("emu3",),
    (
        TEXT_ROUTE,
        answers(pictures_of(any_side, _emu3_tokens), WORDS),
        Route(
            "image",
            (GENERATION,),
            WORDS,
            _emu3_writing,
            _check_joined,
            run=forwards.emu3_image_logits,
            modalities=WRITTEN,
        ),
        Route(
            "decoder",
            PICTURES,
            (IMAGE_DECODER,),
            _emu3_decoding,
            check_picture,
            run=forwards.decoded_image,
        ),
        CODES,
    ),
)

FAMILIES = (CHAMELEON, EMU3)
