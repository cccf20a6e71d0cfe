"""Bits by column: prices are what GPTQ really lost, and no widths are a better deal."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlib.errors import SearchError
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize, pack, unpack
from quantlib.formats.weight_format import WeightFormat
from quantlib.kernels import ops, reference
from quantlib.kernels.packed import PackedWeight
from quantlib.rounding import RoundingOptions, round_integers
from quantlib.rounding.hessian import damped, inverse_factor
from quantlib.search.columns import (
    FORMATS,
    Assignment,
    Candidates,
    assignments,
    chosen,
    column_prices,
    column_problem,
    mixed_scheme,
    remeasured,
)
from quantlib.search.solve import solve


def formats(*names: str) -> list[WeightFormat]:
    return [Scheme.parse(name).segments(1)[0].format for name in names]


DEFAULTS = formats(*FORMATS)


def weight_and_hessian(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = inputs @ (torch.eye(columns) + mixing)
    return weight, inputs.T @ inputs / len(inputs)


def falling_prices(columns: int, seed: int) -> Tensor:
    """Prices of DEFAULTS: four times less for every bit, columns differ by three decades."""
    generator = torch.Generator().manual_seed(seed)
    importance = 10 ** (3 * torch.rand(columns, 1, generator=generator).double())
    bits = torch.tensor([form.bits for form in DEFAULTS]).double()
    noise = 1 + 0.2 * torch.rand(columns, len(bits), generator=generator).double()
    return importance * 4.0**-bits * noise


@pytest.mark.parametrize("scheme", ["w2g64z4s4", "w3g64zs4", "w4"])
def test_prices_add_up_to_what_the_sweep_lost(scheme: str) -> None:
    weight, hessian = weight_and_hessian(24, 96)
    layout = Scheme.parse(scheme).segments(96)
    rounded = round_integers({"": weight}, hessian, [layout], RoundingOptions(passes=0))["", 0]
    error = (weight - dequantize(rounded)).double()
    moment = damped(hessian, 0.01).double()
    rows = torch.rand(24, generator=torch.Generator().manual_seed(1)).double()
    prices = column_prices(error, inverse_factor(moment), rows)
    lost = rows @ ((error @ moment) * error).sum(1)
    # float32 in the factor: 1e-7 times the condition of the moment, some 1e2
    assert float(prices.sum()) == pytest.approx(float(lost), rel=1e-4)
    assert bool((prices >= 0).all())


def test_independent_columns_cost_their_own_squares() -> None:
    error = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    prices = column_prices(error, torch.diag(torch.tensor([1.0, 0.5])), torch.tensor([1.0, 10.0]))
    assert prices.tolist() == pytest.approx([1.0, 4 * (4 + 90)])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), columns=st.sampled_from([64, 100, 192]))
def test_an_assignment_is_stored_as_its_scheme_says(seed: int, columns: int) -> None:
    prices = falling_prices(columns, seed)
    found = assignments(prices, DEFAULTS)
    assert len({one.scheme for one in found}) == len(found)
    assert {one.scheme for one in found} >= set(FORMATS)
    for one in found:
        segments = Scheme.parse(one.scheme).segments(columns)
        widths = torch.tensor([form.bits for form in DEFAULTS])[one.picks]
        order = torch.arange(columns) if one.order is None else one.order
        stored = torch.cat([torch.full((s.length,), s.format.bits) for s in segments])
        assert torch.equal(widths[order], stored)
        assert all(part.length % 32 == 0 for part in segments[1:])
        expected = prices.cummin(1).values.gather(1, one.picks[:, None]).sum()
        assert one.loss == pytest.approx(float(expected))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_same_widths_never_lose_less_with_as_many_bits(seed: int) -> None:
    # Columns come in blocks of four alike, so that counting them in fours takes nothing away.
    blocks = falling_prices(3, seed)[:, :3]
    prices = blocks.repeat_interleave(4, dim=0)
    three = DEFAULTS[:3]
    bits = torch.tensor([form.bits for form in three])
    for one in assignments(prices, three, step=4):
        used, known = int(bits[one.picks].sum()), one.picks.unique().tolist()
        losses = [
            4 * sum(float(blocks[i, w]) for i, w in enumerate(widths))
            for widths in product(known, repeat=3)
            if 4 * sum(int(bits[w]) for w in widths) <= used
        ]
        assert one.loss <= min(losses) * (1 + 1e-9)


def test_a_price_that_rises_with_the_width_is_not_believed() -> None:
    prices = torch.tensor([[1.0, 2.0, 0.5, 0.5]]).repeat(64, 1)
    by_name = {one.scheme: one.loss for one in assignments(prices, DEFAULTS)}
    assert by_name["w3g64zs4"] == by_name["w2g64z4s4"] == pytest.approx(64.0)


def test_one_width_needs_no_order() -> None:
    assert Assignment("w4", torch.zeros(8, dtype=torch.int64), 0.0).order is None
    mixed = Assignment("w2h4/2", torch.tensor([1, 0, 1, 0, 0, 0, 1, 1]), 0.0).order
    assert mixed is not None
    assert mixed.tolist() == [1, 3, 4, 5, 0, 2, 6, 7]


@pytest.mark.parametrize(
    ("counts", "names"),
    [([32, 32], ("w2g64z4s4", "w3g32z4s4")), ([30, 34], ("w2g64z4s4", "w3g64zs4"))],
)
def test_formats_that_no_scheme_joins_are_refused(counts: list[int], names: tuple[str]) -> None:
    with pytest.raises(SearchError, match="cannot be stored"):
        mixed_scheme(counts, formats(*names))


def test_the_model_wide_choice_keeps_the_budget_and_beats_whole_weights() -> None:
    tables = {f"layer{i}": falling_prices(128, i) for i in range(4)}

    def size(one: Assignment) -> int:
        order = 0 if one.order is None else 4 * 128
        bits = torch.tensor([form.bits for form in DEFAULTS])[one.picks].sum()
        return int(bits) * 64 // 8 + order

    mixed = {name: Candidates.of(assignments(p, DEFAULTS), size) for name, p in tables.items()}
    whole = {
        name: Candidates.of([a for a in assignments(p, DEFAULTS) if a.order is None], size)
        for name, p in tables.items()
    }
    budget = int(2.6 * 4 * 128 * 64 / 8)
    solutions = [solve(column_problem(found), budget) for found in (mixed, whole)]
    assert all(solution.bytes <= budget for solution in solutions)
    assert solutions[0].loss < solutions[1].loss
    plan = chosen(mixed, solutions[0].picks)
    assert sum(map(size, plan.values())) == solutions[0].bytes
    assert any(one.order is not None for one in plan.values())


def test_what_was_really_lost_corrects_every_width_of_a_column() -> None:
    prices = torch.tensor([[8.0, 2.0], [8.0, 2.0], [8.0, 2.0]])
    found = remeasured(prices, torch.tensor([0, 1, 1]), torch.tensor([4.0, 3.0, 1e9]))
    assert found.tolist() == [[4.0, 1.0], [12.0, 3.0], [32.0, 8.0]]


def test_four_widths_in_one_linear_come_back_and_run_on_the_kernels() -> None:
    weight, hessian = weight_and_hessian(40, 192, seed=3)
    scheme = mixed_scheme([64, 64, 32, 32], DEFAULTS)
    segments = scheme.segments(192)
    quantized = round_integers({"": weight}, hessian, [segments], RoundingOptions(passes=1))["", 0]
    tensors = pack(quantized)
    assert torch.equal(dequantize(unpack(tensors, (40, 192), segments)), dequantize(quantized))
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(4))
    expected = reference.linear(x, quantized, compute_dtype=torch.float64)
    found = ops.linear(x, PackedWeight.from_tensors(tensors, (40, 192), segments))
    # 192 float32 products each: errors of 1e-7 relative to sums of magnitude 10
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
