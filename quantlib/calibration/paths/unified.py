"""Models that read and write pictures: Janus, Emu3, and Chameleon as far as transformers has it.

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
    WORDS,
    answers,
    any_side,
    parsed,
    pictures_of,
    require_side,
    vision,
)
from quantlib.calibration.paths.route import Route, Routes
from quantlib.calibration.paths.tools import Tools, row
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
from quantlib.models.modelmap import ModelMap

_PICTURES = (GENERATION, QUESTION, PICTURE, PAIR)
"""Records with a picture, whatever it is for."""
WRITTEN = ("text", "image token")
"""What tokens of the language model are, where pictures are written as codes."""
DRAWN_AREA = 518_400
"""Pixels of a picture that Emu3 draws, where its processor says nothing: transformers' own."""
NO_DECODER = "nothing reads it: transformers has no image decoder for this model"


def _itself(output: Tensor) -> Tensor:
    return output


def pixels_of(tools: Tools, record: Record) -> dict[str, Tensor]:
    """The picture of a record as the image encoder takes it: `pixel_values` [1, 3, H, W], and what
    else the image processor says of it."""
    image = read_image(record.file)
    with tools.taking(image, record):
        found = tools.pictures(images=[image], return_tensors="pt")
    return {key: value for key, value in dict(found).items() if isinstance(value, Tensor)}


def _check_picture(tools: Tools, record: Record) -> None:
    pixels_of(tools, record)


# -- Janus -----------------------------------------------------------------------------------------


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
    inputs = {"input_ids": ids, "image_codes": codes, **_guidance(tools, wordless)}
    return Sample(inputs, TokenObjective(None, codes[0], _itself), _of_rows(inputs, codes))


def _guidance(tools: Tools, wordless: Tensor) -> dict[str, Any]:
    """Inputs that say how strongly a picture follows its prompt."""
    if tools.guidance <= 1:
        return {"unconditional_ids": None, "guidance": 1.0}
    return {"unconditional_ids": wordless, "guidance": tools.guidance}


def _of_rows(inputs: Mapping[str, Any], written: Tensor) -> Tensor:
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
    objective = VectorObjective(_itself, pixels)
    return Sample({"image_codes": janus_codes(model, pixels)}, objective)


def _coding(tools: Tools, _: Any, record: Record) -> Sample:
    return Sample(pixels_of(tools, record), TokenObjective(read=_itself))


_CODES = Route(
    "codes", _PICTURES, (IMAGE_ENCODER,), _coding, _check_picture, run=forwards.code_logits
)

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
            _PICTURES,
            (IMAGE_DECODER,),
            _janus_decoding,
            _check_picture,
            run=forwards.decoded_image,
        ),
        _CODES,
    ),
)


# -- one vocabulary of words and codes -------------------------------------------------------------


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
        _CODES,
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
    inputs = {"input_ids": ids, "image_words": written, **_guidance(tools, wordless)}
    return Sample(inputs, TokenObjective(None, written[0], _itself), _of_rows(inputs, written))


def _emu3_decoding(tools: Tools, model: Any, record: Record) -> Sample:
    codes = _emu3_grid(model, pixels_of(tools, record))
    return Sample({"image_codes": codes}, VectorObjective(_itself))


def _check_joined(tools: Tools, record: Record) -> None:
    _check_picture(tools, record)
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
            _PICTURES,
            (IMAGE_DECODER,),
            _emu3_decoding,
            _check_picture,
            run=forwards.decoded_image,
        ),
        _CODES,
    ),
)

FAMILIES = (JANUS, CHAMELEON, EMU3)
