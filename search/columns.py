"""Bits by column: what every width costs in every column of a weight, and the exact knapsack over
those costs.

GPTQ rounds a weight column by column, and books an error of its own for each: with H = (U^T U)^-1
the damped second moment of the inputs, an error matrix E = W - Q of a sweep along U is E = C U, and

    tr(E H E^T) = sum_j |C_j|^2,        C = E U^-1

so that |C_j|^2, weighted by what every row costs, is the part of the loss that was lost at column j
after all earlier columns had been compensated (`column_prices`). Rounding a weight once in every
width gives a table of prices [K, B]; what gets which width is then a multiple-choice knapsack over
columns. Inside a weight, every price of a bit gives the widths that lose least for the bits they
take: all points of the lower convex hull are reached so, but for counts of columns that have to be
whole steps (`assignments`). Among those points the solver of layers chooses, over the whole model,
by true bytes and to a certificate. So a column of one weight competes with every column of all
others.

What the table cannot know is that columns are compensated by others when their order or the widths
of their neighbours change: columns of one width have to lie together, the narrow ones first
(`formats.scheme`), and GPTQ then walks in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from quantlib.errors import SearchError
from quantlib.formats.scheme import HighColumns, Scheme
from quantlib.formats.weight_format import WeightFormat
from quantlib.search.problem import Choice, Item, Picks, Problem
from quantlib.search.relaxation import undominated

STEP = 32
"""Columns of one width are counted in these: whole words of packed codes, and tiles of kernels."""
FORMATS = ("w2g64z4s4", "w3g64zs4", "w4g64zs4", "w6g64zs4")
"""The widths that columns of one weight choose among by default: one style, so that a scheme can
name all of them."""
_LEVELS = 24
"""Prices of a byte that `assignments` tries for each set of widths."""


@dataclass(frozen=True, eq=False)
class Assignment:
    """Widths of the columns of one weight.

    scheme: what they are stored in: segments of ascending widths.
    picks:  int64 [K], the index of every column's format, in the order of the inputs.
    loss:   sum of the prices of the picks.
    """

    scheme: str
    picks: Tensor
    loss: float

    @property
    def order(self) -> Tensor | None:
        """int64 [K]: which column is stored at each place, narrow ones first, else as they come;
        None where they may stay where they are."""
        order = torch.argsort(self.picks, stable=True)
        return None if torch.equal(order, torch.arange(len(order))) else order


def column_prices(error: Tensor, factor: Tensor, rows: Tensor) -> Tensor:
    """What a GPTQ sweep lost at every column: float64 [K].

    error:  W - Q [N, K], without later passes that move errors between columns.
    factor: U [K, K], `rounding.hessian.inverse_factor` of the Hessian the sweep ran under.
    rows:   [N], what a squared error of an output costs, in units of the scaled Hessian.
    """
    own = torch.linalg.solve_triangular(factor.double(), error.double(), upper=True, left=False)
    return rows.double() @ own.square_()


def remeasured(prices: Tensor, picks: Tensor, found: Tensor, trust: float = 4.0) -> Tensor:
    """Prices [K, B] after a weight was rounded with `picks` [K] and column j really lost found[j].

    Every width of a column is corrected by the factor by which its pick was wrong, but not by more
    than `trust`: a column that happened to lose nothing is not free.
    """
    expected = prices.gather(1, picks[:, None]).clamp(min=1e-300)
    return prices * (found[:, None] / expected).clamp(1 / trust, trust)


def mixed_scheme(counts: Sequence[int], formats: Sequence[WeightFormat]) -> Scheme:
    """The scheme of a weight of sum(counts) columns, of which counts[b] are in formats[b].

    Raises SearchError where no scheme has these formats (they differ in more than their width).
    """
    columns = sum(counts)
    used = [(count, form) for count, form in zip(counts, formats, strict=True) if count]
    wide = tuple(HighColumns(str(form.bits), Fraction(n, columns)) for n, form in used[1:])
    scheme = Scheme(used[0][1], None, high=wide[0] if wide else None, higher=wide[1:])
    found = [(part.length, part.format) for part in scheme.segments(columns)]
    if found != used:
        names = ", ".join(str(form) for _, form in used)
        raise SearchError(
            f"{columns} columns cannot be stored in {names} together: use formats of one style "
            f"that differ in their bits, such as {', '.join(FORMATS)}, and counts in steps of 4"
        )
    return scheme


def assignments(
    prices: Tensor, formats: Sequence[WeightFormat], step: int = STEP
) -> list[Assignment]:
    """The best widths of one weight at many prices of a byte, the same width for all included.

    prices:  [K, B], ascending widths. A price that rises with the width counts as the lowest of the
             narrower ones.
    formats: B of one style.
    step:    columns are counted in multiples of it; K that is none has its rest in the narrowest.
    Every set of widths is tried by itself, because a segment has a cost of its own. Of assignments
    that are stored alike the one that loses least is returned.
    """
    widths = prices.shape[1]
    prices = prices.double().cummin(1).values
    best: dict[str, Assignment] = {}
    for size in range(1, widths + 1):
        for chosen in combinations(range(widths), size):
            bits = [formats[index].bits for index in chosen]
            for local in _nested(prices[:, list(chosen)], bits, step):
                picks = torch.tensor(chosen)[local]
                counts = torch.bincount(picks, minlength=widths).tolist()
                scheme = str(mixed_scheme(counts, formats))
                loss = float(prices.gather(1, picks[:, None]).sum())
                if scheme not in best or loss < best[scheme].loss:
                    best[scheme] = Assignment(scheme, picks, loss)
    return list(best.values())


def _nested(prices: Tensor, bits: Sequence[int], step: int) -> list[Tensor]:
    """Picks [K] among the columns of `prices` [K, B], all of which are used by some column.

    A column climbs to its next width where that saves more for each bit than a bit is worth. How
    many do is rounded to whole steps; which ones do is decided by their savings, from the widest
    down, so that who is among the wider is among the narrower too.
    """
    columns, widths = prices.shape
    if widths == 1:
        return [torch.zeros(columns, dtype=torch.int64)]
    savings = (prices[:, :-1] - prices[:, 1:]) / torch.tensor(bits, dtype=torch.float64).diff()
    savings = savings.cummin(1).values  # on the hull: a later bit never saves more
    found: dict[tuple[int, ...], Tensor] = {}
    for level in torch.quantile(savings.flatten(), torch.linspace(0, 1, _LEVELS).double()):
        climbing = [step * round(int(count) / step) for count in (savings > level).sum(0)]
        counts = tuple(min(count, columns // step * step) for count in climbing)
        if counts not in found and _uses_all((columns, *counts, 0)):
            found[counts] = _climb(savings, counts)
    return list(found.values())


def _uses_all(counts: tuple[int, ...]) -> bool:
    """Whether every width is some column's, given how many have at least each width."""
    return all(wider < count for count, wider in pairwise(counts))


def _climb(savings: Tensor, counts: Sequence[int]) -> Tensor:
    """Picks [K] in which counts[b] columns are wider than b: those that save most by it."""
    picks = torch.zeros(len(savings), dtype=torch.int64)
    for width in reversed(range(len(counts))):
        wanted = savings[:, width].masked_fill(picks > 0, torch.inf)
        chosen = wanted.topk(counts[width]).indices
        picks[chosen] = picks[chosen].clamp(min=width + 1)
    return picks


class Assigned(Protocol):
    """What candidates are: a scheme's name, and the loss of a weight in it."""

    @property
    def scheme(self) -> str: ...

    @property
    def loss(self) -> float: ...


A = TypeVar("A", bound=Assigned)


@dataclass(frozen=True)
class Candidates(Generic[A]):
    """One weight: its assignments, and the bytes that each takes in a checkpoint."""

    assignments: Sequence[A]
    bytes: Sequence[int]

    @staticmethod
    def of(found: Sequence[A], size: Callable[[A], int]) -> Candidates[A]:
        """Those of `found` that no other one matches in both bytes and loss."""
        sizes = [size(one) for one in found]
        choices = [Choice(a.scheme, n, a.loss) for a, n in zip(found, sizes, strict=True)]
        kept = undominated(choices)
        return Candidates([found[i] for i in kept], [sizes[i] for i in kept])


def column_problem(candidates: Mapping[str, Candidates[Any]], fixed_bytes: int = 0) -> Problem:
    """The allocation problem over weight -> its candidates."""
    items = []
    for name, found in candidates.items():
        pairs = zip(found.assignments, found.bytes, strict=True)
        choices = tuple(Choice(one.scheme, size, one.loss) for one, size in pairs)
        items.append(Item(name, (name,), choices))
    return Problem(tuple(items), fixed_bytes)


def chosen(candidates: Mapping[str, Candidates[A]], picks: Picks) -> dict[str, A]:
    """Weight -> the assignment that a solution of `column_problem` picked."""
    pairs = zip(candidates.items(), picks, strict=True)
    return {name: found.assignments[pick] for (name, found), pick in pairs}
