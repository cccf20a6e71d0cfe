"""Vision-language models: text, and answers about a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantlib.calibration.paths.reading import (
    TEXT_ROUTE,
    answers,
    any_side,
    by_parts,
    parsed,
    patches_of,
    pictures_of,
    token_of,
    vision,
)
from quantlib.calibration.paths.route import Routes
from quantlib.calibration.paths.tools import Tools
from quantlib.models.families import VISION
from quantlib.models.modelmap import ModelMap

UNREAD_POOLING = "nothing reads it: the language model takes every patch, not the tower's summary"
UNREAD_BLOCK = "nothing reads it: the projector takes the output of an earlier block"
_NO_CLASS_TOKEN = ("siglip_vision_model",)
_ANY_SIZE = ("dinov2",)


def _llava_side(tools: Tools) -> int | None:
    if vision(tools, "model_type") in _ANY_SIZE:
        return None
    return int(vision(tools, "image_size"))


def _llava_tokens(tools: Tools, pixels: Tensor) -> int:
    """One per patch; the class token's is left out by the strategy "default"."""
    patch = int(vision(tools, "patch_size"))
    patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    has_class = vision(tools, "model_type") not in _NO_CLASS_TOKEN
    left_out = parsed(tools).vision_feature_select_strategy == "default"
    return patches + has_class - left_out


def _unread(config: Mapping[str, Any], model_map: ModelMap) -> dict[str, str]:
    """The tower's pooling, and its blocks behind the one that the projector reads."""
    found = dict.fromkeys(("*.vision_tower.head.mlp.*",), UNREAD_POOLING)
    layer = config.get("vision_feature_layer", -1)
    blocks = [b for stack in model_map.stacks if stack.component == VISION for b in stack.blocks]
    if isinstance(layer, int):
        # hidden states are counted with the one that enters the first block
        read = layer if layer >= 0 else len(blocks) + 1 + layer
        found |= {f"{block}.*": UNREAD_BLOCK for block in blocks[read:]}
    return found


def _unread_head(_: Mapping[str, Any], __: ModelMap) -> dict[str, str]:
    return {"*.vision_tower.head.mlp.*": UNREAD_POOLING}


def _gemma_side(tools: Tools) -> int:
    return int(vision(tools, "image_size"))


def _gemma_tokens(tools: Tools, _: Tensor) -> int:
    return int(parsed(tools).mm_tokens_per_image)


def _idefics_tokens(tools: Tools, pixels: Tensor) -> int:
    """pixels [1, pictures, 3, height, width]: patches are shuffled into fewer, wider ones."""
    patch, factor = int(vision(tools, "patch_size")), int(parsed(tools).scale_factor)
    places = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    return pixels.shape[1] * places // factor**2


def _tower(tools: Tools) -> Any:
    return parsed(tools).vision_config


FAMILIES = (
    Routes(("llava",), (TEXT_ROUTE, answers(pictures_of(_llava_side, _llava_tokens))), _unread),
    Routes(
        ("gemma3",), (TEXT_ROUTE, answers(pictures_of(_gemma_side, _gemma_tokens))), _unread_head
    ),
    Routes(("idefics3", "smolvlm"), (TEXT_ROUTE, answers(pictures_of(any_side, _idefics_tokens)))),
    Routes(
        ("qwen2_5_vl",),
        (
            TEXT_ROUTE,
            answers(patches_of(_tower), encode=by_parts, placeholder=token_of),
        ),
    ),
)
