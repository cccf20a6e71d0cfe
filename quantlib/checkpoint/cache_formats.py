"""What a checkpoint says of a KV cache that keeps words, images read and images written apart.

    "kv_modalities": {
        "formats": {"text": "int8", "image_input": "int4g32", "image_output": "int4g32/int8"},
        "image_token": 100581,
        "static": ["quantlib_kv.image_output.0.key", ...]
    }

image_token is the id that an image's vectors have in a prompt, null when there is none. static
names tensors of scales that are known beforehand (`kernels.kv_static`): int32 [places, kv_heads,
groups], by modality, layer and side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from quantlib.errors import CheckpointError, FormatError
from quantlib.kernels.kv_format import KvFormat
from quantlib.models.modality import MODALITIES, Modality

PREFIX = "quantlib_kv."
"""What the names of static scales begin with. No module of a model is named so."""
_NAME = re.compile(rf"{re.escape(PREFIX)}({'|'.join(MODALITIES)})\.(\d+)\.(key|value)")

Place = tuple[int, Modality, str]
"""Of static scales: (layer, modality, "key" or "value")."""


def tensor_name(place: Place) -> str:
    """What static scales are called in the files."""
    layer, modality, side = place
    return f"{PREFIX}{modality}.{layer}.{side}"


def place_of(name: str) -> Place:
    """The inverse of `tensor_name`. Raises CheckpointError for another name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"its quantization_config is damaged ({name!r} names no scales of a KV cache): make it "
            "again"
        )
    modality = next(known for known in get_args(Modality) if known == match[1])
    return int(match[2]), modality, match[3]


@dataclass(frozen=True)
class CacheFormats:
    """formats: by modality; those left out are kept as text is, and text as it is unless said.

    image_token: the id that an image's vectors have in a prompt.
    static:      names of tensors.
    """

    formats: Mapping[Modality, KvFormat]
    image_token: int | None = None
    static: frozenset[str] = field(default_factory=frozenset)

    @staticmethod
    def parse(given: Any) -> CacheFormats:
        """From JSON values. Raises CheckpointError when they are none."""
        try:
            formats, token, static = given["formats"], given["image_token"], given["static"]
            named = {name: KvFormat.parse(form) for name, form in formats.items()}
            wrong = set(named) - set(MODALITIES)
            if wrong or not named or not isinstance(static, list):
                raise ValueError(f"{given!r}")
            if token is not None and type(token) is not int:
                raise ValueError(f"the image token {token!r}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"its quantization_config is damaged (kv_modalities: {error}): make it again"
            ) from error
        except FormatError as error:
            raise CheckpointError(f"kv_modalities: {error}") from error
        for name in static:
            place_of(str(name))
        return CacheFormats(named, token, frozenset(static))

    def to_json(self) -> dict[str, Any]:
        """The inverse of `parse`."""
        return {
            "formats": {name: str(form) for name, form in sorted(self.formats.items())},
            "image_token": self.image_token,
            "static": sorted(self.static),
        }
