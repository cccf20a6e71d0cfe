"""PCA minimises its objective, a fixed point never increases its own, and real rounding agrees."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantlib.errors import TransformError
from quantlib.transforms.fixed_point import Term, fixed_point, objective, principal
from quantlib.transforms.mixing import mixing, random_orthogonal


def moment(size: int, spread: float, generator: torch.Generator) -> Tensor:
    """Log-normal eigenvalues in a random basis, float64 [size, size]."""
    values = (spread * torch.randn(size, dtype=torch.float64, generator=generator)).exp()
    basis = random_orthogonal(size, generator)
    return basis * values @ basis.T


def stacked(count: int, size: int, spread: float, generator: torch.Generator) -> Tensor:
    return torch.stack([moment(size, spread, generator) for _ in range(count)])


@given(
    seed=st.integers(0, 10_000),
    heads=st.integers(1, 3),
    count=st.integers(1, 4),
    high=st.integers(0, 7),
    spread=st.floats(0.1, 3.0),
)
def test_no_step_of_the_fixed_point_goes_up(
    seed: int, heads: int, count: int, high: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = [
        Term(*(stacked(heads, 8, s, generator) for s in (spread, 1.0)), shared=bool(index % 2))
        for index in range(count)
    ]
    for start in (None, principal(terms[0].activation)):
        vectors, history = fixed_point(terms, high, start)
        assert history == sorted(history, reverse=True)
        # the last is that of the basis returned: the same sums, so the same bits
        assert objective(terms, vectors, high) == history[-1]
        identity = vectors.mT @ vectors
        assert float((identity - torch.eye(8, dtype=torch.float64)).abs().max()) <= 1e-12
        if start is not None:
            assert history[0] == objective(terms, start, high)


@given(seed=st.integers(0, 10_000), high=st.integers(1, 7))
def test_no_random_basis_leaves_less_in_the_low_slice_than_pca(seed: int, high: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    second = moment(8, 1.5, generator)
    flat = torch.eye(8, dtype=torch.float64)[None]
    terms = [Term(second[None], flat)]
    best = objective(terms, principal(second)[None], high)
    for _ in range(5):
        other = objective(terms, random_orthogonal(8, generator)[None], high)
        assert best <= other * (1 + 1e-12)
    found, _ = fixed_point(terms, high)  # with a flat price it is PCA
    assert objective(terms, found, high) == pytest.approx(best, rel=1e-9)


def test_eigenvectors_ascend_and_have_one_sign() -> None:
    second = moment(16, 1.0, torch.Generator().manual_seed(1))
    vectors = principal(second)
    energies = (vectors * (second @ vectors)).sum(0)
    assert torch.equal(energies, energies.sort().values)
    assert torch.equal(principal(second * 4), vectors)  # the sign is not LAPACK's mood
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())


def test_one_scale_for_all_heads_couples_them() -> None:
    """A head that carries nearly all energy decides alone how much the other's directions cost."""
    generator = torch.Generator().manual_seed(2)
    activation, energy = (stacked(2, 8, 1.0, generator) for _ in range(2))
    activation = activation * torch.tensor([100.0, 1.0], dtype=torch.float64)[:, None, None]
    coupled = [Term(activation, energy, shared=True)]
    alone = [Term(activation, energy)]
    together, _ = fixed_point(coupled, 2)
    apart, _ = fixed_point(alone, 2)
    assert objective(coupled, together, 2) < objective(coupled, apart, 2)
    assert objective(alone, apart, 2) < objective(alone, together, 2)


def test_nothing_to_lose_and_nothing_to_choose_from() -> None:
    zeros = torch.zeros(1, 4, 4, dtype=torch.float64)
    vectors, history = fixed_point([Term(zeros, zeros)], 1)
    assert torch.equal(vectors[0], torch.eye(4, dtype=torch.float64))
    assert history == [0.0]
    with pytest.raises(TransformError, match="4 high columns"):
        fixed_point([Term(zeros, zeros)], 4)
    with pytest.raises(TransformError, match="inf or nan"):
        principal(torch.full((2, 2), torch.nan))


# --- the synthetic check of algorithms 6.1, with real rounding ---

SIZE, ROWS, TOKENS, HIGH = 256, 384, 2048, 32


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Asymmetric, one scale per row."""
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    return ((x / step).round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(step)


def round_rows(w: Tensor, bits: int) -> Tensor:
    """Symmetric, one scale per row."""
    step = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (w / step).round() * step


def relative_error(x: Tensor, weight: Tensor, vectors: Tensor, generator: torch.Generator) -> float:
    """Of x W^T with the low slice at 4 bits and the high one at 8, in this basis, mixed."""
    low = SIZE - HIGH
    basis = vectors @ mixing(SIZE, [low], random_orthogonal, generator)
    xs, ws = (x @ basis).split([low, HIGH], 1), (weight @ basis).split([low, HIGH], 1)
    y = x @ weight.T
    rounded = sum(
        round_tokens(a, bits) @ round_rows(b, bits).T
        for a, b, bits in zip(xs, ws, (4, 8), strict=True)
    )
    return float((rounded - y).square().sum() / y.square().sum())


def test_with_real_rounding_random_is_worse_than_pca_and_pca_than_the_fixed_point() -> None:
    """Spectra as in algorithms 6.1; there: 0.0234, 0.0106 and 0.0092, so the fixed point is 14 %
    better than PCA. Two draws, so the means are known to a few per cent."""
    measured: dict[str, list[float]] = {"random": [], "pca": [], "fixed": []}
    predicted = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        root = torch.linalg.cholesky(moment(SIZE, 1.5, generator))
        x = torch.randn(TOKENS, SIZE, dtype=torch.float64, generator=generator) @ root.T
        root = torch.linalg.cholesky(moment(SIZE, 1.0, generator))
        weight = torch.randn(ROWS, SIZE, dtype=torch.float64, generator=generator) @ root.T
        second, energy = x.T @ x / TOKENS, weight.T @ weight
        terms = [Term(second[None], energy[None])]
        fixed, _ = fixed_point(terms, HIGH)
        bases = {
            "random": random_orthogonal(SIZE, generator),
            "pca": principal(second),
            "fixed": fixed[0],
        }
        for name, vectors in bases.items():
            measured[name].append(relative_error(x, weight, vectors, generator))
        pca, best = (objective(terms, bases[n][None], HIGH) for n in ("pca", "fixed"))
        predicted.append(best / pca)
    random, pca, fixed_error = (math.fsum(measured[n]) for n in ("random", "pca", "fixed"))
    assert fixed_error < 0.93 * pca
    assert pca < 0.6 * random
    # the product predicts the measured gain: 0.855 for 0.861 there, a few per cent of noise here
    assert fixed_error / pca == pytest.approx(math.fsum(predicted) / 2, rel=0.06)
