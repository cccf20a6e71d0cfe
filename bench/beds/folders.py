"""What the folder of a test-bed holds besides its model: records, pictures and sounds."""

from __future__ import annotations

import json
import wave
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from quantlib.bench.artifacts import folder

CALIBRATION, TEST, MODEL = "calibration.jsonl", "test.jsonl", "model"
Row = Mapping[str, Any]


def bed_folder(name: str, cache: Path | None = None) -> Path:
    """Where a bed lies: in the user's cache, or in another one."""
    return (cache / "bench" if cache else folder()) / name


def write_records(path: Path, rows: Iterable[Row]) -> None:
    """A JSONL file of records (`calibration.records`); paths in it are relative to it."""
    text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def picture(pixels: Tensor) -> Image.Image:
    """uint8 [H, W] (grey) or [H, W, 3] as an RGB picture."""
    return Image.fromarray(pixels.numpy()).convert("RGB")


def write_picture(path: Path, pixels: Tensor) -> str:
    """Write `picture(pixels)` as PNG, and return the path as records have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(pixels).save(path, optimize=True)
    return f"{path.parent.name}/{path.name}"


def write_sound(path: Path, samples: Tensor, rate: int) -> str:
    """Write float32 [samples] in -1..1 as mono 16-bit WAV, and return the path as records have
    it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.clip(np.rint(samples.numpy() * 32768), -32768, 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
    return f"{path.parent.name}/{path.name}"


def passages(text: str, count: int, characters: int, skip: int = 0) -> list[Row]:
    """`count` records of text, each of whole articles up to about `characters`, beginning behind
    the first `skip` articles. Articles are what blank lines part; a longer one is cut at a word."""
    rows: list[Row] = []
    parts: list[str] = []
    for article in text.split("\n\n")[skip:]:
        parts.append(article)
        if sum(map(len, parts)) >= characters:
            whole = "\n\n".join(parts)
            rows.append({"text": whole[: characters + 1].rsplit(" ", 1)[0]})
            parts = []
        if len(rows) == count:
            break
    return rows
