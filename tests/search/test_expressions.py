"""Formulas: what is read computes, and nothing else is read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import SearchError
from quantlib.search.expressions import BINARY, UNARY, Expression

COLUMNS = {"a": np.array([1.0, 4.0]), "b": np.array([3.0, 5.0])}

leaves = st.sampled_from(["a", "b", "2", "0.5"])
formulas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(sorted(UNARY)), inner).map(lambda t: f"{t[0]}({t[1]})"),
        st.tuples(st.sampled_from(sorted(BINARY)), inner, inner).map(
            lambda t: f"{t[0]}({t[1]}, {t[2]})"
        ),
    ),
    max_leaves=12,
)


def test_a_formula_is_computed_row_by_row() -> None:
    found = Expression.parse("add(mul(a, 2), sqrt(a))", COLUMNS).evaluate(COLUMNS)
    assert found.tolist() == [3.0, 10.0]
    assert Expression.parse("2", COLUMNS).evaluate(COLUMNS).tolist() == [2.0, 2.0]


def test_what_is_not_defined_is_no_number_and_no_exception() -> None:
    found = Expression.parse("log(sub(a, b))", COLUMNS).evaluate(COLUMNS)
    assert np.isnan(found).all()
    assert np.isinf(Expression.parse("inverse(sub(a, a))", COLUMNS).evaluate(COLUMNS)).all()


@given(formulas)
def test_the_text_of_a_formula_is_the_formula(text: str) -> None:
    first = Expression.parse(text, COLUMNS)
    again = Expression.parse(first.text, COLUMNS)
    assert again == first
    np.testing.assert_array_equal(first.evaluate(COLUMNS), again.evaluate(COLUMNS))
    assert first.names() <= COLUMNS.keys()
    assert first.nodes() >= 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mul(a", "not a formula"),
        ("mul(a)", "takes 2 arguments"),
        ("mul(a, c)", "reads 'c'"),
        ("system(a)", "calls 'system'"),
        ("a.real", "holds 'a.real'"),
        ("__import__('os')", "calls '__import__'"),
        ("[a for a in b]", "holds"),
        ("a if a else b", "holds"),
        ("mul(a, 'x')", "holds"),
        ("mul(a, True)", "holds"),
        ("sqrt(" * 500 + "a" + ")" * 500, "characters"),
        ("sqrt(" * 300 + "a" + ")" * 300, "not a formula"),
    ],
)
def test_anything_else_is_refused_with_a_sentence(text: str, said: str) -> None:
    with pytest.raises(SearchError, match=said.replace("(", r"\(").replace("[", r"\[")):
        Expression.parse(text, COLUMNS)


def test_a_column_that_nobody_measured_is_named() -> None:
    with pytest.raises(SearchError, match="needs b"):
        Expression.parse("add(a, b)", COLUMNS).evaluate({"a": COLUMNS["a"]})
