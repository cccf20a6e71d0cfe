"""Where output goes: answers to stdout, everything else to stderr.

So `quantlib search --json ... | jq` reads the answer alone while a person still sees progress. On a
terminal tables fit its width; in a pipe or a file nothing is wrapped or cut, because a program or a
diff reads it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDE = 400
"""Columns when nobody looks: wider than any table of ours."""


def answers() -> Console:
    """The console of results, on stdout."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def notes() -> Console:
    """The console of progress, notes and errors, on stderr."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else _WIDE, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout. JSON has no infinity and no nan: they become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def table(
    *columns: str, rows: Iterable[Sequence[str]], numbers_from: int = 1, numbers_to: int = 100
) -> Table:
    """A plain table; columns from the `numbers_from`th to before the `numbers_to`th are aligned to
    the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        right = numbers_from <= index < numbers_to
        made.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """A list of names and what they are."""
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made
