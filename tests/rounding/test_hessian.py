"""Damping makes any second moment safe to factor; the factor is the one GPTQ needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.rounding.hessian import check_weight, damped, inverse_factor

MakeProblem = Callable[..., tuple[Tensor, Tensor]]


def test_damping_adds_a_fraction_of_the_mean_diagonal(
    problem: MakeProblem,
) -> None:
    _, hessian = problem(1, 24)
    mean = hessian.diagonal().mean()
    expected = hessian / mean + 0.05 * torch.eye(24)
    torch.testing.assert_close(damped(hessian, 0.05), expected)


@pytest.mark.parametrize("factor", [2.0**-130, 2.0**-60, 2.0**60])
def test_the_size_of_a_moment_changes_nothing(problem: MakeProblem, factor: float) -> None:
    _, hessian = problem(1, 8)
    # 2^-130 leaves few bits of a float32 subnormal: only there is anything lost at all.
    tolerance = 1e-4 if factor < 2.0**-126 else 0.0
    scaled = damped(hessian * factor, 0.01)
    torch.testing.assert_close(scaled, damped(hessian, 0.01), rtol=0, atol=tolerance)


def test_an_input_that_never_fired_gets_the_mean_diagonal(
    problem: MakeProblem,
) -> None:
    _, hessian = problem(1, 8)
    hessian[3, :] = hessian[:, 3] = 0
    result = damped(hessian, 0.01)
    assert float(result[3, 3]) == pytest.approx(1.01, rel=1e-6)
    assert float(result[3].sum()) == float(result[3, 3])
    assert bool(torch.isfinite(inverse_factor(result)).all())


def test_the_factor_is_upper_and_its_square_is_the_inverse(
    problem: MakeProblem,
) -> None:
    _, hessian = problem(1, 40)
    hessian = damped(hessian, 0.01)
    factor = inverse_factor(hessian).double()
    assert torch.equal(factor, factor.triu())
    # float32 output: relative errors of 2^-24 in U, times the condition number (about 100 here).
    identity = factor.T @ factor @ hessian.double()
    torch.testing.assert_close(identity, torch.eye(40).double(), rtol=0, atol=1e-4)


def test_the_diagonal_is_what_an_error_costs_after_compensation(
    problem: MakeProblem,
) -> None:
    """U_ii^-2 is the Schur complement: the least of e H e^T with e_i = 1 and only later columns
    free."""
    _, hessian = problem(1, 12)
    factor = inverse_factor(hessian)
    h = hessian.double()
    for i in range(12):
        later = slice(i + 1, 12)
        paid = h[i, later] @ torch.linalg.solve(h[later, later], h[later, i]) if i < 11 else 0
        assert float(factor[i, i] ** -2) == pytest.approx(float(h[i, i] - paid), rel=1e-4)


@pytest.mark.parametrize(
    ("hessian", "sentence"),
    [
        (torch.ones(3, 4), "square matrix"),
        (torch.ones(3), "square matrix"),
        (torch.full((2, 2), torch.nan), "inf, nan"),
        (torch.full((2, 2), torch.inf), "inf, nan"),
        (torch.diag(torch.tensor([1.0, -1.0])), "negative diagonal"),
        (torch.zeros(2, 2), "no calibration token"),
    ],
)
def test_a_hessian_that_is_none_is_refused(hessian: Tensor, sentence: str) -> None:
    with pytest.raises(RoundingError, match=sentence):
        damped(hessian, 0.01)


def test_an_indefinite_matrix_is_refused() -> None:
    with pytest.raises(RoundingError, match="more damping"):
        inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_damaged_weight_is_refused_by_name(bad: float) -> None:
    weight = torch.ones(2, 3)
    weight[1, 2] = bad
    with pytest.raises(RoundingError, match=r"layer\.weight holds inf or nan"):
        check_weight("layer.weight", weight, torch.eye(3))


@pytest.mark.parametrize("shape", [(3, 2), (3,), (2, 3, 3)])
def test_a_weight_of_another_width_is_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(RoundingError, match=r"layer\.weight is .* and its Hessian"):
        check_weight("layer.weight", torch.ones(shape), torch.eye(3))
