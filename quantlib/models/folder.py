"""A model's folder: finding it, its config.json, and which safetensors files make up the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantlib.errors import ModelError
from quantlib.models.listing import some

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DOWNLOADED = (
    "*.safetensors",
    "*.json",
    "tokenizer*",
    "*.model",
    "*.jinja",
    "merges.txt",
    "vocab.*",
)
"""What is fetched of a hub repository: never pickle, never code."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def locate(path_or_id: str | Path, allow_download: bool) -> Path:
    """The folder: a local one, or a hub id's snapshot (fetched only if `allow_download`)."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(
            f"{path} is a file: give the folder that holds config.json and the safetensors files."
        )
    if not _HUB_ID.fullmatch(str(path_or_id)):
        raise ModelError(f"there is no folder {path}: give a model's folder or a Hugging Face id.")
    return _from_hub(str(path_or_id), allow_download)


def _from_hub(model_id: str, allow_download: bool) -> Path:
    # imported here: opening a folder needs neither the hub's client nor its start-up time
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model_id, allow_patterns=list(DOWNLOADED), local_files_only=not allow_download
        )
    except LocalEntryNotFoundError as error:
        advice = "check the connection" if allow_download else "allow downloads to fetch it"
        raise ModelError(
            f"{model_id} is neither a folder nor in the local Hugging Face cache: {advice}."
        ) from error
    except (OSError, ValueError) as error:  # HTTP errors are OSErrors, malformed ids ValueErrors
        raise ModelError(
            f"{model_id} cannot be fetched from the Hugging Face hub: {error}"
        ) from error
    return Path(folder)


def read_config(path: Path) -> tuple[dict[str, Any], bytes]:
    """config.json of an unquantized model, and its bytes as they stand in the file."""
    file = path / "config.json"
    try:
        raw = file.read_bytes()
        config = json.loads(raw)
    except FileNotFoundError as error:
        raise ModelError(
            f"{path} has no config.json: give the folder of a transformers model."
        ) from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{file} does not name a model_type: it is not a transformers model's config."
        )
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        quantization = part.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            by = f" by {method}" if method else ""
            raise ModelError(f"{path} is already quantized{by}: give the model it was made from.")
    return config, raw


def list_shards(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """File names in order, and the index (tensor -> file), None for a single file.

    A file `model.safetensors` wins over an index, as in transformers.
    """
    present = sorted(file.name for file in path.iterdir() if file.is_file())
    safetensors = [name for name in present if name.endswith(".safetensors")]
    if SINGLE_FILE in safetensors:
        return [SINGLE_FILE], None
    if INDEX_FILE in present:
        index = _read_index(path / INDEX_FILE)
        shards = sorted(set(index.values()))
        missing = [shard for shard in shards if shard not in safetensors]
        if missing:
            raise ModelError(
                f"{path} lacks {len(missing)} of {len(shards)} shards listed in {INDEX_FILE}: "
                f"{some(missing)}. Fetch them."
            )
        return shards, index
    if len(safetensors) == 1:
        return safetensors, None
    if safetensors:
        raise ModelError(
            f"{path} has {len(safetensors)} safetensors files and no {INDEX_FILE}: fetch it too."
        )
    pickles = [name for name in present if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise ModelError(
            f"{path} holds only pickle files ({some(pickles)}). They can run code when loaded and "
            "are refused: convert the model to safetensors (transformers' save_pretrained does)."
        )
    raise ModelError(f"{path} has no safetensors files.")


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_bytes())["weight_map"]
        index = {str(name): str(shard) for name, shard in weight_map.items()}
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is not a safetensors index: it has no weight_map.") from error
    outside = [shard for shard in index.values() if Path(shard).name != shard]
    if outside:
        raise ModelError(f"{file} names {outside[0]}, which is not a file of its folder.")
    return index


def check_against_index(
    path: Path,
    shard: str,
    found: Iterable[str],
    earlier: Iterable[str],
    index: dict[str, str] | None,
) -> None:
    """Raise ModelError unless `found`, the tensors of this shard, are those the index lists for it.

    earlier: tensors of the shards before it, which it must not hold again.
    """
    if index is None:
        return
    here = set(found)
    listed = {name for name, file in index.items() if file == shard}
    for names, what in (
        (listed - here, "listed in the index for this shard, but not in it"),
        (here - listed, "in this shard, but not listed for it in the index"),
        (here & set(earlier), "in an earlier shard as well"),
    ):
        if names:
            raise ModelError(
                f"{path / shard} and {INDEX_FILE} disagree: {some(sorted(names))} {what}. "
                "Fetch both again."
            )
