"""The source model: a folder with config.json and safetensors files, opened without its weights.

`Source.open` reads the config and the headers (a few MB even for hundreds of GB of weights) and
checks everything that can be checked from them: missing or truncated files, an index that disagrees
with its shards, pickle files, an already quantized model. Weights are read one by one, into memory
of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.errors import ModelError
from quantlib.models.compose import flatten
from quantlib.models.families import DiskRules
from quantlib.models.folder import (
    INDEX_FILE,
    SINGLE_FILE,
    check_against_index,
    list_shards,
    locate,
    read_config,
)
from quantlib.models.headers import TORCH_DTYPES, TensorHeader, read_headers
from quantlib.models.memory import empty
from quantlib.models.stored import StoredParameter, stored_parameters
from quantlib.models.tables import find

__all__ = ["INDEX_FILE", "SINGLE_FILE", "Source"]

_COMPARED_BYTES = 16 << 20
"""`same_data` compares two tensors this many bytes at a time."""


@dataclass(frozen=True)
class Source:
    """A model on disk. Use `Source.open`.

    path:        the folder.
    config:      config.json.
    headers:     tensors as they are named on disk.
    parameters:  parameters of the transformers-5 module and the tensors that build each.
    fingerprint: sha256 (hex) over config.json and every file's name, size and header. It names the
                 architecture, the shapes and the files' layout; hashing the weights too would cost
                 a pass over all of them.
    file_bytes:  size of the safetensors files, headers included: what a compressed checkpoint is
                 compared with.
    """

    path: Path
    config: dict[str, Any]
    headers: dict[str, TensorHeader]
    parameters: dict[str, StoredParameter]
    fingerprint: str
    file_bytes: int

    @staticmethod
    def open(path_or_id: str | Path, allow_download: bool = False) -> Source:
        """Open a local folder, or a Hugging Face id: its cached copy, fetched if `allow_download`.

        Raises ModelError saying what is missing, damaged or unsupported, and where.
        """
        path = locate(path_or_id, allow_download)
        config, config_bytes = read_config(path)
        digest = hashlib.sha256(config_bytes)
        headers: dict[str, TensorHeader] = {}
        file_bytes = 0
        shards, index = list_shards(path)
        for shard in shards:
            found, raw = read_headers(path / shard)
            check_against_index(path, shard, found, headers, index)
            headers.update(found)
            size = (path / shard).stat().st_size
            file_bytes += size
            digest.update(f"\0{shard}\0{size}\0".encode())
            digest.update(raw)
        parameters = stored_parameters(headers, _disk_rules(config))
        return Source(path, config, headers, parameters, digest.hexdigest(), file_bytes)

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors on disk, file headers not counted."""
        return sum(header.nbytes for header in self.headers.values())

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """Parameter (or tensor on disk) `name` in its stored dtype, in memory of its own.

        expert: of a stack `[E, N, K]`, read this matrix `[N, K]` alone.
        Raises ModelError when there is no such tensor, or when it holds inf or nan.
        """
        tensor = self.read_raw(name, expert)
        bad = _not_finite(tensor)
        if bad:
            raise ModelError(
                f"{name} in {self.path} holds {bad} values that are inf or nan, of "
                f"{tensor.numel()}: fetch the model again, or repair these weights first."
            )
        return tensor

    def read_raw(self, name: str, expert: int | None = None) -> Tensor:
        """As `read`, values unchecked."""
        stored = self.parameters.get(name)
        if stored is None:
            if name not in self.headers:
                raise ModelError(f"{self.path} has no tensor {name}.")
            header = self.headers[name]
            parts: tuple[tuple[str, ...], ...] = ((name,),)
            stored = StoredParameter(name, header.dtype, header.shape, header.nbytes, parts)
        if expert is not None and not (len(stored.shape) == 3 and 0 <= expert < stored.shape[0]):
            raise ModelError(f"{name} has shape {list(stored.shape)}: it has no expert {expert}.")
        if not stored.stacked:
            return self._read_tensor(stored.parts[0][0], expert)
        shape = stored.shape if expert is None else stored.shape[1:]
        result = empty(shape, TORCH_DTYPES[stored.dtype])
        chosen = stored.parts if expert is None else (stored.parts[expert],)
        # copied part by part: a second copy of a whole stack of experts would double the peak
        for matrix, tensors in zip(result.view(-1, *stored.shape[1:]), chosen, strict=True):
            row = 0
            for tensor in tensors:
                rows = self.headers[tensor].shape[0]
                matrix[row : row + rows] = self._read_tensor(tensor)
                row += rows
        return result

    def same_data(self, first: str, second: str) -> bool:
        """Whether two parameters, each one tensor on disk, hold the same bytes."""
        a, b = (self.headers[self.parameters[name].parts[0][0]] for name in (first, second))
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        pieces = zip(self._pieces(a), self._pieces(b), strict=True)
        return all(torch.equal(left, right) for left, right in pieces)

    def attach(self, model: nn.Module) -> None:
        """Add to the module what these parameters need beside them: nothing. A source in another
        basis overrides it."""

    def _pieces(self, header: TensorHeader) -> Iterator[Tensor]:
        for offset in range(0, header.nbytes, _COMPARED_BYTES):
            length = min(_COMPARED_BYTES, header.nbytes - offset)
            yield self._read_bytes(header.file, header.start + offset, length)

    def _read_tensor(self, tensor: str, index: int | None = None) -> Tensor:
        header = self.headers[tensor]
        start, nbytes, shape = header.start, header.nbytes, header.shape
        if index is not None:
            nbytes //= shape[0]
            start, shape = start + index * nbytes, shape[1:]
        data = self._read_bytes(header.file, start, nbytes)
        return data.view(TORCH_DTYPES[header.dtype]).view(shape)

    def _read_bytes(self, file: str, start: int, nbytes: int) -> Tensor:
        data = empty((nbytes,), torch.uint8)
        view = data.numpy().data
        try:
            with (self.path / file).open("rb", buffering=0) as handle:
                handle.seek(start)
                done = 0
                while done < nbytes:  # one call reads at most 2 GiB
                    count = handle.readinto(view[done:])
                    if not count:
                        raise ModelError(
                            f"{self.path / file} is shorter than when it was opened: did it change?"
                        )
                    done += count
        except OSError as error:
            raise ModelError(
                f"{self.path / file} cannot be read: {error.strerror or error}."
            ) from error
        return data


def _disk_rules(config: dict[str, Any]) -> DiskRules:
    family = find(config["model_type"])
    if family is not None:
        return flatten(family, config, find).disk
    # imported here: a model with a table does not need transformers to be read
    from quantlib.models.conversion import derive_disk_rules

    return derive_disk_rules(config["model_type"])


def _not_finite(tensor: Tensor) -> int:
    """How many values are inf or nan."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0
    if tensor.element_size() == 1:
        tensor = tensor.float()  # 8-bit floats have no arithmetic of their own
    # both are nan if any value is; unlike isfinite, this needs no memory of the tensor's size
    low, high = torch.aminmax(tensor)
    if low.isfinite() and high.isfinite():
        return 0
    return tensor.numel() - int(tensor.isfinite().sum())
