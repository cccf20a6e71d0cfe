"""Word errors: how many words must be changed, left out or put in to turn one text into another."""

from __future__ import annotations

import re

_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five"),
    *("six", "seven", "eight", "nine", "ten"),
)
_SPOKEN = {"mr": "mister", "mrs": "missus", "dr": "doctor"}
_SPOKEN |= {str(number): word for number, word in enumerate(_NUMBERS)}


def normalised(text: str) -> list[str]:
    """Words in lower case, without marks; small numbers and titles as they are spoken."""
    words = re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())
    return [_SPOKEN.get(word, word) for word in words]


def word_errors(reference: str, said: str) -> tuple[int, int]:
    """(edit distance in words, words of the reference), both normalised."""
    expected, found = normalised(reference), normalised(said)
    row = list(range(len(found) + 1))
    for i, word in enumerate(expected, 1):
        previous, row = row, [i]
        for j, other in enumerate(found, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (word != other)))
    return row[-1], len(expected)
