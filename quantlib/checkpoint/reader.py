"""A packed checkpoint, checked from its headers and mapped into memory.

`read_layout` reads `config.json` and the header of every safetensors file, a few kilobytes, and
from them knows that every weight has exactly the tensors its scheme and shape call for. What it
returns hands out tensors on the files' memory maps: opening a checkpoint of any size costs no
memory, and kernels run on the mapped bytes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantlib.checkpoint import surroundings
from quantlib.checkpoint.cache_formats import Place, place_of
from quantlib.checkpoint.disk import read_json
from quantlib.checkpoint.provenance import file_sha256
from quantlib.checkpoint.surroundings import Surroundings
from quantlib.checkpoint.tensorfile import TensorFile
from quantlib.checkpoint.writer import CONFIG_FILE, PROVENANCE_FILE, QUANT_METHOD, VERSIONS
from quantlib.errors import CheckpointError, FormatError
from quantlib.formats.activation import ActivationSegment
from quantlib.formats.composite import (
    BASIS,
    BLOCK,
    DOWN,
    ROWS,
    SPAN,
    UP,
    StoredWeight,
    stored_layout,
    unpack_stored,
)
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import (
    ORDER,
    PACKED,
    PLACES,
    ROW_SCALE,
    SCALE,
    ZERO_POINT,
    TensorLayout,
)
from quantlib.formats.weight_format import Segment
from quantlib.models.headers import TORCH_DTYPES, TensorHeader
from quantlib.models.source import INDEX_FILE, SINGLE_FILE
from quantlib.transforms.rotation import Rotation

_KEPT_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_PACKED_NAME = re.compile(
    rf"(.+?)(?:{DOWN}|{UP}|(?:{SPAN}|{ROWS}|{BASIS})\d+)?"
    rf"(?:(?:{PACKED}|{PLACES}|{ROW_SCALE}|{SCALE}|{ZERO_POINT})(?:_\d+)?|{ORDER}|{BLOCK})"
)


@dataclass(frozen=True)
class PackedCheckpoint:
    """A checkpoint whose layout was found consistent. Iterating gives the names in `schemes`.

    config:      config.json.
    schemes:     weight name -> scheme, kept weights ("bf16") included.
    shapes:      weight name -> the unpacked weight's shape, [N, K] or [E, N, K].
    headers:     every tensor of the files by name.
    total_bytes: sizes of the safetensors files, headers included: what budgets and comparisons
                 count.
    around:      clip factors, orders and a rotation, as config.json has them.
    """

    path: Path
    config: dict[str, Any]
    schemes: dict[str, Scheme]
    shapes: dict[str, tuple[int, ...]]
    headers: dict[str, TensorHeader]
    total_bytes: int
    around: Surroundings
    _files: dict[str, TensorFile]

    def __iter__(self) -> Iterator[str]:
        return iter(self.schemes)

    def __len__(self) -> int:
        return len(self.schemes)

    def layout(self, weight: str) -> TensorLayout:
        """Suffix -> dtype and shape of the tensors that hold `weight`; suffix "" for a kept one."""
        return _layout(self._scheme(weight), self.shapes[weight])

    def tensors(self, weight: str) -> dict[str, torch.Tensor]:
        """Suffix -> tensor, memory-mapped: what `formats.weight.unpack` and the kernels take.

        Raises CheckpointError when the checkpoint has no such weight.
        """
        return {suffix: self._read(weight + suffix) for suffix in self.layout(weight)}

    def quantized(self, weight: str) -> StoredWeight:
        """The unpacked weight, [N, K], or [E*N, K] for a stack.

        Raises CheckpointError when there is none, when it is kept, or its values are damaged.
        """
        scheme = self._packed_scheme(weight)
        try:
            return unpack_stored(self.tensors(weight), _matrix(self.shapes[weight]), scheme)
        except FormatError as error:
            raise CheckpointError(f"{weight} in {self.path}: {error}") from error

    def segments(self, weight: str) -> tuple[Segment, ...]:
        """The K segments of a packed weight. Raises CheckpointError when it is kept, FormatError
        when it is several matrices."""
        return self._packed_scheme(weight).segments(self.shapes[weight][-1])

    def activations(self, weight: str) -> tuple[ActivationSegment, ...]:
        """How the inputs of a weight are rounded, clip factors included; none: not at all."""
        scheme = self._scheme(weight)
        return surroundings.activations(self.around, weight, scheme, self.shapes[weight][-1])

    def order(self, weight: str) -> torch.Tensor | None:
        """int32 [K], memory-mapped: which input each column of a packed weight takes; None: its
        own. Raises CheckpointError when it is no order."""
        if weight not in self.around.orders:
            return None
        order = self._read(weight + ORDER)
        surroundings.check_order(weight, order)
        return order

    def rotation(self) -> Rotation | None:
        """What is applied while the model runs (`transforms.online.attach`), if anything is.

        Raises CheckpointError when it is damaged; whether it fits the model is `attach`'s to check.
        """
        if self.around.settings is None:
            return None
        tensors = {name: self._read(stored) for name, stored in self.around.tensors.items()}
        return surroundings.make_rotation(tensors, self.around.settings)

    def static_scales(self) -> dict[Place, torch.Tensor]:
        """Scales of the KV cache that are known beforehand, memory-mapped: int32 [places, kv_heads,
        groups] by layer, modality and side."""
        names = self.around.kv.static if self.around.kv is not None else ()
        return {place_of(name): self._read(name) for name in sorted(names)}

    @property
    def kept_names(self) -> list[str]:
        """Tensors stored as they are: norms, biases, weights whose scheme is a kept one."""
        others = {
            weight + suffix for weight in self.schemes for suffix in self.layout(weight) if suffix
        }
        others |= {weight + ORDER for weight in self.around.orders}
        others |= set(self.around.tensors.values())
        others |= self.around.kv.static if self.around.kv is not None else set()
        return [name for name in self.headers if name not in others]

    def kept(self, name: str) -> torch.Tensor:
        """A parameter stored as it is, memory-mapped. Raises CheckpointError when there is none."""
        return self._read(name)

    def verify(self) -> None:
        """Hash every file and compare with the provenance; CheckpointError names a damaged one.

        Reading the layout finds what is missing or cut off; this finds flipped bits, and reads
        everything to do so.
        """
        for name, record in read_json(self.path / PROVENANCE_FILE)["files"].items():
            if file_sha256(self.path / name) != record["sha256"]:
                raise CheckpointError(
                    f"{self.path / name} has changed since quantlib wrote it: copy or make the "
                    "checkpoint again"
                )

    def _scheme(self, weight: str) -> Scheme:
        if weight not in self.schemes:
            raise CheckpointError(f"{self.path} has no weight {weight}")
        return self.schemes[weight]

    def _packed_scheme(self, weight: str) -> Scheme:
        scheme = self._scheme(weight)
        if scheme.weight is None:
            raise CheckpointError(
                f"{weight} in {self.path} is kept as {scheme}: read it with `kept`"
            )
        return scheme

    def _read(self, name: str) -> torch.Tensor:
        if name not in self.headers:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._files[self.headers[name].file].read(name)


def read_layout(path: str | os.PathLike[str]) -> PackedCheckpoint:
    """Open a checkpoint that `write_checkpoint` made.

    Raises CheckpointError: no such folder, not made by quantlib or by a newer one, a file missing
    or truncated, an unknown scheme, a tensor missing, unexpected, or of another dtype or shape than
    its scheme calls for.
    """
    path = Path(path)
    if not os.path.isdir(path):  # Path.is_dir may raise
        raise CheckpointError(f"there is no checkpoint folder {path}")
    config = read_json(path / CONFIG_FILE)
    schemes, shapes = _quantization(path, config)
    around = _surroundings(path, config, schemes, shapes)
    files, headers = _open_files(path)
    checkpoint = PackedCheckpoint(
        path=path,
        config=config,
        schemes=schemes,
        shapes=shapes,
        headers=headers,
        total_bytes=sum(file.path.stat().st_size for file in files.values()),
        around=around,
        _files=files,
    )
    _check_tensors(checkpoint)
    return checkpoint


def _quantization(path: Path, config: Any) -> tuple[dict[str, Scheme], dict[str, tuple[int, ...]]]:
    """Schemes and shapes from config.json, with the checks that need no tensor."""
    described = config.get("quantization_config") if isinstance(config, dict) else None
    method = described.get("quant_method") if isinstance(described, dict) else None
    if not isinstance(described, dict) or method != QUANT_METHOD:
        made_by = f"was quantized by {method!r}" if method else "is not quantized"
        raise CheckpointError(f"the model in {path} {made_by}: give a folder that quantlib wrote")
    if described.get("version") not in VERSIONS:
        raise CheckpointError(
            f"{path} has version {described.get('version')} of quantlib's layout and this quantlib "
            f"reads up to {max(VERSIONS)}: update quantlib, or make the checkpoint again"
        )
    schemes: dict[str, Scheme] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for name, scheme in described["schemes"].items():
            schemes[name] = Scheme.parse(scheme)
            shapes[name] = tuple(int(size) for size in described["shapes"][name])
            if not shapes[name]:
                raise ValueError(f"{name} has no shape")
    except FormatError as error:
        raise CheckpointError(f"{path / CONFIG_FILE}, weight {name}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the quantization_config in {path / CONFIG_FILE} is damaged ({type(error).__name__}: "
            f"{error}): make the checkpoint again"
        ) from error
    return schemes, shapes


def _surroundings(
    path: Path, config: Any, schemes: dict[str, Scheme], shapes: dict[str, tuple[int, ...]]
) -> Surroundings:
    try:
        return surroundings.read(config["quantization_config"], schemes, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: {error}") from error


def _open_files(path: Path) -> tuple[dict[str, TensorFile], dict[str, TensorHeader]]:
    """The safetensors files and all their tensors; an index, if there is one, must agree."""
    index: dict[str, str] | None = None
    names = [SINGLE_FILE]
    if not (path / SINGLE_FILE).exists() and (path / INDEX_FILE).exists():
        index = _read_index(path / INDEX_FILE)
        names = sorted(set(index.values()))
    files: dict[str, TensorFile] = {}
    headers: dict[str, TensorHeader] = {}
    for name in names:
        if not (path / name).is_file():
            raise CheckpointError(f"{path} lacks {name}: copy or make the checkpoint again")
        files[name] = TensorFile.open(path / name)
        headers |= files[name].headers
    if index is not None and index != {name: header.file for name, header in headers.items()}:
        strays = index.keys() ^ headers.keys()
        what = f"about {min(strays)}" if strays else "on which file holds what"
        raise CheckpointError(
            f"{path / INDEX_FILE} and the files beside it disagree {what}: copy or make the "
            "checkpoint again"
        )
    return files, headers


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = {str(name): str(file) for name, file in read_json(path)["weight_map"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not an index of safetensors files: it has no weight_map"
        ) from error
    outside = [file for file in index.values() if Path(file).name != file]
    if outside:
        raise CheckpointError(f"{path} names {outside[0]}, which is not a file of its folder")
    return index


def _check_tensors(checkpoint: PackedCheckpoint) -> None:
    """Raise CheckpointError unless every weight has exactly the tensors its scheme calls for."""
    path, headers = checkpoint.path, checkpoint.headers
    for weight, scheme in checkpoint.schemes.items():
        try:
            layout = checkpoint.layout(weight)
        except FormatError as error:
            raise CheckpointError(f"{path / CONFIG_FILE}, weight {weight}: {error}") from error
        for suffix, (dtype, shape) in layout.items():
            header = headers.get(weight + suffix)
            if header is None:
                raise CheckpointError(
                    f"{path} lacks the tensor {weight + suffix}, which {scheme} calls for: make "
                    "the checkpoint again"
                )
            if (TORCH_DTYPES[header.dtype], header.shape) != (dtype, shape):
                raise CheckpointError(
                    f"{weight + suffix} in {path} is {header.dtype} {list(header.shape)}, and a "
                    f"weight of {list(checkpoint.shapes[weight])} in {scheme} needs {dtype} "
                    f"{list(shape)}: config.json and the files do not belong together, or one is "
                    "damaged"
                )
    _check_surroundings(checkpoint)
    for name in checkpoint.kept_names:
        match = _PACKED_NAME.fullmatch(name)
        weight = match[1] if match else name
        if weight in checkpoint.schemes and "" not in checkpoint.layout(weight):
            raise CheckpointError(
                f"{path} has the tensor {name}, which {checkpoint.schemes[weight]} has no use for: "
                "config.json and the files do not belong together"
            )


def _check_surroundings(checkpoint: PackedCheckpoint) -> None:
    """Raise CheckpointError unless orders and the rotation's tensors are there, and of their
    dtypes."""
    path, around = checkpoint.path, checkpoint.around
    wanted: dict[str, tuple[torch.dtype, list[int] | None]] = {
        weight + ORDER: (torch.int32, [checkpoint.shapes[weight][-1]]) for weight in around.orders
    }
    wanted |= dict.fromkeys(around.tensors.values(), (surroundings.STORED, None))
    static = around.kv.static if around.kv is not None else ()
    wanted |= dict.fromkeys(static, (torch.int32, None))
    for name, (dtype, shape) in wanted.items():
        header = checkpoint.headers.get(name)
        if header is None:
            raise CheckpointError(
                f"{path} lacks the tensor {name}, which config.json names: make the checkpoint "
                "again"
            )
        found = list(header.shape)
        if TORCH_DTYPES[header.dtype] != dtype or found != (found if shape is None else shape):
            raise CheckpointError(
                f"{name} in {path} is {header.dtype} {found}, expected {dtype}"
                f"{'' if shape is None else f' {shape}'}: config.json and the files do not belong "
                "together, or one is damaged"
            )


def _layout(scheme: Scheme, shape: tuple[int, ...]) -> TensorLayout:
    if scheme.weight is None:
        return {"": (_KEPT_DTYPES[str(scheme.kept)], shape)}
    return stored_layout(_matrix(shape), scheme)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """[N, K] of a weight, [E*N, K] of a stack of experts: as formats and kernels take it."""
    return math.prod(shape[:-1]), shape[-1]
