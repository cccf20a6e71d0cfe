"""Names in a sentence or a table: the first few, or all with what they share said once."""

from collections.abc import Sequence


def some(names: Sequence[str], limit: int = 3) -> str:
    """`some(["a", "b", "c", "d"])` is "a, b, c and 1 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def together(names: Sequence[str]) -> str:
    """All of some dotted names, their common beginning and end once:
    `layers.*.{attn_norm, mlp_norm}.weight`."""
    paths = [name.split(".") for name in names]
    if len(paths) < 2:
        return "".join(names)
    shortest = min(map(len, paths)) - 1  # something is left of every name
    first = 0
    while first < shortest and len({path[first] for path in paths}) == 1:
        first += 1
    last = 0
    while last < shortest - first and len({path[-1 - last] for path in paths}) == 1:
        last += 1
    inside = [".".join(path[first : len(path) - last]) for path in paths]
    before, after = paths[0][:first], paths[0][len(paths[0]) - last :]
    return ".".join([*before, "{" + ", ".join(inside) + "}", *after])
