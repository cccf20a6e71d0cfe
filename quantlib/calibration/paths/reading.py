"""Models that read: text, and text with a picture in it. Only answers count of the latter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from quantlib.calibration.media import read_image
from quantlib.calibration.objectives import TokenObjective
from quantlib.calibration.paths.route import ANSWER, Route
from quantlib.calibration.paths.tools import Tools, row
from quantlib.calibration.records import QUESTION, TEXT, Record
from quantlib.calibration.streams import Sample
from quantlib.errors import DataError
from quantlib.models.families import EMBEDDINGS, HEAD, LANGUAGE_MODEL, PROJECTOR, VISION

WORDS = (LANGUAGE_MODEL, EMBEDDINGS, HEAD)
"""Components that text runs through."""
MODALITIES = ("text", "image")
"""What tokens of the language model are, where pictures are read."""

Encode = Callable[[Tools, str, Image], dict[str, Any]]
"""(tools, text with a placeholder, picture) -> inputs of `forward`, `input_ids` [1, T] first of
all."""
Fits = Callable[[Tools, Mapping[str, Any], str], None]
"""(tools, inputs, where): raises DataError when they do not fit the model's config."""


def text_sample(tools: Tools, _: Any, record: Record) -> Sample:
    """Every token but the first is predicted, and counts."""
    ids = row(tools.ids(record.text, min(tools.seqlen, tools.longest)))
    if ids.shape[1] < 2:
        raise DataError(f"{record.where}: the text is a single token: nothing is predicted in it")
    where = torch.ones(ids.shape, dtype=torch.bool)
    where[:, -1] = False
    inputs = {"input_ids": ids, "use_cache": False}
    return Sample(inputs, TokenObjective(where.reshape(-1), ids[0, 1:]), torch.zeros_like(ids[0]))


TEXT_ROUTE = Route("text", (TEXT,), WORDS, text_sample, modalities=MODALITIES)


def by_processor(tools: Tools, text: str, image: Image) -> dict[str, Any]:
    """As the model's own processor joins them."""
    found = tools.processor(
        text=[text],
        images=image,
        return_tensors="pt",
        add_special_tokens=tools.adds_special(text),
    )
    return dict(found)


def by_parts(tools: Tools, text: str, image: Image) -> dict[str, Any]:
    """Qwen2.5-VL's, whose processor cannot be had without torchvision: it is for videos, too.

    Raises DataError for an image processor that cuts pictures in no patches.
    """
    if not hasattr(tools.pictures, "merge_size"):
        raise DataError(
            f"the image processor in {tools.folder} is a {type(tools.pictures).__name__}, which "
            "does not cut pictures into patches as this model reads them: fetch the model's own"
        )
    pixels = dict(tools.pictures(images=[image], return_tensors="pt"))
    places = int(pixels["image_grid_thw"].prod()) // int(tools.pictures.merge_size) ** 2
    placeholder = tools.tokenizer.convert_ids_to_tokens(tools.image_token_id)
    ids = row(tools.ids(text.replace(placeholder, placeholder * places)))
    pictured = (ids == tools.image_token_id).to(torch.int32)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": pictured, **pixels}


def placeholder_of(tools: Tools) -> str:
    """What stands for a picture in a text."""
    named = getattr(tools.processor, "image_token", None)
    return str(named or tools.tokenizer.convert_ids_to_tokens(tools.image_token_id))


def token_of(tools: Tools) -> str:
    """As `placeholder_of`, without a processor."""
    return str(tools.tokenizer.convert_ids_to_tokens(tools.image_token_id))


def question(
    tools: Tools,
    record: Record,
    encode: Encode = by_processor,
    placeholder: Callable[[Tools], str] = placeholder_of,
) -> tuple[dict[str, Any], Tensor]:
    """The inputs of a question about a picture with its answer behind it, and the answer's tokens
    (`with_answer`)."""
    texts = tools.asked(record.text, record.answer, placeholder(tools))
    image = read_image(record.file)
    with tools.taking(image, record):
        return with_answer(tools, texts, lambda text: encode(tools, text, image), record.where)


def with_answer(
    tools: Tools, texts: tuple[str, str], encode: Callable[[str], dict[str, Any]], where: str
) -> tuple[dict[str, Any], Tensor]:
    """The inputs of a prompt with its answer behind it, and the answer's tokens int64 [terms], the
    last of which ends it.

    texts:  of `Tools.asked`. encode: a text with a placeholder -> inputs of `forward`.
    Raises DataError when the answer is not where the tokenizer has it: the processor then changes
    the text in a way nobody foresaw.
    """
    prompt, full = texts
    asked, told = tools.ids(prompt), tools.ids(full)
    shared = next((i for i, pair in enumerate(zip(asked, told)) if pair[0] != pair[1]), len(asked))
    answer = told[min(shared, len(told) - 1) :]
    inputs = encode(full)
    ids = inputs["input_ids"]
    if ids[0, -len(answer) :].tolist() != answer:
        raise DataError(
            f"{where}: the processor in {tools.folder} puts other tokens behind the answer than "
            "its tokenizer: they do not belong together"
        )
    end = tools.token("eos")
    if end is not None and answer[-1] != end:
        answer.append(end)
        inputs = {name: _longer(value, ids.shape) for name, value in inputs.items()}
        inputs["input_ids"][0, -1] = end
    tools.fits(inputs["input_ids"], where)
    return inputs, torch.tensor(answer)


def answer_sample(inputs: Mapping[str, Any], answer: Tensor, placeholder: int) -> Sample:
    """Of what `with_answer` returns; placeholder: the token that stands for what is not text."""
    ids = inputs["input_ids"]
    where = torch.zeros(ids.shape, dtype=torch.bool)
    where[0, -len(answer) - 1 : -1] = True
    modality = (ids[0] == placeholder).to(torch.int64)
    objective = TokenObjective(where.reshape(-1), answer)
    return Sample({**inputs, "use_cache": False}, objective, modality)


def answers(
    fits: Fits,
    reaches: tuple[str, ...] = (*WORDS, VISION, PROJECTOR),
    encode: Encode = by_processor,
    placeholder: Callable[[Tools], str] = placeholder_of,
) -> Route:
    """The route of answers about pictures."""

    def sample(tools: Tools, _: Any, record: Record) -> Sample:
        inputs, answer = question(tools, record, encode, placeholder)
        return answer_sample(inputs, answer, tools.image_token_id)

    def check(tools: Tools, record: Record) -> None:
        inputs, _ = question(tools, record, encode, placeholder)
        fits(tools, inputs, record.where)

    return Route(ANSWER, (QUESTION,), reaches, sample, check, modalities=MODALITIES)


def _longer(value: Any, shape: torch.Size) -> Any:
    """A tensor of all tokens with its last entry once more; anything else as it is."""
    if isinstance(value, Tensor) and value.shape == shape:
        return torch.cat([value, value[:, -1:]], 1)
    return value


# -- does the processor fit the config? ------------------------------------------------------------


def pictures_of(side: Callable[[Tools], int | None], tokens: Callable[..., int | None]) -> Fits:
    """Fits models whose pictures have `side` pixels in both directions, and take `tokens` of the
    text: of (tools, pixel_values); None: anything."""

    def fits(tools: Tools, inputs: Mapping[str, Any], where: str) -> None:
        pixels = inputs["pixel_values"]
        require_side(tools, pixels, side(tools))
        count, expected = placeholders(tools, inputs), tokens(tools, pixels)
        if expected is not None and count != expected:
            raise DataError(
                f"the processor in {tools.folder} puts {count} tokens in the place of a picture "
                f"({where}), and by config.json it has {expected}: fetch both again"
            )

    return fits


def require_side(tools: Tools, pixels: Tensor, side: int | None) -> None:
    """Raise DataError for pictures [..., H, W] of another size than config.json says; None: it does
    not say."""
    size = tuple(pixels.shape[-2:])
    if side is not None and size != (side, side):
        raise DataError(
            f"the image processor in {tools.folder} makes pictures of {size[0]} x {size[1]} "
            f"pixels, and config.json says {side} x {side}: fetch both again"
        )


def patches_of(tower: Callable[[Tools], Any]) -> Fits:
    """Fits models that read patches which the image processor has cut; tower: the config of what
    reads them."""

    def fits(tools: Tools, _: Mapping[str, Any], __: str) -> None:
        for mine, theirs in _PATCHES.items():
            found, wanted = getattr(tools.pictures, mine, None), getattr(tower(tools), theirs)
            if _number(found) != _number(wanted):
                raise DataError(
                    f"the image processor in {tools.folder} has a {mine} of {found}, and "
                    f"config.json a {theirs} of {wanted}: fetch both again"
                )

    return fits


_PATCHES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}
"""Names of an image processor -> what a tower's config calls the same."""


def _number(size: Any) -> Any:
    """A size that may be written once for each direction."""
    return size[0] if isinstance(size, list | tuple) and len({*size}) == 1 else size


def any_side(_: Tools) -> None:
    """Pictures may have any size."""
    return None


def placeholders(tools: Tools, inputs: Mapping[str, Any]) -> int:
    """Tokens of a text that stand for pictures."""
    return int((inputs["input_ids"] == tools.image_token_id).sum())


def vision(tools: Tools, key: str) -> Any:
    """An entry of the vision tower's config, by transformers' defaults where the file has none."""
    return getattr(parsed(tools).vision_config, key)


def parsed(tools: Tools) -> Any:
    """config.json with transformers' defaults."""
    from transformers import CONFIG_MAPPING

    config = dict(tools.config)
    return CONFIG_MAPPING[config["model_type"]].from_dict(config)
