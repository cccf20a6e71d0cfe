"""Embeddings in blocks of rows: prices decide who is where, and dear rows are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats import Scheme, dequantize, dequantize_stored, stored_bytes
from quantlib.rounding import RoundingOptions, round_group, round_members, round_rows
from quantlib.rounding.rows import assign_rows, block_of_rows

OPTIONS = RoundingOptions(passes=1)


def prices(count: int) -> Tensor:
    """A few rows matter, most hardly, in no order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5))
    return 1 / (1 + order.float()) ** 2


def test_the_dearest_rows_are_in_the_first_block() -> None:
    price = prices(100)
    block = assign_rows(Scheme.parse("w8@1/10+w4@2/5+w2"), price)
    assert torch.bincount(block.long()).tolist() == [10, 40, 50]
    assert float(price[block == 0].min()) > float(price[block == 1].max())
    assert float(price[block == 1].min()) > float(price[block == 2].max())


def test_rows_of_one_price_stay_in_order() -> None:
    block = assign_rows(Scheme.parse("w8@1/4+w4"), torch.ones(8))
    assert block.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


def test_blocks_lose_less_than_one_format_of_more_bytes(problem) -> None:
    weight, hessian = problem(200, 64)
    price = prices(200)

    def lost(value: Tensor) -> float:
        error = (value - weight).double()
        return float(price.double() @ ((error @ hessian.double()) * error).sum(1))

    scheme, uniform = Scheme.parse("w6g32@1/8+w3g32"), Scheme.parse("w4g32")
    assert stored_bytes((200, 64), scheme) < stored_bytes((200, 64), uniform)
    split = round_rows(weight, hessian, scheme, price, OPTIONS)
    plain = round_group({"w": weight}, hessian, [uniform.segments(64)], OPTIONS)["w", 0]
    assert lost(dequantize_stored(split)) < 0.6 * lost(dequantize(plain))


def test_rows_that_have_few_dimensions_lose_nothing_in_as_many(problem) -> None:
    _, hessian = problem(4, 48)
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(60, 12, generator=generator) @ torch.randn(12, 48, generator=generator)
    narrow = round_rows(weight, hessian, Scheme.parse("w8g16d12"), torch.ones(60), OPTIONS)
    relative = float((dequantize_stored(narrow) - weight).norm() / weight.norm())
    assert relative < 0.02  # of 8 bits, twice


def test_the_kept_dimensions_are_those_that_matter(problem) -> None:
    """A narrow block keeps more of the output than the same number of coordinates would."""
    weight, hessian = problem(80, 48)
    narrow = round_rows(weight, hessian, Scheme.parse("w8g16d24"), torch.ones(80), OPTIONS)
    error = (dequantize_stored(narrow) - weight).double()
    lost = ((error @ hessian.double()) * error).sum()
    cut = weight.double().clone()
    cut[:, :24] = 0  # inputs fall from 1 to 0.1, so that these are not the ones to keep; nor those
    tail = weight.double().clone()
    tail[:, 24:] = 0
    both = [((w @ hessian.double()) * w).sum() for w in (cut, tail)]
    assert float(lost) < 0.5 * float(min(both))


def test_prices_and_schemes_are_checked(problem) -> None:
    weight, hessian = problem(20, 48)
    with pytest.raises(RoundingError, match="price"):
        round_rows(weight, hessian, Scheme.parse("w8@1/2+w4"), torch.ones(19))
    with pytest.raises(RoundingError, match="blocks"):
        round_rows(weight, hessian, Scheme.parse("w8"), torch.ones(20))


def test_members_in_blocks_are_rounded_as_whole_ones_are(problem) -> None:
    """Rows are independent: those of a block come out, to the bit, as if the whole member were in
    the block's format; members of one matrix are what `round_group` makes of them."""
    weight, hessian = problem(96, 64)
    weights = {"a": weight, "b": weight.flip(0) * 1.3, "c": weight.roll(5, 0)}
    names = {"a": "w6g32@1/6+w4g32@1/2+w2g32", "b": "w4g32", "c": "w4g32@1/3+mxfp4"}
    schemes = {name: Scheme.parse(text) for name, text in names.items()}
    blocks = {
        name: assign_rows(scheme, prices(96)) if scheme.rows else None
        for name, scheme in schemes.items()
    }
    found = round_members(weights, hessian, schemes, blocks, OPTIONS)
    assert list(found) == list(weights)
    for name, scheme in schemes.items():
        block = block_of_rows(found[name])
        formats = [Scheme(part.format) for part in scheme.rows] or [scheme]
        assert (block is None) == (len(formats) == 1)
        for index, one in enumerate(formats):
            whole = round_group({name: weights[name]}, hessian, [one.segments(64)], OPTIONS)
            rows = torch.ones(96, dtype=torch.bool) if block is None else block == index
            value = dequantize_stored(found[name])[rows]
            assert torch.equal(value, dequantize(whole[name, 0])[rows]), (name, str(one))


@pytest.mark.parametrize("name", ["w4g32+r4", "w4g32@1/4+w2g32d40"])
def test_members_of_other_kinds_are_refused(problem, name: str) -> None:
    weight, hessian = problem(96, 64)
    scheme = Scheme.parse(name)
    block = assign_rows(scheme, prices(96)) if scheme.rows else None
    with pytest.raises(RoundingError, match="blocks of rows"):
        round_members({"a": weight}, hessian, {"a": scheme}, {"a": block}, OPTIONS)
