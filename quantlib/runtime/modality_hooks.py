"""Puts a `ModalityCache` where a model would use a cache of transformers, and tells it what each
token is.

Two hooks do it. One on every model around the decoder sees token ids: where the image token stands,
an image is read, all else are words. One on the decoder itself gives it a cache of its own when it
begins without one, or with an empty one of another kind (the static cache of Janus' image loop, the
dynamic one of `generate`), and hands on what the tokens are. A decoder that is called with vectors
and no model around it, as in that loop, begins with words and goes on with an image that is
written; a caller that knows better says so (`models.modality.known_modalities`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from quantlib.checkpoint.cache_formats import tensor_name
from quantlib.errors import ModelError, UsageError
from quantlib.kernels.kv_format import KvFormat
from quantlib.models import modality
from quantlib.models.modality import Modality, kinds_of_ids
from quantlib.runtime.modality_cache import ModalityCache, Static, full_formats

ATTRIBUTE = "quantlib_modality_caches"


@dataclass(eq=False)
class ModalityCaches:
    """What a model's caches are, and what is known of its next call; attached to its decoder.

    formats:     by modality.
    image_token: the id that images which are read have in a prompt; None: there are none.
    static:      scales known beforehand.
    begun:       is given every cache that is begun, if it is a list.
    """

    formats: Mapping[Modality, KvFormat]
    image_token: int | None = None
    static: Static = field(default_factory=dict)
    begun: list[ModalityCache] | None = None
    _kinds: Tensor | None = None
    _handles: list[Any] = field(default_factory=list)


def attach_caches(
    model: PreTrainedModel,
    formats: Mapping[Modality, KvFormat],
    image_token: int | None = None,
    static: Static | None = None,
) -> ModalityCaches:
    """From now on the model's decoder caches keys and values in these formats.

    Raises ModelError when the model has no decoder, UsageError for unknown modalities.
    """
    full_formats(formats)
    decoder = decoder_of(model)
    detach_caches(model)
    caches = ModalityCaches(dict(formats), image_token, dict(static or {}))
    around = [part for part in model.modules() if _is_around(part, decoder)]
    for part in around:
        caches._handles += [
            part.register_forward_pre_hook(_see_ids(caches), with_kwargs=True),
            part.register_forward_hook(_forget(caches), always_call=True),
        ]
    caches._handles.append(decoder.register_forward_pre_hook(_give_cache(caches), with_kwargs=True))
    setattr(decoder, ATTRIBUTE, caches)
    return caches


def attached_caches(model: nn.Module) -> ModalityCaches | None:
    """What `attach_caches` attached to a model, if it did."""
    for part in model.modules():
        if ATTRIBUTE in part.__dict__:
            found: ModalityCaches = part.__dict__[ATTRIBUTE]
            return found
    return None


def detach_caches(model: nn.Module) -> None:
    """Have the model use transformers' caches again."""
    for part in model.modules():
        caches = part.__dict__.pop(ATTRIBUTE, None)
        for handle in caches._handles if caches is not None else ():
            handle.remove()


def static_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The static scales of a model's caches, by their names in a checkpoint's files."""
    found = attached_caches(model)
    static = found.static if found is not None else {}
    return {tensor_name(place): meta for place, meta in static.items()}


def image_token_of(config: Any) -> int | None:
    """The id that stands for an image's vectors in a prompt, as a config says it."""
    config = getattr(config, "thinker_config", config)
    for name in ("image_token_id", "image_token_index"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The decoder whose keys and values are cached; of a model that also speaks (Qwen2.5-Omni), the
    one that reads. Raises ModelError for a model without one, and for one that reads an encoder's
    output: its cache is of two sequences."""
    decoder: nn.Module | None = getattr(model, "thinker", model).get_decoder()
    crosses = bool(getattr(model.config, "is_encoder_decoder", False))
    if decoder is None or getattr(decoder, "layers", None) is None or crosses:
        raise ModelError(
            f"{type(model).__name__} has no decoder that caches keys and values of one sequence: "
            "leave the format of the KV cache out"
        )
    return decoder


def _is_around(part: nn.Module, decoder: nn.Module) -> bool:
    is_model = isinstance(part, PreTrainedModel) and part is not decoder
    return is_model and any(other is decoder for other in part.modules())


def _see_ids(caches: ModalityCaches) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and not ids.is_floating_point():
            caches._kinds = kinds_of_ids(ids, caches.image_token)

    return hook


def _forget(caches: ModalityCaches) -> Any:
    def hook(*_: Any) -> None:
        caches._kinds = None

    return hook


def _give_cache(caches: ModalityCaches) -> Any:
    def hook(
        decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kinds = decoder.__dict__.get(modality.ATTRIBUTE, caches._kinds)
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, ModalityCache):
            _check_empty(cache)
            count = len(decoder.layers)  # type: ignore[arg-type]
            written: Modality = "image_output" if caches._kinds is None else "text"
            cache = ModalityCache(count, caches.formats, written=written, static=caches.static)
            kwargs = {**kwargs, "past_key_values": cache}
            if caches.begun is not None:
                caches.begun.append(cache)
        cache.expect(kinds)
        return args, kwargs

    return hook


def _check_empty(cache: Any) -> None:
    held = cache.get_seq_length() if isinstance(cache, Cache) else 0
    if int(torch.as_tensor(held)):
        raise UsageError(
            f"this model keeps keys and values by modality, and is given a {type(cache).__name__} "
            f"that holds {int(held)} positions: begin with an empty cache, or none"
        )
