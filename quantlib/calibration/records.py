"""Records: what a model of several modalities is calibrated and judged on, one JSON object a line.

    {"text": "..."}                                            words
    {"image": "a.png", "question": "...", "answer": "..."}     a picture, and what is said of it
    {"audio": "a.wav", "answer": "..."}                        sound, and the words in it
    {"prompt": "...", "target": "b.png"}                       words, and the picture they ask for
    {"image": "a.png"}  and  {"image": "a.png", "text": "..."} for encoders of pictures, and of both

Paths are relative to the file. What a record is (its *kind*) follows from its keys, and further
keys (a label for a judge, an id) stay in `extra`. Reading checks that every picture and sound is
there; what is in them is checked by whoever opens them (`media.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlib.errors import DataError

TEXT, QUESTION, SPEECH, GENERATION, PICTURE, PAIR = (
    "text",
    "question",
    "speech",
    "generation",
    "picture",
    "pair",
)

KINDS: dict[str, tuple[str, ...]] = {
    QUESTION: ("image", "question", "answer"),
    SPEECH: ("audio", "answer"),
    GENERATION: ("prompt", "target"),
    PAIR: ("image", "text"),
    PICTURE: ("image",),
    TEXT: ("text",),
}
"""Kind -> the keys it needs; the first kind whose keys a record has is its own."""

_MEDIA = ("image", "audio", "target")
_MEANT = {"image": QUESTION, "audio": SPEECH, "target": GENERATION, "prompt": GENERATION}
"""Key -> the kind that a record with it was most likely meant to be."""


@dataclass(frozen=True)
class Record:
    """One line of a file of records.

    kind:  one of KINDS. where: file and line, for error sentences.
    text:  the words of TEXT and PAIR, the question of QUESTION, the prompt of GENERATION; "" of
           SPEECH and PICTURE.
    answer: of QUESTION and SPEECH, else "".
    media: the picture or sound that is read (of GENERATION: the one that is to be made), an
           existing file; None of TEXT.
    extra: the keys that no kind needs, as they stand.
    """

    kind: str
    where: str
    text: str = ""
    answer: str = ""
    media: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """Its picture or sound. Raises DataError when it has none."""
        if self.media is None:
            raise DataError(f"{self.where}: a record of text has no picture and no sound")
        return self.media


def is_records(spec: str | Path) -> bool:
    """Whether `spec` names a file of records with pictures or sounds, and not plain text: a file
    `.jsonl` with a line that has one of their keys."""
    path = Path(spec).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    return any(key in row for _, row in _rows(path) for key in (*_MEDIA, "prompt"))


def read_records(path: str | Path) -> list[Record]:
    """All records of a JSONL file, in order; blank lines are skipped.

    Raises DataError naming the line that is no JSON object, has keys of no kind, an empty or
    missing text, or a path to no file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"there is no file of records {file}: give a .jsonl file")
    records = [_record(file, number, row) for number, row in _rows(file)]
    if not records:
        raise DataError(f"{file} holds no record: write one JSON object a line")
    return records


def of_kind(records: Sequence[Record], *kinds: str) -> list[Record]:
    """Those of these kinds, in order."""
    return [record for record in records if record.kind in kinds]


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, object) of every line that is not blank. Raises DataError at the first that is
    no object."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start:,} is not UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error.msg}); write one object a line"
            ) from error
        if not isinstance(row, Mapping):
            raise DataError(f"{path}, line {number}: not a JSON object; write one object a line")
        yield number, row


def _record(file: Path, number: int, row: Mapping[str, Any]) -> Record:
    where = f"{file}, line {number}"
    kind = next((k for k, keys in KINDS.items() if all(key in row for key in keys)), None)
    asks = "question" in row or "answer" in row
    if kind is None or (kind in (PICTURE, PAIR) and asks):
        raise DataError(f"{where}: {_what_is_missing(row)}")
    used = KINDS[kind] if kind != SPEECH else (*KINDS[kind], "question")
    values = {key: row[key] for key in used if key in row}
    for key, value in values.items():
        if not isinstance(value, str) or not (value.strip() or key == "question"):
            raise DataError(f"{where}: {key!r} must be a text that is not empty")
    media = next((values[key] for key in _MEDIA if key in values), None)
    words = next((values[key] for key in ("text", "question", "prompt") if key in values), "")
    return Record(
        kind,
        where,
        words,
        values.get("answer", ""),
        None if media is None else _media(file, media, where),
        {key: value for key, value in row.items() if key not in values},
    )


def _what_is_missing(row: Mapping[str, Any]) -> str:
    meant = next((kind for key, kind in _MEANT.items() if key in row), None)
    if meant is not None:
        missing = [key for key in KINDS[meant] if key not in row]
        return f"a record of kind {meant} also needs {', '.join(map(repr, missing))}"
    known = "; ".join(", ".join(keys) for keys in KINDS.values())
    return f"the keys {sorted(map(str, row))} are of no kind of record; the kinds are: {known}"


def _media(file: Path, name: str, where: str) -> Path:
    path = file.parent / name
    if not path.is_file():
        raise DataError(f"{where}: there is no file {path}; paths are relative to {file.name}")
    return path
