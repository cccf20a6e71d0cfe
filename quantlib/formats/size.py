"""Exact byte counts: what a weight, and a whole safetensors file, take on disk.

A budget in bytes is a promise about files. So nothing is estimated: payloads are summed over the
very layout that `pack` fills, and the header of a safetensors file is written out and measured,
since it holds the offsets as text.

Source: the safetensors format, https://github.com/huggingface/safetensors#format, and the order its
writer uses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import torch

from quantlib.errors import FormatError
from quantlib.formats.scheme import KEPT, Segment
from quantlib.formats.weight import packed_layout

_LENGTH_BYTES = 8
_ALIGNMENT = 8

_SAFETENSORS_DTYPES: tuple[tuple[torch.dtype, str], ...] = (
    (torch.bool, "BOOL"),
    (torch.uint8, "U8"),
    (torch.int8, "I8"),
    (torch.float8_e5m2, "F8_E5M2"),
    (torch.float8_e4m3fn, "F8_E4M3"),
    (torch.int16, "I16"),
    (torch.uint16, "U16"),
    (torch.float16, "F16"),
    (torch.bfloat16, "BF16"),
    (torch.int32, "I32"),
    (torch.uint32, "U32"),
    (torch.float32, "F32"),
    (torch.float64, "F64"),
    (torch.int64, "I64"),
    (torch.uint64, "U64"),
)
"""In the format's order of alignment: the writer puts tensors of later types first, and sorts by
name within one."""

_RANKS = {dtype: rank for rank, (dtype, _) in enumerate(_SAFETENSORS_DTYPES)}


def payload_bytes(shape: Sequence[int], segments: Sequence[Segment]) -> int:
    """Bytes of every tensor that `pack` makes for a weight [N, K]: codes, scales, zero points,
    padding."""
    layout = packed_layout(shape, segments).values()
    return sum(dtype.itemsize * math.prod(tensor_shape) for dtype, tensor_shape in layout)


def kept_bytes(shape: Sequence[int], kept: str) -> int:
    """Bytes of a weight of any shape that stays as it is (`kept` a key of `scheme.KEPT`: bf16, f16,
    f32)."""
    if kept not in KEPT:
        raise FormatError(f"a weight is kept as {', '.join(KEPT)}, not {kept!r}")
    return math.prod(shape) * KEPT[kept]


def bits_per_weight(shape: Sequence[int], segments: Sequence[Segment]) -> float:
    """True bits per weight of a packed weight [N, K], scales, zero points and padding included."""
    return 8 * payload_bytes(shape, segments) / math.prod(shape)


def safetensors_file_bytes(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Size of the file that `safetensors.torch.save_file(tensors, path, metadata)` writes, to the
    byte.

    tensors: name -> (dtype, shape). Raises FormatError on a dtype that the format lacks.
    """
    for name, (dtype, _) in tensors.items():
        if dtype not in _RANKS:
            raise FormatError(f"tensor {name} is {dtype}, which safetensors files cannot hold")
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name in sorted(tensors, key=lambda name: (-_RANKS[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        end = position + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[_RANKS[dtype]][1],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    # JSON escapes the same characters in Python and in the writer once non-ASCII text is left
    # alone.
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return _LENGTH_BYTES + -(-len(text) // _ALIGNMENT) * _ALIGNMENT + position
