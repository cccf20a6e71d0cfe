"""Calibrates scales of cached keys and values for every place in an image (`kernels.kv_static`).

The model runs on calibration data with a cache that keeps everything as it is; the range of every
place, head and group over all images is what its scale must hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantlib.errors import DataError, FormatError, UsageError
from quantlib.kernels.kv_format import KvFormat, SideFormat
from quantlib.kernels.kv_static import Ranges
from quantlib.models.modality import MODALITIES, Modality
from quantlib.runtime.modality_cache import ModalityCache, full_formats
from quantlib.runtime.modality_hooks import attach_caches, attached_caches, detach_caches

SIDES = ("key", "value")


@torch.no_grad()
def static_scales(
    model: PreTrainedModel,
    runs: Sequence[Callable[[], Any]],
    formats: Mapping[Modality, KvFormat],
    modality: Modality,
    places: int,
    image_token: int | None = None,
) -> dict[tuple[int, Modality, str], Tensor]:
    """Meta words int32 [places, kv_heads, groups] by layer, modality and side, for the sides that
    the modality's format rounds.

    runs:   each runs the model once, on calibration data.
    places: tokens of an image; the last one need not be read (`Ranges.filled`).
    Raises DataError when no run reaches some place, or something there is not finite, UsageError
    for a format without scales.
    """
    kind = MODALITIES.index(modality)
    form = full_formats(formats)[kind]
    sides = {side: kept for side in SIDES if (kept := getattr(form, side)).bits != 32}
    if not sides:
        raise UsageError(
            f"tokens of {modality} are kept in {form}, which has no scales: name int8 or int4 for "
            "them, or leave static scales out"
        )
    found: dict[tuple[int, str], tuple[Ranges, int]] = {}
    for cache in (cache for run in runs for cache in _caches_of(model, run, image_token)):
        for layer in range(len(cache.layers)):
            for side, kept in sides.items():
                x, at = cache.tokens(layer, side, kind)
                ranges = _ranges(x, at, places, kept, layer)
                known = found.get((layer, side))
                joined = ranges if known is None else known[0].joined(ranges)
                found[layer, side] = (joined, x.shape[-1])
    if not found:
        raise DataError("calibration runs through no decoder: no scales can be known beforehand")
    try:
        return {
            (layer, modality, side): ranges.filled().meta(sides[side], head_dim)
            for (layer, side), (ranges, head_dim) in found.items()
        }
    except FormatError as error:
        raise DataError(
            f"{error}: static scales of {modality} need calibration data that has {places} tokens "
            "of it; add such records, or leave static scales out"
        ) from error


def _ranges(x: Tensor, at: Tensor, places: int, form: SideFormat, layer: int) -> Ranges:
    try:
        return Ranges.of(x, at, places, form)
    except FormatError as error:
        raise DataError(f"layer {layer}: {error}") from error


def _caches_of(
    model: PreTrainedModel, run: Callable[[], Any], image_token: int | None
) -> list[ModalityCache]:
    """The caches, of numbers as they are, that one run of the model begins."""
    before = attached_caches(model)
    exact = attach_caches(model, {"text": KvFormat.parse("f32")}, image_token)
    begun: list[ModalityCache] = []
    exact.begun = begun
    try:
        run()
    finally:
        detach_caches(model)
        if before is not None:
            attach_caches(model, before.formats, before.image_token, before.static)
    return begun
