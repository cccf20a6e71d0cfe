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
from quantlib.formats.activation import UNROUNDED
from quantlib.formats.composite import stored_bytes
from quantlib.formats.scheme import KEPT, Scheme
from quantlib.formats.weight import packed_layout
from quantlib.formats.weight_format import Segment

TensorForm = tuple[torch.dtype, Sequence[int]]
"""dtype and shape of a tensor, without its values."""

_LENGTH_BYTES = 8
_ALIGNMENT = 8

_SAFETENSORS_DTYPES: tuple[tuple[torch.dtype, str], ...] = (
    (torch.bool, "BOOL"),
    (torch.uint8, "U8"),
    (torch.int8, "I8"),
    (torch.float8_e5m2, "F8_E5M2"),
    (torch.float8_e4m3fn, "F8_E4M3"),
    (torch.float8_e8m0fnu, "F8_E8M0"),
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


def true_bits(scheme: Scheme, shape: Sequence[int]) -> tuple[float, float]:
    """(bits per weight, bits per activation) of a weight [N, K] or a stack [E, N, K] in `scheme`.

    Both are means over all segments. A weight's count scales, zero points and padding; an
    activation's only its codes (its scales, one per token and segment or group, exist only while
    the model runs). Columns that are not rounded count 16 bits.
    """
    matrix = math.prod(shape[:-1]), shape[-1]
    rounded = scheme.activations(matrix[1])
    codes = sum(segment.format.bits * segment.length for segment in rounded)
    activation_bits = codes / matrix[1] if rounded else float(UNROUNDED)
    if scheme.weight is None:
        return 8.0 * KEPT[str(scheme.kept)], activation_bits
    return 8 * stored_bytes(matrix, scheme) / math.prod(matrix), activation_bits


def safetensors_order(tensors: Mapping[str, TensorForm]) -> list[str]:
    """Names in the order in which the library's writer lays the tensors out: by falling alignment,
    then by name.

    Raises FormatError on a dtype that the format lacks.
    """
    for name, (dtype, _) in tensors.items():
        if dtype not in _RANKS:
            raise FormatError(f"the tensor {name} is {dtype}, which safetensors files cannot hold")
    return sorted(tensors, key=lambda name: (-_RANKS[tensors[name][0]], name))


def safetensors_header(
    tensors: Mapping[str, TensorForm], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header of the safetensors file with these tensors, its 8-byte length included.

    Raises FormatError on a dtype that the format lacks.
    """
    header: dict[str, object] = {}
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    start = 0
    for name in safetensors_order(tensors):
        dtype, shape = tensors[name]
        stop = start + dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[_RANKS[dtype]][1],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    # JSON escapes the same characters in Python and in the writer once non-ASCII text is left
    # alone.
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def safetensors_file_bytes(
    tensors: Mapping[str, TensorForm], metadata: Mapping[str, str] | None = None
) -> int:
    """Size of the file that `safetensors.torch.save_file(tensors, path, metadata)` writes, to the
    byte. Raises FormatError on a dtype that the format lacks."""
    payload = sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())
    return len(safetensors_header(tensors, metadata)) + payload
