"""Hadamard matrices are exact, of every size there is a construction for, and rotate quickly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import TransformError
from quantlib.transforms.hadamard import (
    block_size,
    covers,
    exists,
    hadamard,
    quick_size,
    rotate,
    signs,
    split,
)

# The orders up to 300 that need Williamson's or later constructions.
GAPS = {92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292}
MODEL_SIZES = (384, 576, 1536, 3072, 8960, 11008, 14336)
ORDERS = [n for n in range(1, 301) if n <= 2 or (n % 4 == 0 and n not in GAPS)]


def test_every_order_up_to_300_is_reached_but_the_known_gaps() -> None:
    assert [n for n in range(1, 301) if exists(n)] == ORDERS


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal_in_integers(n: int) -> None:
    matrix = signs(n).long()
    assert matrix.shape == (n, n)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.long))


@pytest.mark.parametrize("n", MODEL_SIZES)
def test_sizes_of_real_models_have_one(n: int) -> None:
    m, s = split(n)
    assert m * s == n
    assert s & (s - 1) == 0
    assert block_size(n) == n
    dense = signs(m).long()  # the rest is Sylvester's, which the orders above cover
    assert torch.equal(dense @ dense.T, m * torch.eye(m, dtype=torch.long))


def test_a_large_one_is_orthonormal_as_a_whole() -> None:
    matrix = hadamard(1536)
    # entries are +-1/sqrt(n), rounded; a sum of n products is off by some units of float64
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(1536).double(), rtol=0, atol=1e-13)


def test_the_order_of_the_kronecker_product_is_dense_then_sylvester() -> None:
    m, s = split(48)
    assert (m, s) == (12, 4)
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    assert torch.equal(signs(48), torch.kron(signs(12), torch.kron(two, two)))


def is_quick(n: int) -> bool:
    """Whether a product with the matrix of order n is mostly additions: at most 512 columns in a
    dense part, to which Sylvester's part below 16 counts."""
    return exists(n) and (split(n)[0] if split(n)[1] >= 16 else n) <= 512


@pytest.mark.parametrize("n", [1488, 8960 - 1120, 4864 - 608])
def test_orders_with_a_large_dense_part_are_left_for_smaller_blocks(n: int) -> None:
    assert exists(n)
    assert block_size(n) < n
    assert is_quick(block_size(n))


@pytest.mark.parametrize("n", [92, 116, 7, 97, 30, 1380])
def test_a_size_without_construction_falls_to_blocks(n: int) -> None:
    size = block_size(n)
    assert n % size == 0
    assert exists(size)
    assert not any(is_quick(d) for d in range(size + 1, n + 1) if n % d == 0)
    with pytest.raises(TransformError, match=f"order {n}: rotate in blocks of {size}"):
        hadamard(n)


@pytest.mark.parametrize("n", [0, -4])
def test_orders_below_one_are_refused(n: int) -> None:
    assert not exists(n)
    with pytest.raises(TransformError, match="no construction"):
        split(n)


@given(
    b=st.sampled_from([n for n in ORDERS if n <= 144]),
    blocks=st.integers(1, 3),
    rows=st.sampled_from([(), (1,), (5,), (2, 3), (0,)]),
    seed=st.integers(0, 99),
)
def test_rotate_is_the_product_with_a_block_diagonal_matrix(
    b: int, blocks: int, rows: tuple[int, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, b * blocks, generator=generator, dtype=torch.float64)
    before = x.clone()
    expected = x @ torch.block_diag(*[hadamard(b)] * blocks)
    # float64 sums of at most 144 terms of order 1, in another order
    torch.testing.assert_close(rotate(x, b), expected, rtol=0, atol=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [1536, 8960])
def test_rotate_of_a_model_s_size_in_float32(size: int) -> None:
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    exact = rotate(x.double(), size)
    assert rotate(x, size).dtype == torch.float32
    # a few dozen additions per value, each off by float32's 6e-8 of values of order 1
    torch.testing.assert_close(rotate(x, size).double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(exact.norm(dim=1), x.double().norm(dim=1), rtol=1e-12, atol=0)


def test_blocks_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(TransformError, match="blocks of 12 do not divide 32"):
        rotate(torch.zeros(1, 32), 12)


@given(
    b=st.sampled_from([16, 32, 64]),
    more=st.integers(1, 150),
    seed=st.integers(0, 99),
)
def test_blocks_of_a_power_of_two_may_overlap(b: int, more: int, seed: int) -> None:
    """Those that fit, then one over the last columns: together a rotation."""
    width = b + more
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = width // b
    left = width - whole * b
    first = torch.block_diag(*[hadamard(b)] * whole, torch.eye(left, dtype=torch.float64))
    second = torch.block_diag(torch.eye(width - b, dtype=torch.float64), hadamard(b))
    expected = x @ first @ (second if left else torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(rotate(x, b), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected.norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("b", "width"), [(16, 12), (8, 12), (48, 100), (12, 32), (0, 12)])
def test_other_blocks_must_divide_the_width(b: int, width: int) -> None:
    assert not covers(b, width)
    with pytest.raises(TransformError, match=r"divide|no construction"):
        rotate(torch.zeros(1, width), b)


@pytest.mark.parametrize(
    ("n", "size"), [(1536, 1536), (1488, 1024), (1440, 1024), (1344, 1024), (140, 128), (12, 12)]
)
def test_a_quick_size_covers_all_columns(n: int, size: int) -> None:
    assert quick_size(n) == size
    assert covers(size, n)


@given(st.integers(1, 4000))
def test_every_width_has_a_quick_size(n: int) -> None:
    size = quick_size(n)
    assert covers(size, n)
    assert exists(size)
