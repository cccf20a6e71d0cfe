"""Hadamard matrices of every size that Sylvester, Paley and Kronecker products reach, and fast
multiplication by them.

A Hadamard matrix H of order n has entries +-1 and H H^T = n I. Divided by sqrt(n) it is a rotation
that spreads every coordinate evenly over all, and multiplying by it costs additions only. Orders of
real models are rarely powers of two (576, 1536, 8960, 11008, 14336), so we need more than
Sylvester's doubling, and we compute the rest instead of storing it:

- Paley I (1933): order q + 1 for every prime power q = 3 mod 4;
- Paley II: order 2 (q + 1) for every prime power q = 1 mod 4;
- Kronecker: the product of two Hadamard matrices is one.

Both of Paley's need the quadratic character of the field with q elements. Orders that none of this
reaches (92, 116, 156, ...; and everything that is no multiple of 4) are rotated in blocks:
`block_size` says of which size.

The matrix of order n is `H_m (x) S_s` with n = m s, `m, s = split(n)`: S_s is Sylvester's of the
largest power of two s for which m still has a construction. Kernels rely on that order.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch
from torch import Tensor

from quantlib.errors import TransformError

_DENSE = 512
"""Largest dense part that `block_size` accepts."""
_QUICK = 32
"""Largest dense part that `quick_size` accepts: a column takes as many multiplications as the part
has rows, where Sylvester's takes the logarithm of its order in additions."""
_OWN_PASSES = 16
_RADIX = 64
_MERGED = 256
"""`rotate` multiplies by Sylvester's part in factors of at most `_RADIX`, the first of several
together with the dense part up to order `_MERGED`: in torch a few small matrix products are faster
than log2(s) passes of additions over memory."""


@cache
def split(n: int) -> tuple[int, int]:
    """(m, s), m s = n: the order of the dense part and of Sylvester's part (a power of two).

    Raises TransformError when there is no construction for n.
    """
    if n > 0:
        power = n & -n
        while power:
            if _dense_factors(n // power) is not None:
                return n // power, power
            power //= 2
    raise TransformError(
        f"no construction gives a Hadamard matrix of order {n}: rotate in blocks of "
        f"{block_size(n) if n > 0 else 1} instead."
    )


def exists(n: int) -> bool:
    """Whether `hadamard(n)` has a construction."""
    return n > 0 and any(_dense_factors(n >> k) is not None for k in range((n & -n).bit_length()))


def block_size(n: int) -> int:
    """The largest b that divides n and has a Hadamard matrix (1 for odd n) that is quickly
    multiplied by: of orders with a dense part beyond `_DENSE`, such as 1488 = 744 x 2, the product
    would cost more than the layer behind it."""
    divisors = [d for low in range(1, math.isqrt(n) + 1) if n % low == 0 for d in (low, n // low)]
    return max(d for d in divisors if exists(d) and _dense_order(d) <= _DENSE)


def _dense_order(n: int) -> int:
    """Rows of the matrix that kernels multiply by as a whole: Sylvester's part is worth passes of
    its own from 16 on."""
    m, s = split(n)
    return m if s >= _OWN_PASSES else m * s


def signs(n: int) -> Tensor:
    """The Hadamard matrix of order n with its entries +1 and -1, int8 [n, n].

    Raises TransformError when there is no construction for n.
    """
    m, s = split(n)
    return torch.kron(_dense(m), _sylvester(s))


def hadamard(n: int) -> Tensor:
    """The orthonormal Hadamard matrix: `signs(n) / sqrt(n)`, float64 [n, n]."""
    return signs(n).double() / math.sqrt(n)


def covers(b: int, width: int) -> bool:
    """Whether blocks of order b rotate so many columns: they divide them, or may overlap."""
    overlaps = b >= _OWN_PASSES and not b & (b - 1)
    return b > 0 and (width % b == 0 or (overlaps and width > b))


def quick_size(n: int) -> int:
    """The order of blocks that mix n columns well and cost next to nothing: n itself where its
    dense part is small, else the largest power of two, whose blocks overlap (`rotate`)."""
    if exists(n) and _dense_order(n) <= _QUICK:
        return n
    power = 1 << (n.bit_length() - 1)
    return power if power >= _OWN_PASSES else block_size(n)


def rotate(x: Tensor, b: int) -> Tensor:
    """x [..., K] times the block-diagonal matrix of `hadamard(b)`: K is a multiple of b.

    A power of two from 16 on need not divide K: to the blocks that fit, from the first column on,
    comes one more over the last b columns, on what the others have made of them. So every output
    mixes b inputs at least, for two passes of additions where they overlap.

    Costs K times the sum of a few small orders instead of K b. In the dtype of x.
    Raises TransformError when b does not fit K or has no construction.
    """
    width = x.shape[-1]
    split(b)
    if not covers(b, width):
        raise TransformError(
            f"blocks of {b} do not divide {width} columns: use a divisor of {width}."
        )
    whole = width // b * b
    turned = _rotate_blocks(x[..., :whole], b)
    if whole == width:
        return turned
    turned = torch.cat([turned, x[..., whole:]], dim=-1)
    before, last = turned.split([width - b, b], dim=-1)
    return torch.cat([before, _rotate_blocks(last, b)], dim=-1)


def _rotate_blocks(x: Tensor, b: int) -> Tensor:
    m, s = split(b)
    y, right = x.reshape(-1, b), b
    for dense, sylvester in _stages(m, s):
        order = dense * sylvester
        right //= order
        matrix = _stage(dense, sylvester, x.dtype, x.device)
        # the index of a Kronecker product counts its factors like digits, the first the slowest
        last = right == 1
        y = y.reshape(-1, order) @ matrix if last else matrix.T @ y.reshape(-1, order, right)
    return y.reshape(x.shape) / math.sqrt(b)


def _stages(m: int, s: int) -> list[tuple[int, int]]:
    """Orders (dense, Sylvester) of Kronecker factors of the matrix of order m s, first to last."""
    stages: list[tuple[int, int]] = []
    while s > 1:
        stages.insert(0, (1, min(s, _RADIX)))
        s //= stages[0][1]
    if m > 1 and stages and m * stages[0][1] <= _MERGED and len(stages) > 1:
        stages[0] = (m, stages[0][1])
    elif m > 1:
        stages.insert(0, (m, 1))
    return stages


@lru_cache(maxsize=64)
def _stage(dense: int, sylvester: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.kron(_dense(dense), _sylvester(sylvester)).to(dtype=dtype, device=device)


def _sylvester(s: int) -> Tensor:
    """Sylvester's matrix of order s = 2^k, int8."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < s:
        above = torch.cat([matrix, matrix], 1)
        matrix = torch.cat([above, torch.cat([matrix, -matrix], 1)])
    return matrix


@cache
def _dense_factors(m: int) -> tuple[int, ...] | None:
    """Orders of Paley matrices whose Kronecker product has order m; () for 1, None if there are
    none."""
    if m == 1:
        return ()
    if _paley_field(m) is not None:
        return (m,)
    for first in range(12, math.isqrt(m) + 1, 4):  # smaller orders of Paley are powers of two
        if m % first == 0 and _paley_field(first) is not None:
            rest = _dense_factors(m // first)
            if rest is not None:
                return (first, *rest)
    return None


def _dense(m: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for factor in _dense_factors(m) or ():
        matrix = torch.kron(matrix, _paley(factor))
    return matrix


def _paley_field(n: int) -> tuple[int, int] | None:
    """(p, k) of the field with p^k elements from which Paley builds order n, None if there is
    none."""
    if n < 12 or n % 4:
        return None
    first, second = _prime_power(n - 1), _prime_power(n // 2 - 1)
    if first is not None:  # n - 1 = 3 mod 4
        return first
    return second if (n // 2 - 1) % 4 == 1 else None


def _paley(n: int) -> Tensor:
    """Paley's matrix of order n, int8."""
    field = _paley_field(n)
    if field is None:
        raise TransformError(f"no field gives a Paley matrix of order {n}.")
    q = field[0] ** field[1]
    bordered = torch.ones(q + 1, q + 1, dtype=torch.int8)
    bordered[0, 0] = 0
    bordered[1:, 1:] = _jacobsthal(*field)
    identity = torch.eye(q + 1, dtype=torch.int8)
    if q % 4 == 3:  # skew: I + S
        bordered[1:, 0] = -1
        return identity + bordered
    # symmetric: each 0 of S becomes a 2x2 matrix, each +-1 another
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    zero = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(bordered, plus) + torch.kron(identity, zero)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with p^k = q for an odd prime p, None if q is no such power."""
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k, rest = 0, q
    while p > 2 and rest % p == 0:
        k, rest = k + 1, rest // p
    return (p, k) if k and rest == 1 else None


def _jacobsthal(p: int, k: int) -> Tensor:
    """Q [q, q] int8, q = p^k: Q[a, b] = +1 where a - b is a nonzero square of the field, -1 where
    it is no square, 0 on the diagonal."""
    q = p**k
    digits = torch.stack([torch.arange(q) // p**i % p for i in range(k)], dim=1)  # [q, k]
    places = torch.tensor([p**i for i in range(k)])
    character = torch.full((q,), -1, dtype=torch.int8)
    character[(_squares(digits, p) * places).sum(1)] = 1
    character[0] = 0
    difference = (digits[:, None] - digits[None]) % p
    return character[(difference * places).sum(2)]


def _squares(digits: Tensor, p: int) -> Tensor:
    """The square of every field element, elements being polynomials [q, k] with coefficients modulo
    p, lowest first."""
    k = digits.shape[1]
    product = torch.zeros(len(digits), 2 * k - 1, dtype=torch.int64)
    for i in range(k):
        product[:, i : i + k] += digits[:, i : i + 1] * digits
    modulus = torch.tensor(_irreducible(p, k))  # x^k = -(modulus[0] + modulus[1] x + ...)
    for degree in range(2 * k - 2, k - 1, -1):
        product[:, degree - k : degree] -= product[:, degree : degree + 1] * modulus
    return product[:, :k] % p


def _irreducible(p: int, k: int) -> list[int]:
    """Lower coefficients (of x^0 .. x^(k-1)) of a monic polynomial of degree k that no polynomial
    of lower degree divides modulo p."""
    for number in range(p**k):
        candidate = [number // p**i % p for i in range(k)] + [1]
        if all(
            any(_remainder(candidate, [d // p**i % p for i in range(degree)] + [1], p))
            for degree in range(1, k // 2 + 1)
            for d in range(p**degree)
        ):
            return candidate[:k]
    raise TransformError(f"no polynomial of degree {k} is irreducible modulo {p}: {p} is no prime.")


def _remainder(dividend: list[int], divisor: list[int], p: int) -> list[int]:
    """Remainder of two polynomials modulo p, lowest coefficient first; the divisor is monic."""
    rest = list(dividend)
    for shift in range(len(rest) - len(divisor), -1, -1):
        factor = rest[shift + len(divisor) - 1]
        for i, coefficient in enumerate(divisor):
            rest[shift + i] = (rest[shift + i] - factor * coefficient) % p
    return rest[: len(divisor) - 1]
