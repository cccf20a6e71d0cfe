"""The file of a training run: weights, moments, and what the method has learned.

One safetensors file, replaced whole, with a JSON object in its header: whoever reads it sees one
moment of the run. Settings are in it, and a run goes on only with the same ones.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantlib.errors import SearchError

FORMAT, VERSION = "quantlib-training", 1


@dataclass(frozen=True)
class State:
    """A moment of a run.

    done:     steps that are behind.
    settings: JSON values on which the result depends.
    tensors:  by name, as `loop` and the method name them.
    numbers:  JSON values of the method.
    """

    done: int
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Replace the file at `path`. Raises SearchError when it cannot be written."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "done": self.done,
            "settings": self.settings,
            "numbers": self.numbers,
        }
        metadata = {"quantlib": json.dumps(head, allow_nan=False)}
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.tensors.items()}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(tensors, temporary, metadata)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise SearchError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)


def load_state(path: Path, settings: Mapping[str, Any]) -> State | None:
    """The state at `path`, None when there is none.

    Raises SearchError for a damaged file, and for one that was begun with other settings: it says
    which, and what they were.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            head = json.loads((opened.metadata() or {})["quantlib"])
        if (head["format"], head["version"]) != (FORMAT, VERSION):
            raise SearchError(f"{path} is of another version of quantlib: train again elsewhere")
        state = State(int(head["done"]), head["settings"], tensors, head["numbers"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SearchError(
            f"{path} is no state of a training run, or damaged ({error}): delete it to train anew"
        ) from error
    check_settings(state.settings, settings, path)
    return state


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raise SearchError that names every setting by which two runs differ."""
    now = json.loads(json.dumps(now))  # as a file gives them back: lists, not tuples
    changed = [
        f"{name} was {_said(before, name)} and is now {_said(now, name)}"
        for name in sorted(before.keys() | now.keys())
        if _said(before, name) != _said(now, name)
    ]
    if changed:
        raise SearchError(
            f"{path} was begun with other settings: {'; '.join(changed)}. Give the same ones to go "
            "on, or another folder to begin anew"
        )


def _said(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "not said"
    text = json.dumps(settings[name])
    return text if len(text) <= 80 else f"{text[:40]}...{text[-30:]} ({len(text)} characters)"


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """The values that JSON can hold."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
