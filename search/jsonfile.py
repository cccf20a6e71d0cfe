"""Strict JSON for the files of this room: people edit them, and mistakes must not pass silently.

Python's reader keeps the last of two equal keys and accepts NaN; in a plan that somebody edited the
first hides a mistake and the second poisons every sum, so both are refused here. Errors name the
file and the place in it. Files are written to a temporary neighbour and renamed: a reader never
sees half of one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from quantlib.errors import SearchError

T = TypeVar("T")

_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
}


def parse_object(text: str, source: str) -> dict[str, Any]:
    """The JSON object in `text`; SearchError unless its keys differ and its numbers are finite."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise SearchError(f"{source}: the key {key!r} appears twice; keep one of them")
            seen[key] = value
        return seen

    def refuse(constant: str) -> float:
        raise SearchError(f"{source}: {constant} is not a number a cost or a loss can have")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise SearchError(
            f"{source} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "it was cut short or edited by mistake: restore it or make it again"
        ) from error
    except RecursionError as error:
        raise SearchError(f"{source} is nested too deeply to be one of ours") from error
    except ValueError as error:  # a number of thousands of digits
        raise SearchError(f"{source} holds a number that is not one: {error}") from error
    if not isinstance(value, dict):
        raise SearchError(f"{source} holds {type(value).__name__}, not a JSON object")
    return value


def check_header(data: Mapping[str, Any], kind: str, versions: Sequence[int], source: str) -> None:
    """Raise SearchError unless `data` says it is a `kind` file of a version this code reads."""
    if data.get("format") != kind:
        raise SearchError(f"{source} is not a {kind} file: its 'format' is {data.get('format')!r}")
    version = data.get("version")
    if isinstance(version, bool) or version not in versions:
        known = " and ".join(map(str, versions))
        raise SearchError(
            f"{source} has version {version!r} and this quantlib reads version {known}: make it "
            "again"
        )


def check_keys(data: Mapping[str, Any], required: set[str], optional: set[str], where: str) -> None:
    """Raise SearchError for a missing key or one nobody reads (most likely a misspelled one)."""
    missing = sorted(required - data.keys())
    unknown = sorted(data.keys() - required - optional)
    if missing:
        raise SearchError(f"{where}: {', '.join(map(repr, missing))} is missing")
    if unknown:
        raise SearchError(
            f"{where}: nothing reads {', '.join(map(repr, unknown))}; a misspelled key?"
        )


def field(data: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    """`data[key]`, which must be a `kind`: whole numbers are numbers, booleans are neither."""
    value = data.get(key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SearchError(f"{where}: {key!r} must be {_NAMES[kind]}, and it is {_shorten(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise SearchError(f"{where}: {key!r} is not finite")
    return value


def texts(data: Mapping[str, Any], key: str, where: str) -> dict[str, str]:
    """`data[key]` as an object of texts, empty when the key is absent."""
    values = field(data, key, dict, where) if key in data else {}
    return {name: field(values, name, str, f"{where}, {key}") for name in values}


def numbers(data: Mapping[str, Any], key: str, where: str) -> dict[str, float]:
    """`data[key]` as an object of numbers, empty when the key is absent."""
    values = field(data, key, dict, where) if key in data else {}
    return {name: field(values, name, float, f"{where}, {key}") for name in values}


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dump(value: object) -> str:
    """One line of JSON. ValueError for NaN and infinity: a bug of the caller, not of a file."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def read_text(path: str | Path, what: str) -> str:
    """The text of a file. Raises SearchError that says which file could not be read and why."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SearchError(f"there is no {what} at {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SearchError(f"the {what} at {path} cannot be read: {error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write `text` so that `path` holds its old content or all of the new, whatever happens."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise SearchError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
