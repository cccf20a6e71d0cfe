"""What a row of quantlib's own may spend, in both currencies.

Papers quote bits of codes alone: ResQ's 4.36 is that. What is stored and multiplied has scales and
zero points, too, and these cost more where groups are small. So limits have both kinds, and the
solver keeps all that are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from quantlib.formats.scheme import Scheme
from quantlib.kernels.kv_format import SideFormat
from quantlib.pipeline.caches import Losses
from quantlib.search.activations import ACTIVATION_BITS
from quantlib.search.problem import Choice, Problem

WEIGHT_CODES, ACTIVATION_CODES = "weight codes", "activation codes"
"""Names of costs: mean bits over the linears' weights."""

Shapes = Mapping[str, tuple[int, int]]
"""Weight -> (rows, columns), of the linears whose bits are counted."""


@dataclass(frozen=True)
class Limits:
    """Mean bits.

    weights, activations, kv: with scales and zero points. codes: of codes alone, in each of the
    three; None: any.
    """

    weights: float
    activations: float
    kv: float
    codes: float | None = None

    @property
    def costs(self) -> dict[str, float]:
        """Limits of the solver beside bytes; ACTIVATION_BITS is the mean that candidates cost."""
        found = {ACTIVATION_BITS: self.activations}
        if self.codes is not None:
            found |= {WEIGHT_CODES: self.codes, ACTIVATION_CODES: self.codes}
        return found

    def sides(self, losses: Losses, head_dim: int) -> Losses:
        """The cache formats that are left to choose from."""
        if self.codes is None:
            return losses
        most = self.codes * head_dim
        return {
            module: {
                side: {n: loss for n, loss in own.items() if side_codes(n, head_dim) <= most}
                for side, own in sides.items()
            }
            for module, sides in losses.items()
        }


def side_codes(name: str, head_dim: int) -> int:
    """Bits of the codes of one head's keys, or values, at one position."""
    return sum(group.columns * group.bits for group in SideFormat.parse(name).groups(head_dim))


def code_bits(scheme: str, rows: int, columns: int) -> tuple[int, int]:
    """Bits of the codes of a weight, and of its input as often as it is multiplied."""
    parsed = Scheme.parse(scheme)
    stored = sum(part.length * part.format.bits for part in parsed.segments(columns))
    read = sum(part.length * part.format.bits for part in parsed.activations(columns))
    return rows * stored, rows * read


def with_codes(problem: Problem, shapes: Shapes) -> Problem:
    """The problem with WEIGHT_CODES and ACTIVATION_CODES among its costs."""
    total = sum(rows * columns for rows, columns in shapes.values())

    def priced(choice: Choice, members: tuple[str, ...]) -> Choice:
        found = [code_bits(choice.scheme, *shapes[name]) for name in members if name in shapes]
        codes = {
            WEIGHT_CODES: sum(stored for stored, _ in found) / total,
            ACTIVATION_CODES: sum(read for _, read in found) / total,
        }
        return replace(choice, costs={**choice.costs, **codes})

    items = [
        replace(item, choices=tuple(priced(choice, item.members) for choice in item.choices))
        for item in problem.items
    ]
    return replace(problem, items=tuple(items))
