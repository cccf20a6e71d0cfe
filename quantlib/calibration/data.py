"""Text in, windows of tokens out: the data that calibration and evaluation share.

A *spec* names the data in one word: a plain text file, a `.jsonl` file, a folder of `.txt` files,
or `hub:name[:config][:split]` for a `datasets` name. Whatever it is, it becomes one string (a
`TextSource`, with the sha256 that provenance records), and the string becomes windows of `seqlen`
tokens.

Windows never overlap and are drawn without replacement from the whole text, so they are as close to
independent samples as one text allows: standard errors everywhere in quantlib treat the window as
the unit. A long text is not tokenized from end to end for the sake of a few windows: it is cut into
slots about two windows long, slots are drawn at random, and each gives its first window. The same
text, tokenizer and seed always give the same windows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantlib.errors import DataError

HUB = "hub:"
SPLITS = ("train", "validation", "test", "dev")
MAX_HUB_CHARACTERS = 64_000_000
"""Most text read from a `datasets` name: enough for 30,000 windows of 512 tokens."""

_SEPARATOR = "\n\n"
_PROBE_CHARACTERS = 4096
_MIN_SLOT = 512
"""Characters of the shortest slot: below it, a word boundary may not be found within a slot."""
_SLOT_WINDOWS = 2.0
"""Slot length in expected windows: a slot with half the usual tokens still fills its window."""


@dataclass(frozen=True)
class TextSource:
    """Text that was read, and where from. `sha256` is of the text, so it survives a moved file."""

    spec: str
    text: str = field(repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def windows_sha256(windows: torch.Tensor) -> str:
    """Provenance of tokenized data: sha256 over shape and ids (int64, little end first)."""
    digest = hashlib.sha256(repr(tuple(windows.shape)).encode())
    digest.update(
        windows.detach().cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes()
    )
    return digest.hexdigest()


def load_text(spec: str | Path, tokenizer: Any = None) -> TextSource:
    """Read the text that `spec` names.

    - a file ending in `.jsonl`: one object a line with a string `text`, or chat `messages`, which
      are rendered with the tokenizer's chat template (so `tokenizer` is needed for those);
    - a folder: every `.txt` below it, in the order of their paths;
    - `hub:name[:config][:split]`: rows of a `datasets` name, read the same way as JSONL rows. A
      single extra part is a split if it is one of SPLITS or has a slice (`test[:100]`), and a
      config otherwise;
    - any other file: plain UTF-8 text.

    Documents are joined by blank lines. Raises DataError when nothing readable is there.
    """
    name = str(spec)
    if name.startswith(HUB):
        text = _SEPARATOR.join(_limited(_render_rows(_hub_rows(name), name, tokenizer)))
    else:
        path = Path(spec).expanduser()
        if path.is_dir():
            text = _SEPARATOR.join(_folder_texts(path))
        elif not path.is_file():
            raise DataError(
                f"data {name}: no such file or folder; give a text file, a .jsonl file, a folder "
                f"of .txt files, or {HUB}name for a dataset"
            )
        elif path.suffix == ".jsonl":
            text = _SEPARATOR.join(_render_rows(_json_rows(path), name, tokenizer))
        else:
            text = _read(path)
    if not text.strip():
        raise DataError(
            f"data {name}: there is no text in it; give a file with at least a few pages of text"
        )
    return TextSource(name, text)


def load_windows(
    spec: str | Path | TextSource,
    tokenizer: Any,
    seqlen: int,
    windows: int,
    seed: int,
    bos: bool = True,
) -> torch.Tensor:
    """Token ids int64 `[windows, seqlen]`: non-overlapping, drawn at random, in text order.

    With `bos`, every window starts with the tokenizer's BOS when it has one (the model never sees
    text without it), which takes one of the `seqlen` places. `tokenizer` is any `transformers`
    tokenizer.

    Raises DataError when the text is too short, saying how many tokens there are and how many are
    needed.
    """
    if seqlen < 2 or windows < 1:
        raise DataError(
            f"{windows} windows of {seqlen} tokens were asked for: use at least 1 window of at "
            "least 2 tokens"
        )
    if tokenizer is None:
        raise DataError(
            "no tokenizer: text cannot be turned into tokens; put the source model's "
            "tokenizer.json and tokenizer_config.json into its folder"
        )
    source = spec if isinstance(spec, TextSource) else load_text(spec, tokenizer)
    first = getattr(tokenizer, "bos_token_id", None) if bos else None
    body = seqlen - (first is not None)
    generator = torch.Generator().manual_seed(seed)
    rows = _sparse_windows(source.text, tokenizer, body, windows, generator)
    if rows is None:
        rows = _dense_windows(source, tokenizer, body, windows, generator)
    if first is None:
        return rows
    return torch.cat([torch.full((windows, 1), int(first), dtype=torch.int64), rows], dim=1)


# -- windows -------------------------------------------------------------------------------------


def _dense_windows(
    source: TextSource, tokenizer: Any, body: int, windows: int, generator: torch.Generator
) -> torch.Tensor:
    """Tokenize everything, cut at multiples of `body`, draw `windows` of the pieces."""
    ids = _tokenize(tokenizer, source.text)
    pieces = ids.numel() // body
    if pieces < windows:
        raise DataError(
            f"data {source.spec} is too short: {ids.numel():,} tokens found, {windows * body:,} "
            f"needed for {windows} windows of {body}; give more text, fewer windows, or a shorter "
            "sequence length"
        )
    drawn = torch.randperm(pieces, generator=generator)[:windows].sort().values
    return ids[: pieces * body].view(pieces, body)[drawn].clone()


def _sparse_windows(
    text: str, tokenizer: Any, body: int, windows: int, generator: torch.Generator
) -> torch.Tensor | None:
    """The first window of each of `windows` slots drawn at random; None when slots are too few.

    A slot whose text is short in tokens is passed over for the next one drawn.
    """
    slot = int(max(_MIN_SLOT, _SLOT_WINDOWS * body * _characters_per_token(text, tokenizer)))
    slots = len(text) // slot
    if slots < 2 * windows:
        return None
    found: dict[int, torch.Tensor] = {}
    for index in torch.randperm(slots, generator=generator).tolist():
        start = _word_start(text, index * slot, slot)
        ids = _tokenize(tokenizer, text[start : (index + 1) * slot])
        # The last token may be a word cut at the slot's end; it never belongs to the window.
        if ids.numel() > body:
            found[index] = ids[:body]
        if len(found) == windows:
            return torch.stack([found[key] for key in sorted(found)])
    return None


def _word_start(text: str, position: int, slot: int) -> int:
    """The first word boundary from `position` within an eighth of the slot, else `position`."""
    if position == 0 or text[position - 1].isspace():
        return position
    for candidate in range(position, min(position + slot // 8, len(text))):
        if text[candidate].isspace():
            return candidate
    return position


def _characters_per_token(text: str, tokenizer: Any) -> float:
    """Estimated from eight samples spread evenly over the text; at least a quarter."""
    span = min(_PROBE_CHARACTERS, max(1, len(text) // 8))
    starts = [index * (len(text) - span) // 7 for index in range(8)]
    tokens = sum(_tokenize(tokenizer, text[start : start + span]).numel() for start in starts)
    return max(0.25, 8 * span / max(tokens, 1))


def _tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """Ids int64 `[tokens]`, without the special tokens a tokenizer puts around a text."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


# -- reading -------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"data {path}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    if b"\0" in raw:
        raise DataError(f"data {path}: this is a binary file, not text; give UTF-8 text or .jsonl")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data {path}: byte {error.start:,} is not UTF-8; convert the file, for example with "
            "iconv -t utf-8"
        ) from error


def _folder_texts(folder: Path) -> Iterator[str]:
    files = sorted(path for path in folder.rglob("*.txt") if path.is_file())
    if not files:
        raise DataError(
            f"data {folder}: the folder has no .txt files; give a folder of .txt files or one file"
        )
    yield from map(_read, files)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) for each line that is not blank; `where` goes into error sentences."""
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"data {path}, line {number}: not JSON ({error.msg}); write one object a line"
            ) from error


def _hub_rows(spec: str) -> Iterator[tuple[str, Any]]:
    name, config, split = _parse_hub(spec)
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data {spec}: install `datasets` to read it (pip install datasets), or give a file"
        ) from error
    try:
        # Streaming reads only as much as is used, but it knows no slices and no local cache.
        streaming = "[" not in split and not datasets.config.HF_HUB_OFFLINE
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
        for number, row in enumerate(rows):
            yield f"row {number}", row
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"data {spec}: the dataset {name!r} (split {split!r}) could not be read: {reason[0]}; "
            "check the name and the network, or give a local text file"
        ) from error


def _parse_hub(spec: str) -> tuple[str, str | None, str]:
    """`hub:name[:config][:split]` -> (name, config, split); a slice `[a:b]` keeps its colon."""
    head, bracket, slice_ = spec[len(HUB) :].partition("[")
    parts = head.split(":")
    if not parts[0] or len(parts) > 3 or not all(parts):
        raise DataError(f"data {spec}: write {HUB}name, {HUB}name:split or {HUB}name:config:split")
    parts[-1] += bracket + slice_
    if len(parts) == 3:
        return parts[0], parts[1], parts[2]
    if len(parts) == 2 and (bracket or parts[1] in SPLITS):
        return parts[0], None, parts[1]
    return parts[0], parts[1] if len(parts) == 2 else None, "train"


def _render_rows(rows: Iterable[tuple[str, Any]], spec: str, tokenizer: Any) -> Iterator[str]:
    """The text of each row: its `text`, or its chat `messages` through the tokenizer's template."""
    for where, row in rows:
        if isinstance(row, Mapping) and isinstance(row.get("text"), str):
            yield row["text"]
        elif isinstance(row, Mapping) and isinstance(row.get("messages"), list):
            yield _render_chat(row["messages"], f"{spec}, {where}", tokenizer)
        else:
            raise DataError(
                f'data {spec}, {where}: there is no string "text" and no list "messages"; write '
                '{"text": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
            )


def _render_chat(messages: list[Any], where: str, tokenizer: Any) -> str:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"data {where}: chat messages need a tokenizer with a chat template; add one to the "
            'model folder, or give rows with a plain "text"'
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program: jinja2, key and type errors come out
        raise DataError(
            f"data {where}: the tokenizer's chat template refused the messages: {error}"
        ) from error


def _limited(texts: Iterable[str]) -> Iterator[str]:
    """Texts until MAX_HUB_CHARACTERS have passed."""
    total = 0
    for text in texts:
        yield text
        total += len(text)
        if total >= MAX_HUB_CHARACTERS:
            return
