import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.search.swaps import NONE, best_swap

changes = st.lists(
    st.tuples(st.integers(0, 3), st.integers(-20, 20), st.integers(-9, 9)), min_size=0, max_size=12
)


def by_brute_force(rows: list[tuple[int, int, int]], slack: int) -> float:
    """Least loss of one change, or of two of different items, that needs at most `slack` bytes."""
    best = 0.0
    for item, loss, size in rows:
        if size <= slack:
            best = min(best, loss)
        for other, more, size_of_other in rows:
            if other != item and size + size_of_other <= slack and size_of_other < 0:
                best = min(best, loss + more)
    return best


@settings(max_examples=400)
@given(rows=changes, slack=st.integers(-6, 12))
def test_the_best_exchange_is_what_trying_all_pairs_finds(
    rows: list[tuple[int, int, int]], slack: int
) -> None:
    item, loss, size = (np.array([row[i] for row in rows], dtype=float) for i in range(3))
    swap = best_swap(item.astype(int), loss, size, slack)
    expected = by_brute_force(rows, slack)
    assert (swap.loss if swap else 0.0) == expected
    if swap is None:
        return
    first = rows[swap.first]
    second = rows[swap.second] if swap.second != NONE else (NONE, 0, 0)
    assert first[0] != second[0]
    assert first[1] + second[1] == swap.loss
    assert first[2] + second[2] <= slack
