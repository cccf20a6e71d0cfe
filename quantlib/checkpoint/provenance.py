"""What a result was made from and with: hashes and versions, never dates, paths or host names.

Hashes are SHA-256 in hexadecimal. `digest` of a JSON value is how every key in a work directory is
made: the canonical text has sorted keys and no spaces, and Python writes each float as the shortest
decimal that reads back the same, so equal inputs give equal keys on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from quantlib.checkpoint.disk import disk_errors
from quantlib.models.source import Source

_PACKAGES = {"quantlib": "quantlib-torch", "torch": "torch", "transformers": "transformers"}
_CHUNK = 16 << 20


def canonical_json(value: Any) -> bytes:
    """The one text of a JSON value. TypeError for what JSON lacks, ValueError for nan and inf."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8")


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value` (tuples count as lists)."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, read in pieces. Raises CheckpointError if it cannot be."""
    path = Path(path)
    total = hashlib.sha256()
    with disk_errors("read", path), open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            total.update(piece)
    return total.hexdigest()


def source_hash(source: Source) -> str:
    """SHA-256 over the bytes of a source's weight files: its fingerprint alone would not notice
    changed weights. Raises CheckpointError if one cannot be read."""
    files = sorted(Path(source.path).glob("*.safetensors"))
    return digest([source.fingerprint, [[file.name, file_sha256(file)] for file in files]])


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The numbers of a tensor, row by row: as they lie in a safetensors file.

    (On little-endian machines, the only ones torch is released for.)
    """
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def versions() -> dict[str, str]:
    """Versions of quantlib, torch and transformers; "unknown" where none is installed."""
    return {name: _version(package) for name, package in _PACKAGES.items()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
