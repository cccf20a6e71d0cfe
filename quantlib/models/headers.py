"""Safetensors headers, read and checked against the file without touching a weight.

A header is 8 bytes of length (little end first) and that many bytes of JSON: name -> dtype, shape,
[begin, end) relative to the end of the header. Reading it ourselves (instead of opening the file
with the safetensors library) gives what the library does not: the position of every tensor, so that
one expert or one tensor can be read into memory of its own and freed, where a memory map would stay
resident as long as any tensor of the file is alive; and errors that say which tensor of which file
is cut off.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from quantlib.errors import ModelError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Names of the safetensors format -> torch dtypes: what a file may hold."""

WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
"""What a parameter to quantize may be stored in."""

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library: more is not a header but a wrong file."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor on disk: `nbytes` bytes of `file` (its name, without folder) from byte `start`."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


def read_headers(path: Path) -> tuple[dict[str, TensorHeader], bytes]:
    """Headers of all tensors of one safetensors file, and the raw JSON they were read from.

    Raises ModelError when the file is not safetensors, is cut off, or holds a dtype torch lacks.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = _header_bytes(path, size, file)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    data_start = _LENGTH_BYTES + len(raw)
    headers = {}
    for name, entry in _parse(path, raw).items():
        if name != "__metadata__":
            headers[name] = _tensor_header(path, name, entry, data_start)
    end = max((header.start + header.nbytes for header in headers.values()), default=data_start)
    if end > size:
        raise ModelError(
            f"{path} is truncated: its tensors end at byte {end}, the file has {size}. "
            "Fetch it again."
        )
    return headers, raw


def _header_bytes(path: Path, size: int, file: BinaryIO) -> bytes:
    length_bytes = file.read(_LENGTH_BYTES)
    if len(length_bytes) < _LENGTH_BYTES:
        raise ModelError(f"{path} is truncated: {size} bytes are too few for a safetensors header.")
    (length,) = struct.unpack("<Q", length_bytes)
    if length > _MAX_HEADER_BYTES:
        raise ModelError(f"{path} is not a safetensors file: its header claims {length} bytes.")
    if _LENGTH_BYTES + length > size:
        raise ModelError(
            f"{path} is truncated: its header has {length} bytes, the file {size}. Fetch it again."
        )
    return file.read(length)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw)
    except ValueError as error:
        raise ModelError(
            f"{path} is not a safetensors file: its header is not JSON ({error})."
        ) from error
    if not isinstance(entries, dict):
        raise ModelError(f"{path} is not a safetensors file: its header is not a JSON object.")
    return entries


def _tensor_header(path: Path, name: str, entry: Any, data_start: int) -> TensorHeader:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise ModelError(f"{path}: the header entry of {name} is malformed.") from error
    if dtype not in TORCH_DTYPES:
        known = ", ".join(TORCH_DTYPES)
        raise ModelError(f"{path}: {name} has the unsupported dtype {dtype}; supported: {known}.")
    expected = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if begin < 0 or min(shape, default=0) < 0 or end - begin != expected:
        raise ModelError(
            f"{path}: {name} is {dtype} {list(shape)} and needs {expected} bytes, "
            f"its header gives it {end - begin}. The file is damaged; fetch it again."
        )
    return TensorHeader(dtype, shape, path.name, data_start + begin, expected)
