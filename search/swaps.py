"""The best exchange: one item changes its choice, another pays for it in bytes.

With one byte constraint the pair of changes that lowers the loss most can be found without looking
at all pairs: sort the changes that free bytes by how much they free; the cheapest partner for a
change that needs `b` bytes is then a running minimum over those that free at least `b`. That
is a sort and one pass over ten thousand changes, instead of 1e8 pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NONE = -1
"""No change."""


class Swap(NamedTuple):
    """Positions of the change and of the one that pays for it (or NONE), and their total loss."""

    first: int
    second: int
    loss: float


def best_swap(item: np.ndarray, loss: np.ndarray, size: np.ndarray, slack: float) -> Swap | None:
    """The change, or the pair of changes of two items, of least loss within `slack` bytes.

    item, loss, size [changes]: whose choice a change replaces, and what it adds (or frees,
    negative) in loss and in bytes. None when no change or pair lowers the loss.
    """
    payers = np.flatnonzero(size < 0)
    payers = payers[np.argsort(size[payers], kind="stable")]
    first_of, second_of = _running_least_two(item[payers], loss[payers])
    # how many payers (sorted, largest first) free enough for each change
    enough = np.searchsorted(size[payers], slack - size, side="right")
    best, second_best = np.full(len(item), NONE), np.full(len(item), NONE)
    some = enough > 0
    best[some], second_best[some] = first_of[enough[some] - 1], second_of[enough[some] - 1]
    # a change cannot be paid for by its own item: then the best of the other items
    own = (
        (best >= 0) & (item[payers[best]] == item)
        if len(payers)
        else np.zeros(len(item), dtype=bool)
    )
    partner = np.where(own, second_best, best)
    price = np.where(partner >= 0, loss[payers[partner]] if len(payers) else 0.0, np.inf)
    alone = size <= slack
    use_none = alone & (price >= 0)
    total = loss + np.where(use_none, 0.0, price)
    if not len(total) or not total.min() < 0:
        return None
    index = int(total.argmin())
    second = NONE if use_none[index] else int(payers[partner[index]])
    return Swap(index, second, float(total[index]))


def _running_least_two(item: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every prefix: position of the least loss, and of the least of another item (or NONE)."""
    first, second = np.full(len(item), NONE), np.full(len(item), NONE)
    best = other = NONE
    for position in range(len(item)):
        if best == NONE or loss[position] < loss[best]:
            if best != NONE and item[best] != item[position]:
                other = best
            best = position
        elif item[position] != item[best] and (other == NONE or loss[position] < loss[other]):
            other = position
        first[position], second[position] = best, other
    return first, second
