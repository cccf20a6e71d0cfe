"""Bytes of a checkpoint before it exists: exact payloads, and headers counted with their longest
possible offsets.

The solver needs the size as a sum over weights, but a safetensors header holds offsets as text,
whose length depends on everything before them. Counting every offset with as many digits as the
largest file's makes the sum an upper bound, a few bytes per tensor above the truth: a budget is
never exceeded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from torch import Tensor

from quantlib.checkpoint.surroundings import rotation_tensors
from quantlib.formats.composite import stored_bytes as weight_payload
from quantlib.formats.composite import stored_layout
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import ORDER
from quantlib.models.headers import TORCH_DTYPES
from quantlib.models.modelmap import ModelMap
from quantlib.models.rows import Weight
from quantlib.transforms.rotation import Rotation

_DIGITS = 12
"""Digits of an offset below a terabyte: files have 5 GB, or hold a single larger tensor."""
_DTYPE = max(TORCH_DTYPES, key=len)
_FILE_OVERHEAD = 8 + 8 + len(json.dumps({"__metadata__": {"format": "pt"}}, separators=(",", ":")))
"""Length field, padding to 8 bytes, and the fixed part of one file's header."""


def weight_bytes(weight: Weight, scheme: Scheme) -> int:
    """Bytes that `weight` stored in `scheme` adds to the checkpoint: payload and header entries."""
    if scheme.weight is None:
        return weight.nbytes + _header_entry(weight.name, weight.stored_shape)
    shape = weight.parameters // weight.in_features, weight.in_features  # stacks as [E*N, K]
    entries = sum(
        _header_entry(weight.name + suffix, stored)
        for suffix, (_, stored) in stored_layout(shape, scheme).items()
    )
    return weight_payload(shape, scheme) + entries


def fixed_bytes(model_map: ModelMap, shard_bytes: int) -> int:
    """Bytes that no choice changes: kept parameters, and the fixed parts of as many files as there
    may be."""
    files = 1 + 2 * model_map.nbytes // shard_bytes  # two neighbours are more than one shard
    return sum(kept_bytes(model_map).values()) + files * _FILE_OVERHEAD


def kept_bytes(model_map: ModelMap) -> dict[str, int]:
    """Component -> bytes of its kept parameters, header entries included."""
    found: dict[str, int] = {}
    for row in model_map.kept:
        size = row.nbytes + _header_entry(row.name, row.shape)
        found[row.component] = found.get(row.component, 0) + size
    return found


def surrounding_bytes(rotation: Rotation, orders: Mapping[str, Tensor]) -> int:
    """Bytes of a rotation's tensors and of orders in a checkpoint: payload and header entries."""
    ordered = {name + ORDER: order.int() for name, order in orders.items()}
    return stored_bytes({**rotation_tensors(rotation), **ordered})


def stored_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors in a checkpoint: payload and header entries."""
    return sum(t.nbytes + _header_entry(name, t.shape) for name, t in tensors.items())


def _header_entry(name: str, shape: Sequence[int]) -> int:
    """Longest possible header entry of a tensor:
    `"name":{"dtype":"...","shape":[...],"data_offsets":[a,b]},`."""
    offset = 10**_DIGITS - 1
    entry = {name: {"dtype": _DTYPE, "shape": list(shape), "data_offsets": [offset, offset]}}
    return len(json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode())
