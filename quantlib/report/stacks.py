"""Sorting weights into the rows and columns of a grid: repeated blocks down, weights of a block
across.

Names alone decide, so this works for any model: blocks that differ only in their numbers
("model.layers.3", "decoder.up.0.block.1") form one stack, and a weight's path inside its block,
without the numbers of experts, is its column.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from quantlib.report.data import WeightRow

_NUMBER = re.compile(r"(?<=[._])\d+(?=\.|$)")


@dataclass
class Stack:
    """Blocks with a common prefix, and the weights that stand before and after them in the model.

    prefix: their name; * stands for a number before the last one.
    cells: (index into blocks, index into columns) -> weights there, several for the experts of a
        layer.
    """

    prefix: str
    blocks: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    cells: dict[tuple[int, int], list[WeightRow]] = field(default_factory=dict)
    before: list[WeightRow] = field(default_factory=list)
    after: list[WeightRow] = field(default_factory=list)

    @property
    def weights(self) -> list[WeightRow]:
        """All weights of the grid."""
        inside = [row for cell in self.cells.values() for row in cell]
        return [*self.before, *inside, *self.after]

    @property
    def numbers(self) -> list[str]:
        """What tells the blocks apart: "3", or "0.1" where there is more than one number."""
        return [".".join(_NUMBER.findall(block)) for block in self.blocks]

    @property
    def labels(self) -> list[str]:
        """The shortest ends of the columns' paths that tell them apart, without `_proj`."""
        for parts in range(1, 6):
            ends = [".".join(path.split(".")[-parts:]) for path in self.columns]
            labels = [end.removesuffix("_proj") for end in ends]
            if len(set(labels)) == len(labels):
                return labels
        return self.columns

    def add(self, weight: WeightRow, block: str) -> None:
        """Put a weight into the cell of its block and path."""
        path = weight.name.removeprefix(f"{block}.").removesuffix(".weight")
        path = re.sub(r"\.\d+(?=\.|$)", "", path)
        if block not in self.blocks:
            self.blocks.append(block)
        if path not in self.columns:
            self.columns.append(path)
        place = self.blocks.index(block), self.columns.index(path)
        self.cells.setdefault(place, []).append(weight)


def stacks(weights: Sequence[WeightRow]) -> list[Stack]:
    """Weights in model order -> stacks in model order.

    A weight outside blocks goes above the next stack, or below the last one. No blocks, no stacks.
    """
    found: dict[str, Stack] = {}
    waiting: list[WeightRow] = []
    for weight in weights:
        if weight.block is None:
            waiting.append(weight)
            continue
        prefix = _NUMBER.sub("*", weight.block).removesuffix(".*")
        if prefix not in found:
            found[prefix] = Stack(prefix, before=waiting)
            waiting = []
        found[prefix].add(weight, weight.block)
    if found:
        list(found.values())[-1].after.extend(waiting)
    return list(found.values())
