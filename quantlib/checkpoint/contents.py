"""What a packed checkpoint holds, component by component: the table of its model, in its bytes.

`quantlib_map.json` is the model's map, written beside the weights: it says which component every
tensor belongs to, and why the ones that are not packed are as they were. With the headers of the
files it accounts for every byte.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from quantlib.checkpoint.disk import read_json
from quantlib.checkpoint.reader import PackedCheckpoint
from quantlib.checkpoint.writer import CONFIG_FILE, QUANT_METHOD
from quantlib.errors import CheckpointError, ModelError
from quantlib.formats.weight import ORDER
from quantlib.models.components import Component, KeptTensors, component_table
from quantlib.models.modelmap import ModelMap

MAP_FILE = "quantlib_map.json"
_ROTATION = "applied while the model runs: what no weight can hold of a rotation"
_CACHE = "scales of the KV cache, for every place in an image"
_OTHER = "used while the model runs, and no parameter of it"


@dataclass(frozen=True)
class Contents:
    """A checkpoint's parts; their bytes, `beside` and `header_bytes` add up to `file_bytes`.

    beside:       tensors that are no parameters of the model.
    header_bytes: of the safetensors files: names, shapes and places of all tensors.
    """

    model_map: ModelMap
    components: tuple[Component, ...]
    beside: tuple[KeptTensors, ...]
    header_bytes: int
    file_bytes: int

    @property
    def bits(self) -> float:
        """True bits for each parameter, everything counted."""
        return 8 * self.file_bytes / self.model_map.parameters


def map_bytes(model_map: ModelMap) -> bytes:
    """The content of MAP_FILE."""
    return (json.dumps(model_map.to_json(), ensure_ascii=False) + "\n").encode()


def contents(checkpoint: PackedCheckpoint) -> Contents:
    """Where the bytes of a checkpoint are. Raises CheckpointError when its map is missing, damaged,
    or of another model."""
    model_map = _model_map(checkpoint)
    sizes = {
        name: sum(checkpoint.headers[name + suffix].nbytes for suffix in checkpoint.layout(name))
        + (checkpoint.headers[name + ORDER].nbytes if name in checkpoint.around.orders else 0)
        for name in checkpoint
    }
    schemes = {name: str(scheme) for name, scheme in checkpoint.schemes.items()}
    components = component_table(model_map, sizes, schemes)
    beside = _beside(checkpoint, model_map)
    held = sum(row.bytes for row in components) + sum(row.bytes for row in beside)
    rest = checkpoint.total_bytes - held
    return Contents(model_map, tuple(components), beside, rest, checkpoint.total_bytes)


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a folder's config.json says that quantlib packed it; False where there is none."""
    try:
        config = read_json(Path(path) / CONFIG_FILE)
    except CheckpointError:
        return False
    described = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(described, dict) and described.get("quant_method") == QUANT_METHOD


def _beside(checkpoint: PackedCheckpoint, model_map: ModelMap) -> tuple[KeptTensors, ...]:
    """Tensors that are no parameters: a rotation's, a cache's, and what else runs beside the
    model."""
    kv = checkpoint.around.kv
    why = dict.fromkeys(checkpoint.around.tensors.values(), _ROTATION)
    why |= dict.fromkeys(kv.static if kv is not None else (), _CACHE)
    known = {row.name for row in model_map.kept}
    names = [*why, *(name for name in checkpoint.kept_names if name not in known)]
    rows = []
    for name in sorted(names):
        header, reason = checkpoint.headers[name], why.get(name, _OTHER)
        count = math.prod(header.shape)
        rows.append(KeptTensors(name, reason, 1, count, header.nbytes, header.dtype))
    return tuple(rows)


def _model_map(checkpoint: PackedCheckpoint) -> ModelMap:
    file = checkpoint.path / MAP_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{checkpoint.path} has no {MAP_FILE}, which says what belongs to which component: "
            "write it again with quantlib apply"
        )
    try:
        model_map = ModelMap.from_json(read_json(file))
    except ModelError as error:
        raise CheckpointError(f"{file}: {error}") from error
    packed = set(checkpoint) ^ {row.name for row in model_map.weights}
    absent = {row.name for row in model_map.kept} - set(checkpoint.kept_names)
    if packed or absent:
        raise CheckpointError(
            f"{checkpoint.path} and its {MAP_FILE} disagree on {min(packed | absent)}: they do not "
            "belong together; write it again with quantlib apply"
        )
    return model_map
