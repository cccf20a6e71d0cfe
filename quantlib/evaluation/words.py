"""Answers as people compare them: case, punctuation and articles do not count.

`word_errors` is what speech recognition is measured by: the least number of words to replace, add
or take away that makes one text the other. Nobody hears whether "7" or "seven" is written, so both
texts are compared as they are spoken.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_ARTICLES = frozenset({"a", "an", "the"})
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_TITLES = {"mr": "mister", "mrs": "missus", "dr": "doctor"}
_BELOW_HUNDRED = re.compile(r"[0-9]|[1-9][0-9]", re.ASCII)


def plain_words(text: str) -> list[str]:
    """Words in lower case, without accents' variants (NFKC) and without punctuation; apostrophes
    inside a word stay."""
    return re.findall(r"\w+(?:['’]\w+)*", unicodedata.normalize("NFKC", text).lower())


def same_answer(given: str, expected: str) -> bool:
    """Whether two answers are the same words, articles aside. An empty answer equals nothing."""
    found, wanted = _without_articles(given), _without_articles(expected)
    return bool(wanted) and found == wanted


def spoken_words(text: str) -> list[str]:
    """The plain words of a text with titles and numbers below a hundred as English says them."""
    return [spoken for word in plain_words(text) for spoken in _spoken(word)]


def word_errors(given: str, expected: str) -> tuple[int, int]:
    """(errors, words expected): the edit distance between the spoken words of two texts.

    The word error rate of several texts is the sum of the first over the sum of the second.
    """
    wanted = spoken_words(expected)
    return edit_distance(spoken_words(given), wanted), len(wanted)


def edit_distance(given: Sequence[str], expected: Sequence[str]) -> int:
    """Least number of replacements, insertions and deletions that turn one into the other."""
    row = list(range(len(expected) + 1))
    for count, word in enumerate(given, start=1):
        diagonal, row[0] = row[0], count
        for place, wanted in enumerate(expected, start=1):
            replaced = diagonal + (word != wanted)
            diagonal, row[place] = row[place], min(replaced, row[place] + 1, row[place - 1] + 1)
    return row[-1]


def _spoken(word: str) -> list[str]:
    if not _BELOW_HUNDRED.fullmatch(word):
        return [_TITLES.get(word, word)]
    tens, ones = divmod(int(word), 10)
    if tens < 2:
        return [_SMALL[int(word)]]
    return [_TENS[tens - 2], *([_SMALL[ones]] if ones else [])]


def _without_articles(text: str) -> list[str]:
    words = plain_words(text)
    return [word for word in words if word not in _ARTICLES] or words
