"""Where the scale groups of a row lie, and how to work on them without copying.

A row of `length` weights has groups of `group_size`, the last one maybe shorter. Instead of padding
(which invents weights that min/max would see) or an index per column (which costs 8 bytes a
weight), a row is at most two blocks of equal groups: the whole ones, and the rest. Each block is a
strided view [N, groups, size] of the matrix itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GroupBlock:
    """Consecutive groups of one size: their columns, and their place along the group axis of a
    scale."""

    columns: slice
    groups: slice
    size: int

    def view(self, matrix: Tensor) -> Tensor:
        """The block of a matrix [N, length] as a view [N, groups, size]."""
        return matrix[:, self.columns].unflatten(1, (-1, self.size))


def group_blocks(length: int, group_size: int) -> Iterator[GroupBlock]:
    """The one or two blocks of a row; a group_size of CHANNEL or TENSOR is one group of
    `length`."""
    size = group_size if group_size > 0 else length
    whole, rest = divmod(length, size)
    if whole:
        yield GroupBlock(slice(0, whole * size), slice(0, whole), size)
    if rest:
        yield GroupBlock(slice(whole * size, length), slice(whole, whole + 1), rest)
