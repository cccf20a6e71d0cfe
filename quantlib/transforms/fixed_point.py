"""Which directions deserve more bits: the subspace whose complement loses least when it is rounded.

Input x and weight W are rounded in a basis whose columns are mixed, so that every entry of a slice
has about the same size. The error of the slice P then follows from two traces (algorithms 6.1; the
step of a scale grows with the norm of what it spans):

    error(P)  ~  tr(P^T A P) * tr(P^T E P)        A = E[x x^T],  E = W^T diag(f) W  (`energies.py`)

ResQ minimises the first factor alone, by PCA. Here the low slice minimises the sum of such products
over all groups that share the basis, by repeated linearisation: with a, e the two traces of the
present slice, the next one has the lowest eigenvectors of the sum of e A + a E. For one term that
is majorise-minimise of log a + log e and cannot go up; for a sum it can, and then the step is
halved. The first step, from the traces of the whole space, is CoQuant's (arXiv:2604.26378).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import TransformError

STEPS = 10
_HALVINGS = 3
_SMALL = 1e-9
"""A relative decrease below this is none."""


@dataclass(frozen=True)
class Term:
    """One group of the objective, for the B heads that have bases of their own (1: the stream).

    activation, energy: float64 [B, D, D].
    shared: one scale spans all heads (the input of an output projection), so traces are taken over
            all of them; else each head has its scales (a KV cache).
    """

    activation: Tensor
    energy: Tensor
    shared: bool = False

    def traces(self, projector: Tensor) -> tuple[Tensor, Tensor]:
        """tr(P^T A P) and tr(P^T E P) of the low slices, given P P^T [B, D, D]: each [B, 1, 1]."""
        a, e = ((x * projector).sum((-2, -1), keepdim=True) for x in (self.activation, self.energy))
        if self.shared:
            a, e = (x.sum(0, keepdim=True).expand_as(x) for x in (a, e))
        return a, e

    def product(self, projector: Tensor) -> float:
        """The predicted error of the low slices, up to a factor that all terms share."""
        a, e = self.traces(projector)
        products = a * e
        return float(products[0] if self.shared else products.sum())


def principal(second: Tensor) -> Tensor:
    """Eigenvectors [..., D, D] as columns, by ascending eigenvalue: ResQ's choice.

    ResQ adds 1 % of the mean to the diagonal first, which raises every eigenvalue alike and turns
    no eigenvector; it is left out. The sign of each is fixed: its largest entry is positive.
    """
    second = second.double()
    if not bool(torch.isfinite(second).all()):
        raise TransformError("a second moment holds inf or nan: there is no basis to find in it.")
    vectors = torch.linalg.eigh((second + second.mT) / 2).eigenvectors
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def objective(terms: Sequence[Term], vectors: Tensor, high: int) -> float:
    """Sum of the products of the low slice: all but the last `high` columns of vectors
    [B, D, D]."""
    projector = _projector(vectors, high)
    return sum(term.product(projector) for term in terms)


def fixed_point(
    terms: Sequence[Term], high: int, start: Tensor | None = None, steps: int = STEPS
) -> tuple[Tensor, list[float]]:
    """The basis [B, D, D] whose columns but the last `high` minimise `objective`, in ascending
    importance; and the objective after each step, never increasing.

    start: orthogonal [B, D, D] to begin from; CoQuant's by default.
    The last columns are those that the last linearisation prices highest, also in their order, so
    slices of another size are nearly as well chosen.
    """
    if not terms or not 0 <= high < terms[0].activation.shape[-1]:
        raise TransformError(
            f"{high} high columns: there must be terms to weigh, and low columns to minimise"
        )
    everything = torch.eye(terms[0].activation.shape[-1], dtype=torch.float64)
    everything = everything.expand_as(terms[0].activation)
    scale = sum(term.product(everything) for term in terms)
    if not scale > 0:  # nothing can be lost: any basis is as good
        return everything.clone(), [0.0]
    price = _linearised(terms, everything)
    vectors = principal(price) if start is None else start
    history = [objective(terms, vectors, high)]
    for _ in range(steps):
        price, found, value = _step(terms, price, vectors, high, history[-1])
        if not value < history[-1] - _SMALL * scale:
            break
        vectors = found
        history.append(value)
    return vectors, history


def _step(
    terms: Sequence[Term], price: Tensor, vectors: Tensor, high: int, before: float
) -> tuple[Tensor, Tensor, float]:
    """The next prices, their eigenvectors and the objective; steps that go up are halved."""
    aim = _linearised(terms, _projector(vectors, high))
    for halving in range(_HALVINGS + 1):
        blend = 0.5**halving
        trial = blend * aim + (1 - blend) * price
        found = principal(trial)
        value = objective(terms, found, high)
        if value < before:
            break
    return trial, found, value


def _linearised(terms: Sequence[Term], projector: Tensor) -> Tensor:
    """The gradient of the objective with respect to P P^T, [B, D, D]."""
    total = torch.zeros((), dtype=torch.float64)
    for term in terms:
        a, e = term.traces(projector)
        total = total + e * term.activation + a * term.energy
    return total


def _projector(vectors: Tensor, high: int) -> Tensor:
    """P P^T of the low slices: all but the last `high` columns."""
    low = vectors[..., : vectors.shape[-1] - high]
    return low @ low.mT


def channel_order(activation: Tensor, price: Tensor, high: int, steps: int = STEPS) -> Tensor:
    """The same choice among channels as they are, where no basis can be fused: int64 [K], ascending
    importance, so that rounding all but the last `high` loses least.

    activation, price: float64 [K], diagonals of A and E.
    """
    low = torch.ones_like(activation)
    order, best = activation.argsort(), float("inf")
    for _ in range(steps):
        found = ((low @ price) * activation + (low @ activation) * price).argsort(stable=True)
        low = torch.ones_like(activation).index_fill_(0, found[len(found) - high :], 0.0)
        value = float((low @ activation) * (low @ price))
        if not value < best:
            break
        order, best = found, value
    return order
