"""Canonical factors of a convolution: filters as sums of products of vectors (CP, parafac).

Filters [N, channels, *window] become sum_r u_r x d_r x s_r x t_r, one vector for the filters, one
for the channels and one for every axis of the window, by alternating least squares: with all
vectors but those of one axis held, the best of that axis solve a linear system. As the loss is not
plain squares, filters are weighed by what their errors cost and channels by how strong their inputs
are, which keeps the products; what H knows beyond its diagonal is left to the last factor, which
`lowrank.py` fits under all of it. The first guess takes the directions of the weighed filters that
hold most (their singular vectors), and of each the best single product.

After Mixed-TD (FPL 2023), where every convolution chooses between such factors and SVD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SWEEPS = 60
_SETTLED = 1e-5
"""Relative change of the loss in a sweep at which it is over."""
_RIDGE = 1e-7
"""Of the mean diagonal of a sweep's systems: vectors may become parallel."""


def canonical_factors(
    weight: Tensor, rank: int, window: Sequence[int], rows: Tensor, strength: Tensor
) -> list[Tensor]:
    """The vectors of `rank` products near a weight [N, K], K channels times window: float64
    [rank, channels], and [rank, size] for every axis of the window; of the first the lengths are
    those of the products' share in the weight, all others have length 1.

    rows: [N] or [1], what a squared error of a filter costs; strength: [K], mean squares of the
    inputs.
    """
    count, columns = weight.shape
    shape = (count, columns // torch.Size(window).numel(), *window)
    by_channel = strength.double().view(shape[1:]).flatten(1).mean(1).clamp(min=1e-20).sqrt()
    weighed = (rows.double().clamp(min=0).sqrt()[:, None] * weight.double()).view(shape)
    weighed = weighed * by_channel.view(1, -1, *[1] * len(window))
    factors = _first_guess(weighed, rank)
    before = torch.inf
    for _ in range(SWEEPS):
        for axis in range(weighed.dim()):
            factors[axis] = _solved(weighed, factors, axis)
            if axis:
                factors[axis] = factors[axis] / factors[axis].norm(dim=1, keepdim=True).clamp(
                    min=1e-30
                )
        factors[0] = _solved(weighed, factors, 0)
        left = float((weighed.flatten(1) - factors[0].T @ _product(factors[1:])).square().sum())
        if not left < before * (1 - _SETTLED):
            break
        before = left
    lengths = factors[0].norm(dim=1, keepdim=True)
    return [factors[1] * lengths / by_channel, *factors[2:]]


def _product(vectors: Sequence[Tensor]) -> Tensor:
    """[rank, all sizes multiplied]: the product of every rank's vectors."""
    found = vectors[0]
    for own in vectors[1:]:
        found = (found[:, :, None] * own[:, None]).flatten(1)
    return found


def _solved(tensor: Tensor, factors: Sequence[Tensor], axis: int) -> Tensor:
    """The vectors [rank, size] of one axis that are best with all others as they are."""
    others = [own for index, own in enumerate(factors) if index != axis]
    gram = torch.stack([own @ own.T for own in others]).prod(0)
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp(min=1e-30))
    unfolded = tensor.movedim(axis, 0).flatten(1)
    return torch.linalg.solve(gram, _product(others) @ unfolded.T)


def _first_guess(tensor: Tensor, rank: int) -> list[Tensor]:
    """For every axis [rank, size]: of the directions that hold most of the filters, the best single
    products."""
    count = len(tensor)
    _, _, directions = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
    directions = directions[:rank].view(rank, *tensor.shape[1:])
    factors: list[Tensor] = [torch.ones(rank, count, dtype=torch.float64)]
    for axis in range(1, tensor.dim()):
        unfolded = directions.movedim(axis, 1).flatten(2)
        factors.append(torch.linalg.svd(unfolded, full_matrices=False)[0][:, :, 0])
    return factors
