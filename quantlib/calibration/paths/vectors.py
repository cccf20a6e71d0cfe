"""Encoders: what counts are the vectors they write, relative to their size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib.calibration.media import read_image
from quantlib.calibration.objectives import VectorObjective
from quantlib.calibration.paths.reading import parsed, require_side
from quantlib.calibration.paths.route import Route, Routes
from quantlib.calibration.paths.tools import Tools, row
from quantlib.calibration.records import GENERATION, PAIR, PICTURE, QUESTION, TEXT, Record
from quantlib.calibration.streams import Sample
from quantlib.models.families import EMBEDDINGS, TEXT_ENCODER, VISION

STREAM = "vectors"
_PICTURES = (PICTURE, PAIR, QUESTION, GENERATION)


def states(output: Any) -> Tensor:
    """[1, tokens, size]: every token's vector."""
    found: Tensor = output.last_hidden_state
    return found


def pooled(output: Any) -> Tensor:
    """Every token's vector, and the one that sums them up."""
    summary = getattr(output, "pooler_output", None)
    if summary is None:
        return states(output)
    return torch.cat([states(output), summary[:, None]], 1)


def pair(output: Any) -> Tensor:
    """[2, size]: the vectors of a picture and of a text, which are compared."""
    return torch.cat([output.image_embeds, output.text_embeds])


def _text(tools: Tools, _: Any, record: Record) -> Sample:
    ids = row(tools.ids(record.text, min(tools.seqlen, tools.longest)))
    mask = torch.ones_like(ids)
    return Sample({"input_ids": ids, "attention_mask": mask}, VectorObjective(pooled))


def _pixels(tools: Tools, record: Record) -> Tensor:
    image = read_image(record.file)
    with tools.taking(image, record):
        pixels: Tensor = tools.pictures(images=[image], return_tensors="pt")["pixel_values"]
    require_side(tools, pixels, _side(tools))
    return pixels


def _side(tools: Tools) -> int | None:
    """Of the pictures a tower reads; DINOv2 interpolates its places to any."""
    if tools.config["model_type"] == "dinov2":
        return None
    config = parsed(tools)
    return int(getattr(config, "vision_config", config).image_size)


def _picture(tools: Tools, _: Any, record: Record) -> Sample:
    return Sample({"pixel_values": _pixels(tools, record)}, VectorObjective(states))


def _pooled_picture(tools: Tools, _: Any, record: Record) -> Sample:
    return Sample({"pixel_values": _pixels(tools, record)}, VectorObjective(pooled))


def _pair(tools: Tools, _: Any, record: Record) -> Sample:
    text = row(tools.ids(record.text, min(tools.seqlen, tools.longest)))
    return Sample(
        {"input_ids": text, "pixel_values": _pixels(tools, record)}, VectorObjective(pair)
    )


def _check_picture(tools: Tools, record: Record) -> None:
    _pixels(tools, record)


FAMILIES = (
    Routes(("bert",), (Route(STREAM, (TEXT,), (TEXT_ENCODER, EMBEDDINGS), _text),)),
    Routes(
        ("dinov2", "clip_vision_model"),
        (Route(STREAM, _PICTURES, (VISION,), _picture, _check_picture),),
    ),
    Routes(
        ("siglip_vision_model",),
        (Route(STREAM, _PICTURES, (VISION,), _pooled_picture, _check_picture),),
    ),
    Routes(
        ("clip", "siglip"),
        (Route(STREAM, (PAIR,), (VISION, TEXT_ENCODER, EMBEDDINGS), _pair, _check_picture),),
    ),
)
