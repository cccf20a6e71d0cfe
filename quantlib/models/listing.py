"""Names in a sentence: the first few, and how many more."""

from collections.abc import Sequence


def some(names: Sequence[str], limit: int = 3) -> str:
    """`some(["a", "b", "c", "d"])` is "a, b, c and 1 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
