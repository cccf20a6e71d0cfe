"""Bits by row: assignments are stored as their schemes say, and none is a worse deal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlib.errors import SearchError
from quantlib.formats.composite import stored_bytes
from quantlib.formats.scheme import Scheme
from quantlib.formats.several import MOST_BLOCKS, row_counts
from quantlib.formats.size import payload_bytes
from quantlib.rounding.rows import assign_rows
from quantlib.search.columns import Candidates, chosen, column_problem
from quantlib.search.row_widths import STEP, RowAssignment, row_assignments
from quantlib.search.solve import solve

NAMES = ("w2g128z4s4", "w2g64z4s4", "w3g64z4s4", "w4g64z5s5", "w5g64zs5", "w6g64zs6")
FORMATS = [Scheme.parse(name).segments(1)[0].format for name in NAMES]
COLUMNS = 128


def rates(rows: int) -> list[float]:
    layouts = [Scheme.parse(name).segments(COLUMNS) for name in NAMES]
    return [payload_bytes((rows, COLUMNS), layout) / rows for layout in layouts]


def falling_prices(rows: int, seed: int, decades: float = 3.0) -> Tensor:
    """Prices that fall fourfold with every bit; rows differ by some decades."""
    generator = torch.Generator().manual_seed(seed)
    importance = 10 ** (decades * torch.rand(rows, 1, generator=generator).double())
    bits = torch.tensor(rates(rows)).double() * 8 / COLUMNS
    noise = 1 + 0.1 * torch.rand(rows, len(NAMES), generator=generator).double()
    return importance * 4.0**-bits * noise


def found(rows: int, seed: int) -> tuple[Tensor, list[RowAssignment]]:
    prices = falling_prices(rows, seed)
    return prices, row_assignments(prices, FORMATS, rates(rows))


@settings(max_examples=15, deadline=None)
@given(rows=st.sampled_from([16, 96, 200, 576]), seed=st.integers(0, 10**6))
def test_an_assignment_is_what_its_scheme_says(rows: int, seed: int) -> None:
    prices, assignments = found(rows, seed)
    for one in assignments:
        scheme = Scheme.parse(one.scheme)
        counts = torch.bincount(one.block.long()).tolist()
        picks = torch.tensor([NAMES.index(name) for name in one.formats])[one.block.long()]
        assert counts == (row_counts(scheme.rows, rows) if scheme.rows else [rows])
        assert len(counts) <= MOST_BLOCKS
        assert all(count % STEP == 0 for count in counts[:-1])
        assert one.loss == pytest.approx(float(prices.gather(1, picks[:, None]).sum()))
        assert stored_bytes((rows, COLUMNS), scheme) > 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_dearest_rows_are_in_the_widest_block(seed: int) -> None:
    prices, assignments = found(96, seed)
    for one in assignments:
        if Scheme.parse(one.scheme).rows:
            # the rounding of blocks puts rows where their prices in the narrowest block's format do
            narrowest = prices[:, NAMES.index(one.formats[-1])]
            assert torch.equal(assign_rows(Scheme.parse(one.scheme), narrowest), one.block)


def test_every_format_alone_is_among_them() -> None:
    prices, assignments = found(96, 0)
    losses = {one.scheme: one.loss for one in assignments}
    for index, name in enumerate(NAMES):
        assert losses[name] == pytest.approx(float(prices[:, index].sum()))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.floats(2.1, 5.5))
def test_blocks_of_rows_never_lose_more_than_whole_weights(seed: int, bits: float) -> None:
    weights = {f"w{index}": 96 + 32 * index for index in range(3)}
    candidates, whole = {}, {}
    for index, (name, rows) in enumerate(weights.items()):
        _, assignments = found(rows, seed + index)

        def size(one: RowAssignment, rows: int = rows) -> int:
            return stored_bytes((rows, COLUMNS), Scheme.parse(one.scheme))

        candidates[name] = Candidates.of(assignments, size)
        alike = [one for one in assignments if len(one.formats) == 1]
        whole[name] = Candidates.of(alike, size)
    budget = int(bits * sum(weights.values()) * COLUMNS / 8)
    if budget < sum(min(one.bytes) for one in whole.values()):
        return
    losses = []
    for which in (candidates, whole):
        picks = chosen(which, solve(column_problem(which), budget).picks)
        losses.append(sum(one.loss for one in picks.values()))
    assert losses[0] <= losses[1] * (1 + 1e-9)


def test_rows_that_matter_much_more_save_much() -> None:
    """Of rows that differ by three decades, blocks lose a third of one format for all at most."""
    prices = falling_prices(576, 0)
    assignments = row_assignments(prices, FORMATS, rates(576))
    budget = rates(576)[2] * 576
    mixed = [
        one.loss
        for one in assignments
        if stored_bytes((576, COLUMNS), Scheme.parse(one.scheme)) <= budget * 1.01
    ]
    assert min(mixed) < float(prices[:, 2].sum()) / 3


def test_rows_that_are_all_alike_stay_together() -> None:
    prices = torch.tensor([[4.0, 3.0, 1.0, 0.25, 0.06, 0.015]]).double().expand(64, -1)
    assignments = row_assignments(prices, FORMATS, rates(64))
    assert {len(one.formats) for one in assignments} == {1}


@pytest.mark.parametrize("wrong", [float("nan"), -1.0])
def test_prices_that_are_none_are_refused(wrong: float) -> None:
    prices = falling_prices(32, 0)
    prices[3, 1] = wrong
    with pytest.raises(SearchError, match="number >= 0 for every row"):
        row_assignments(prices, FORMATS, rates(32))
