"""Limits on codes alone and with scales."""

from __future__ import annotations

import pytest

from quantlib.bench.w4a4.limits import (
    ACTIVATION_CODES,
    WEIGHT_CODES,
    Limits,
    code_bits,
    side_codes,
    with_codes,
)
from quantlib.errors import SearchError
from quantlib.search.activations import ACTIVATION_BITS
from quantlib.search.problem import Choice, Item, Problem
from quantlib.search.solve import solve

LOSSES = {
    "attention": {
        "key": {"int4": 3.0, "int4g16": 2.0, "int4h16": 1.0, "int8": 0.1},
        "value": {"int4": 0.3, "int8": 0.0},
    }
}


def test_codes_of_a_weight_and_of_what_it_reads() -> None:
    # 64 columns, 1/4 of them wide: 48 at 4 bits (of inputs: 3) and 16 at 8.
    stored, read = code_bits("w4g16zs4a3zg16h8/4", 10, 64)
    assert stored == 10 * (48 * 4 + 16 * 8)
    assert read == 10 * (48 * 3 + 16 * 8)


@pytest.mark.parametrize(
    ("name", "bits"), [("int4", 256), ("int4g16", 256), ("int4h16", 320), ("int8", 512)]
)
def test_codes_of_a_cached_head(name: str, bits: int) -> None:
    assert side_codes(name, 64) == bits


def test_wide_caches_are_left_out_where_codes_are_limited() -> None:
    assert Limits(4.4, 4.5, 5.2).sides(LOSSES, 64) == LOSSES
    left = Limits(4.4, 4.5, 5.2, codes=4.0).sides(LOSSES, 64)
    assert left == {"attention": {"key": {"int4": 3.0, "int4g16": 2.0}, "value": {"int4": 0.3}}}


def test_the_solver_keeps_to_codes() -> None:
    names = {"w4g64z5s5a4zg64": 1.0, "w5g64zs5a4zg64": 0.5, "w3g64z4s4a5zg64": 2.0}
    choices = tuple(Choice(name, 100, loss, {ACTIVATION_BITS: 4.0}) for name, loss in names.items())
    problem = Problem(tuple(Item(name, (name,), choices) for name in ("one", "two")))
    priced = with_codes(problem, {"one": (8, 64), "two": (8, 64)})
    limits = Limits(9.0, 9.0, 9.0, codes=4.0)
    found = solve(priced, 10_000, limits.costs)
    assert found.loss == pytest.approx(2.0), "both at 4 bits: 5 and 3 would have 4 on average, too"
    assert found.costs[WEIGHT_CODES] == pytest.approx(4.0)
    assert found.costs[ACTIVATION_CODES] == pytest.approx(4.0)
    assert solve(priced, 10_000, Limits(9.0, 9.0, 9.0).costs).loss == pytest.approx(1.0)
    with pytest.raises(SearchError):
        solve(priced, 10_000, Limits(9.0, 9.0, 9.0, codes=2.0).costs)


def test_weights_that_are_not_counted_cost_nothing() -> None:
    item = Item("table", ("table",), (Choice("w8g64zs6", 1, 0.0),))
    (choice,) = with_codes(Problem((item,)), {"other": (8, 64)}).items[0].choices
    assert choice.costs == {WEIGHT_CODES: 0.0, ACTIVATION_CODES: 0.0}
