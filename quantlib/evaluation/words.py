"""Answers as people compare them: case, punctuation and articles do not count.

`word_errors` is what speech recognition is measured by: the least number of words to replace, add
or take away that makes one text the other.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_ARTICLES = frozenset({"a", "an", "the"})


def plain_words(text: str) -> list[str]:
    """Words in lower case, without accents' variants (NFKC) and without punctuation; apostrophes
    inside a word stay."""
    return re.findall(r"\w+(?:['’]\w+)*", unicodedata.normalize("NFKC", text).lower())


def same_answer(given: str, expected: str) -> bool:
    """Whether two answers are the same words, articles aside. An empty answer equals nothing."""
    found, wanted = _without_articles(given), _without_articles(expected)
    return bool(wanted) and found == wanted


def word_errors(given: str, expected: str) -> tuple[int, int]:
    """(errors, words expected): the edit distance between the words of two texts.

    The word error rate of several texts is the sum of the first over the sum of the second.
    """
    wanted = plain_words(expected)
    return edit_distance(plain_words(given), wanted), len(wanted)


def edit_distance(given: Sequence[str], expected: Sequence[str]) -> int:
    """Least number of replacements, insertions and deletions that turn one into the other."""
    row = list(range(len(expected) + 1))
    for count, word in enumerate(given, start=1):
        diagonal, row[0] = row[0], count
        for place, wanted in enumerate(expected, start=1):
            replaced = diagonal + (word != wanted)
            diagonal, row[place] = row[place], min(replaced, row[place] + 1, row[place - 1] + 1)
    return row[-1]


def _without_articles(text: str) -> list[str]:
    words = plain_words(text)
    return [word for word in words if word not in _ARTICLES] or words
