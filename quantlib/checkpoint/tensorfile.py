"""safetensors files, written one tensor at a time and read through the library's memory map.

The library's own `save_file` wants every tensor in memory at once. The format does not: a header
with the name, dtype, shape and offsets of every tensor is followed by their numbers, so a writer
that knows the shapes beforehand needs room for one tensor. What is written here is, byte for byte,
what the library writes for the same tensors (`tests/checkpoint/test_tensorfile.py`): compact JSON
padded with spaces to a multiple of 8, tensors in order of falling alignment and then of name, so
that every tensor is aligned in the map and equal tensors give equal files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch

from quantlib.checkpoint.disk import Content, Sink, atomic_write
from quantlib.checkpoint.provenance import tensor_bytes
from quantlib.errors import CheckpointError, ModelError
from quantlib.formats.size import TensorForm, safetensors_header, safetensors_order
from quantlib.models.headers import TORCH_DTYPES, TensorHeader, read_headers


@dataclass(frozen=True)
class LazyTensor:
    """A tensor known by dtype and shape, made by `load` when it is its turn to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @staticmethod
    def of(tensor: torch.Tensor) -> LazyTensor:
        """A tensor that is in memory already."""
        return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def header_bytes(
    tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header of the safetensors file with these tensors, its 8-byte length included."""
    return safetensors_header(_forms(tensors), metadata or None)


def _forms(tensors: Mapping[str, LazyTensor]) -> dict[str, TensorForm]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def tensor_content(
    tensors: Mapping[str, torch.Tensor | LazyTensor], metadata: Mapping[str, str] | None = None
) -> Content:
    """The content of a safetensors file, for `disk.atomic_write` or `WorkDir.commit`.

    Each lazy tensor is loaded, written and let go in turn. Writing raises CheckpointError when one
    is not what it said it was.
    """
    lazy = {
        name: LazyTensor.of(t) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()
    }

    def write(sink: Sink) -> None:
        sink.write(header_bytes(lazy, metadata))
        for name in safetensors_order(_forms(lazy)):
            _write_tensor(sink, name, lazy[name])

    return write


def _write_tensor(sink: Sink, name: str, expected: LazyTensor) -> None:
    tensor = expected.load()
    if tensor.dtype != expected.dtype or tuple(tensor.shape) != expected.shape:
        raise CheckpointError(
            f"the tensor {name} was announced as {expected.dtype} {list(expected.shape)} and came "
            f"as {tensor.dtype} {list(tensor.shape)}: nothing was written"
        )
    sink.write(tensor_bytes(tensor))


def atomic_save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a whole safetensors file or leave what was there. Raises CheckpointError.

    Equal tensors give equal bytes, whatever their order in `tensors`.
    """
    atomic_write(path, tensor_content(tensors, metadata))


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was read and whose size agrees with it."""

    path: Path
    headers: dict[str, TensorHeader]

    @staticmethod
    def open(path: str | os.PathLike[str]) -> TensorFile:
        """Read the header only.

        Raises CheckpointError when the file is missing, truncated or no safetensors file: touching
        the missing part of a truncated file through a memory map would end the process.
        """
        try:
            headers, _ = read_headers(Path(path))
        except ModelError as error:
            raise CheckpointError(str(error)) from error
        return TensorFile(Path(path), headers)

    @cached_property
    def _map(self) -> Any:
        try:
            return safetensors.safe_open(self.path, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path} is damaged ({error}): copy or produce it again"
            ) from error

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the file's memory map (private, copy-on-write): read when it is used."""
        if name not in self.headers:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        tensor: torch.Tensor = self._map.get_tensor(name)
        return tensor

    def lazy(self, name: str) -> LazyTensor:
        """`read(name)`, put off."""
        header = self.headers[name]
        return LazyTensor(TORCH_DTYPES[header.dtype], header.shape, lambda: self.read(name))


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on its memory map. Raises CheckpointError."""
    file = TensorFile.open(path)
    return {name: file.read(name) for name in file.headers}
