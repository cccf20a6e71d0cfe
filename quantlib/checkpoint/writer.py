"""A packed checkpoint, complete or absent.

The folder is written beside its final place as `OUT.partial-<hash>`, every file flushed, and
renamed at the end: whoever sees OUT sees all of it. Tensors are loaded, written and let go one at a
time (`tensorfile.py`), so the peak of memory is the largest tensor, not the model and not a shard.
Files hold no dates and no paths: equal inputs give equal bytes.

    model.safetensors              or model-00001-of-0000N.safetensors, ..., and an index of them
    config.json                    the source's, with a `quantization_config` added
    tokenizer*, *.jinja, ...       byte for byte from the source (see `source_files`)
    quantlib_plan.json             given by the caller
    quantlib_provenance.json       what it was made from, and size and SHA-256 of the files above
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantlib.checkpoint import surroundings
from quantlib.checkpoint.cache_formats import CacheFormats
from quantlib.checkpoint.disk import (
    Content,
    Sink,
    atomic_write,
    disk_errors,
    json_bytes,
    read_json,
    require_free,
)
from quantlib.checkpoint.provenance import digest, file_sha256, versions
from quantlib.checkpoint.staging import LOCK_NAME, resolved, staged
from quantlib.checkpoint.surroundings import CacheSettings
from quantlib.checkpoint.tensorfile import LazyTensor, header_bytes, tensor_content
from quantlib.errors import CheckpointError
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import ORDER
from quantlib.kernels.nonlinear import Operator
from quantlib.models.source import INDEX_FILE, SINGLE_FILE
from quantlib.transforms.rotation import Rotation

QUANT_METHOD = "quantlib"
VERSIONS = (1, 2, 3)
"""Of the checkpoint's layout. A reader refuses versions it does not know. Version 2 is 1 and what
`surroundings` and schemes with several formats add; 3 is 2 and weights of several matrices, of more
than two widths, or with shared exponents. A checkpoint says the lowest that has all it needs."""
CONFIG_FILE = "config.json"
PLAN_FILE = "quantlib_plan.json"
PROVENANCE_FILE = "quantlib_provenance.json"
METADATA = {"format": "pt"}
"""Of every shard: transformers refuses safetensors files without it."""
SHARD_BYTES = 5_000_000_000

_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".py")
_COPIED_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_VOICES = "voices"
_COPIED_FOLDERS = ("additional_chat_templates", _VOICES)
_OTHER_ROOM = 1 << 20
"""Bytes set aside for the small files when free space is checked."""


def quantization_config(
    schemes: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    clips: Mapping[str, Sequence[float]] | None = None,
    orders: Collection[str] = (),
    rotation: Rotation | None = None,
    caches: Mapping[str, CacheSettings] | None = None,
    nonlinear: Mapping[str, Operator] | None = None,
    kv: CacheFormats | None = None,
) -> dict[str, Any]:
    """What `config.json` says of the weights: the scheme and the shape ([N, K], [E, N, K]) of each,
    and what is around them (`surroundings`).

    The shape is there because packed tensors do not tell it: codes are padded to whole words.
    Raises CheckpointError when a weight has a scheme or a shape only, or surroundings do not fit.
    """
    if schemes.keys() != shapes.keys():
        names = ", ".join(sorted(schemes.keys() ^ shapes.keys())[:3])
        raise CheckpointError(
            f"every weight needs a scheme and a shape: {names} has only one of them"
        )
    parsed = {name: Scheme.parse(str(scheme)) for name, scheme in schemes.items()}
    around = surroundings.entries(clips or {}, orders, rotation, caches or {}, nonlinear, kv)
    surroundings.read(around, parsed, {name: tuple(shapes[name]) for name in shapes})
    version = 1
    if around or not all(map(surroundings.is_known_to_version_1, parsed.values())):
        version = 2
    if not all(map(surroundings.is_known_to_version_2, parsed.values())):
        version = 3
    return {
        "quant_method": QUANT_METHOD,
        "version": version,
        "schemes": {name: str(schemes[name]) for name in sorted(schemes)},
        "shapes": {name: list(shapes[name]) for name in sorted(shapes)},
        **around,
    }


def source_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The files of a source model that a checkpoint keeps byte for byte, by relative name.

    Tokenizer, processors, generation config, chat templates, voices of a model that speaks, code
    and licence texts; no weights, no indices of weights, no config.json (it is rewritten), and no
    README: a model card describes the model that was measured.
    """
    folder = Path(folder)
    with disk_errors("read", folder):
        candidates = [path for path in folder.iterdir() if path.is_file()]
        for name in _COPIED_FOLDERS:
            candidates += [path for path in folder.glob(f"{name}/*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path
        for path in sorted(candidates)
        if _is_kept(path.name) or (path.parent.name == _VOICES and path.suffix == ".safetensors")
    }


def _is_kept(name: str) -> bool:
    if name.startswith((".", "quantlib_")) or name == CONFIG_FILE or name.endswith(".index.json"):
        return False
    return name.endswith(_COPIED_SUFFIXES) or name.upper().startswith(_COPIED_PREFIXES)


def shard_names(
    tensors: Mapping[str, LazyTensor], shard_bytes: int = SHARD_BYTES
) -> dict[str, list[str]]:
    """File name -> names of its tensors: a new file whenever the next tensor does not fit.

    A tensor larger than `shard_bytes` gets a file of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    count = len(shards)
    return {
        f"model-{i:05d}-of-{count:05d}.safetensors": names
        for i, names in enumerate(shards, start=1)
    }


def check_output(
    out: str | os.PathLike[str], overwrite: bool = False, identity: str | None = None
) -> None:
    """Raise CheckpointError unless a checkpoint may be written to `out`; call it before long work.

    Free to use: a path that does not exist, an empty folder, and a checkpoint of quantlib's if
    `overwrite` is set or if it was written under the same `identity` (a finished run that is run
    again).
    """
    path = resolved(out)
    with disk_errors("use", path):
        if not path.exists():
            return
        if not path.is_dir():
            raise CheckpointError(f"{path} is a file: choose a folder for the checkpoint")
        if os.path.ismount(path):
            raise CheckpointError(
                f"{path} is a mount point and cannot be renamed into place: choose a folder in it"
            )
        if not any(path.iterdir()):
            return
    if not _is_checkpoint(path):
        raise CheckpointError(
            f"{path} is not empty and is not a checkpoint of quantlib: choose a new or an empty "
            "folder"
        )
    if not overwrite and (identity is None or _recorded(path).get("identity") != identity):
        raise CheckpointError(
            f"{path} already holds another checkpoint: choose another folder, or allow it to be "
            "overwritten"
        )


def write_checkpoint(
    out: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor | LazyTensor],
    config: Mapping[str, Any],
    schemes: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    *,
    clips: Mapping[str, Sequence[float]] | None = None,
    rotation: Rotation | None = None,
    caches: Mapping[str, CacheSettings] | None = None,
    nonlinear: Mapping[str, Operator] | None = None,
    kv: CacheFormats | None = None,
    files: Mapping[str, bytes | Path] | None = None,
    provenance: Mapping[str, Any] | None = None,
    identity: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint and return its folder.

    tensors:    by the name they have in the file: `X.weight_packed`, ..., `X.weight_order` for
                weights whose columns are in another order, and kept parameters under their own
                names.
    config:     the source's config.json; its `quantization_config` becomes
                `quantization_config(schemes, shapes, ...)`.
    clips:      weight -> clip factors of its activation segments.
    rotation:   what of the model's rotation is applied while it runs (`Rotation.online`).
    caches:     attention module -> what is done to its keys and values.
    nonlinear:  layer -> what it computes in integers.
    kv:         formats of the KV cache by modality; scales it names are among `tensors`.
    files:      further files by name, as bytes or as a file to copy: `source_files(folder)`,
                PLAN_FILE.
    provenance: JSON values on where it comes from (hashes and versions: no dates, no paths).
                Versions, the identity and the files' hashes are added.
    identity:   hash of everything the result depends on. A complete checkpoint of the same identity
                at `out` is left as it is: a command killed after its last step may be run again.

    Raises CheckpointError before anything is written (out is taken, no room, not writable) or with
    nothing left behind.
    """
    path = resolved(out)
    check_output(path, overwrite, identity)
    if identity is not None and _is_complete(path, identity):
        (path / LOCK_NAME).unlink(missing_ok=True)
        return path
    tensors = {**tensors, **surroundings.rotation_tensors(rotation)}
    lazy = {n: LazyTensor.of(t) if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}
    shards = {
        name: {n: lazy[n] for n in names} for name, names in shard_names(lazy, shard_bytes).items()
    }
    orders = [name for name in schemes if name + ORDER in lazy]
    described = quantization_config(schemes, shapes, clips, orders, rotation, caches, nonlinear, kv)
    whole_config = {**config, "quantization_config": described}
    contents: dict[str, Content | Path] = dict(files or {})
    contents |= {name: tensor_content(part, METADATA) for name, part in shards.items()}
    if len(shards) > 1:
        contents[INDEX_FILE] = json_bytes(_index(shards))
    contents[CONFIG_FILE] = json_bytes(whole_config)

    layout = {name: [str(t.dtype), list(t.shape)] for name, t in lazy.items()}
    mark = digest([identity, whole_config, layout, sorted(contents)])[:12]
    require_free(path, planned_bytes(lazy, shard_bytes) + _OTHER_ROOM, "the checkpoint")
    with staged(path, mark) as partial:
        records = {}
        for name in sorted(contents):
            content = contents[name]
            content = _copy(content) if isinstance(content, Path) else content
            written = atomic_write(partial / name, content)
            records[name] = {"sha256": written.sha256, "nbytes": written.nbytes}
        made_with = {"versions": versions(), "identity": identity, "files": records}
        atomic_write(partial / PROVENANCE_FILE, json_bytes({**(provenance or {}), **made_with}))
    return path


def planned_bytes(tensors: Mapping[str, LazyTensor], shard_bytes: int = SHARD_BYTES) -> int:
    """Size of the safetensors files that `write_checkpoint` will make, to the byte."""
    parts = [{n: tensors[n] for n in names} for names in shard_names(tensors, shard_bytes).values()]
    headers = sum(len(header_bytes(part, METADATA)) for part in parts)
    return headers + sum(tensor.nbytes for tensor in tensors.values())


def _index(shards: Mapping[str, Mapping[str, LazyTensor]]) -> dict[str, Any]:
    """The index that transformers reads; its total_size counts tensors without headers."""
    total = sum(tensor.nbytes for part in shards.values() for tensor in part.values())
    weight_map = {name: file for file, part in shards.items() for name in part}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _copy(path: Path) -> Content:
    def write(sink: Sink) -> None:
        with disk_errors("read", path), open(path, "rb") as file:
            shutil.copyfileobj(file, sink, 1 << 20)

    return write


def _is_checkpoint(path: Path) -> bool:
    try:
        method = read_json(path / CONFIG_FILE)["quantization_config"]["quant_method"]
    except (CheckpointError, KeyError, TypeError):
        return False
    return bool(method == QUANT_METHOD)


def _recorded(path: Path) -> dict[str, Any]:
    """The provenance file of a checkpoint; empty when it is missing or damaged."""
    try:
        recorded = read_json(path / PROVENANCE_FILE)
    except CheckpointError:
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _is_complete(path: Path, identity: str) -> bool:
    """Whether `path` holds this very checkpoint, every file with its recorded hash."""
    recorded = _recorded(path)
    files = recorded.get("files")
    if recorded.get("identity") != identity or not isinstance(files, dict) or not files:
        return False
    try:
        return all(file_sha256(path / name) == record["sha256"] for name, record in files.items())
    except (CheckpointError, KeyError, TypeError):
        return False
