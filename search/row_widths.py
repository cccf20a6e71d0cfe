"""Bits by row: what every row of a weight costs in every format, and which rows deserve more.

GPTQ and the descent behind it round the rows of a weight independently of each other: what a row
loses in a format is f_n e_n H e_n^T, whatever the others have. So a table of prices [N, S] by row
is exact, where that of columns (`columns.py`) is only true while their neighbours keep their
widths. Rows differ more, too: some outputs matter a thousand times more than others. And which
block a row is in takes two bits of a checkpoint (`formats.composite`), where the order of columns
takes 32 bits for each.

At every price of a byte each row takes the format that is cheapest for it; these points are the
lower convex hull of what blocks of rows can do for the weight. The solver of layers chooses among
them over the whole model, by true bytes (`columns.column_problem`), so that a row of one weight
competes with every row of all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from quantlib.errors import SearchError
from quantlib.formats.scheme import Scheme
from quantlib.formats.several import MOST_BLOCKS, RowBlock
from quantlib.formats.weight_format import WeightFormat

STEP = 16
"""Rows of a block are counted in these: what the CPU kernels compute at once. A strip of theirs is
32, but one of at most 16 rows is half a strip, in memory and in time (`tile_blocks` of `tiles.h`),
so multiples of 16 pad nothing."""
_LEVELS = 64
"""Prices of a byte that are tried."""


@dataclass(frozen=True, eq=False)
class RowAssignment:
    """Formats of the rows of one weight.

    scheme: blocks of rows, the widest first, or the one format of all.
    block:  uint8 [N], the block of every row; all 0 where they are alike.
    loss:   sum of the prices of the picks.
    """

    scheme: str
    block: Tensor
    loss: float

    @property
    def formats(self) -> tuple[str, ...]:
        """The format of every block."""
        parsed = Scheme.parse(self.scheme)
        return tuple(str(one.format) for one in parsed.rows) or (self.scheme,)


def row_assignments(
    prices: Tensor, formats: Sequence[WeightFormat], rates: Sequence[float], step: int = STEP
) -> list[RowAssignment]:
    """The best formats of the rows of one weight at many prices of a byte, the same for all
    included.

    prices:  float64 [N, S], what every row loses in every format.
    formats: S different ones. rates: bytes of a row in each.
    step:    blocks have multiples of so many rows, but for the narrowest.
    Within a weight, rows are ranked by what they lose in the narrowest format that is used, and the
    dearest get the widest: prices are close to a product of what a row matters and what a format
    loses. So a scheme and prices say which rows are in which block (`rounding.rows.assign_rows`).
    Raises SearchError for prices that are no numbers >= 0.
    """
    rows, count = prices.shape
    if count != len(formats) or count != len(rates) or not bool((prices >= 0).all()):
        raise SearchError(
            f"prices {list(prices.shape)} of rows in {count} formats: give one number >= 0 for "
            "every row and format, and the bytes of a row in every format"
        )
    ascending = sorted(range(count), key=lambda index: rates[index])
    ordered = prices.double()[:, ascending]
    sizes = torch.tensor([rates[index] for index in ascending], dtype=torch.float64)
    alike = [torch.full((rows,), index) for index in range(count)]
    mixed = [_snapped(picks, ordered, step) for picks in _cheapest(ordered, sizes)]
    found: dict[str, RowAssignment] = {}
    for picks in (*alike, *mixed):
        one = _assignment(picks, ordered, [formats[index] for index in ascending])
        if one.scheme not in found or one.loss < found[one.scheme].loss:
            found[one.scheme] = one
    return list(found.values())


def _cheapest(prices: Tensor, sizes: Tensor) -> list[Tensor]:
    """Picks [N] at every price of a byte, of MOST_BLOCKS formats at most."""
    savings = (prices[:, :1] - prices[:, 1:]) / (sizes[1:] - sizes[0]).clamp(min=1e-9)
    positive = savings[savings > 0]
    if not len(positive):
        return []
    found = []
    for level in torch.quantile(positive.log(), torch.linspace(0, 1, _LEVELS).double()).exp():
        costs = prices + level * sizes
        picks = costs.argmin(1)
        while len(used := torch.bincount(picks, minlength=len(sizes)).nonzero()) > MOST_BLOCKS:
            fewest = min(used.flatten().tolist(), key=lambda index: int((picks == index).sum()))
            costs[:, fewest] = torch.inf
            picks = costs.argmin(1)
        found.append(picks)
    return found


def _snapped(picks: Tensor, prices: Tensor, step: int) -> Tensor:
    """As many rows in every format as `picks` has, but for whole steps: the dearest the widest."""
    rows, count = prices.shape
    wanted = torch.bincount(picks, minlength=count).flip(0).cumsum(0)[:-1].tolist()
    ends = [end if end == rows else min(rows, step * round(end / step)) for end in wanted]
    by_rank = torch.zeros_like(picks)
    for index, end in enumerate(reversed(ends)):  # from the narrowest up, each within the last
        by_rank[:end] = index + 1
    ranked = torch.argsort(prices[:, by_rank[-1]], descending=True, stable=True)
    return torch.empty_like(picks).index_copy_(0, ranked, by_rank)


def _assignment(picks: Tensor, prices: Tensor, formats: Sequence[WeightFormat]) -> RowAssignment:
    """The assignment of picks [N] among ascending `formats`."""
    used = torch.unique(picks).flip(0).tolist()
    loss = float(prices.gather(1, picks[:, None]).sum())
    if len(used) == 1:
        block = torch.zeros(len(picks), dtype=torch.uint8)
        return RowAssignment(str(formats[used[0]]), block, loss)
    counts = torch.bincount(picks, minlength=len(formats)).tolist()
    shares = [Fraction(counts[index], len(picks)) for index in used[:-1]]
    blocks = [RowBlock(formats[index], share) for index, share in zip(used, [*shares, None])]
    place = torch.zeros(len(formats), dtype=torch.uint8)
    place[used] = torch.arange(len(used), dtype=torch.uint8)
    return RowAssignment(str(Scheme(blocks[0].format, rows=tuple(blocks))), place[picks], loss)
