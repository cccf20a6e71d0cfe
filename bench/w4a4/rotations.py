"""The baselines' bases, from the statistics of the folded model.

Written from the papers and not taken from `quantlib.transforms.bases`: what is compared should not
share the code it is compared through. Bases have their columns in ascending importance, so the
slice that is kept at 8 bits is the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantlib.bench.w4a4.sites import Site, weight
from quantlib.bench.w4a4.statistics import Statistics
from quantlib.transforms import hadamard
from quantlib.transforms.wiring import Attention

PCA_DAMPING = 0.01
"""Added to the diagonal, in parts of its mean, before the eigendecomposition (ResQ's code)."""


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Uniformly random orthogonal float64 [n, n]: QR of a Gaussian, signs fixed."""
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.sgn(r.diagonal())


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix (in blocks, where none of order n has a construction) behind random signs,
    float64 [n, n] orthonormal: QuaRot's residual basis."""
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    return signs[:, None] * fixed_hadamard(n)


def fixed_hadamard(n: int) -> Tensor:
    """The same without signs."""
    size = hadamard.block_size(n)
    return torch.block_diag(*[hadamard.hadamard(size)] * (n // size))


def ascending(moment: Tensor) -> Tensor:
    """Eigenvectors of a symmetric [..., n, n] as columns, smallest eigenvalue first, float64."""
    damped = moment.double().clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal += PCA_DAMPING * diagonal.mean(-1, keepdim=True)
    return torch.linalg.eigh(damped).eigenvectors


def mixing(n: int, high: int, generator: torch.Generator) -> Tensor:
    """ResQ's R = blockdiag(R_l, R_h): each slice mixed in itself, float64 [n, n]."""
    low = random_orthogonal(n - high, generator)
    return torch.block_diag(low, random_orthogonal(high, generator)) if high else low


def stream_moment(sites: tuple[Site, ...], statistics: Statistics, stream: str) -> Tensor:
    """ResQ's U_A objective: the mean over a stream's sites of E[x x^T], float64 [D, D].

    Inputs behind norms without gain have the same energy, so every site weighs alike.
    """
    own = [s for s in sites if s.stream is not None and s.stream.name == stream]
    moments = [statistics.inputs[site.name].second.double() for site in own]
    return torch.stack(moments).mean(0)


def stream_moment_with_weights(
    sites: tuple[Site, ...], statistics: Statistics, stream: str, model: nn.Module
) -> Tensor:
    """CoQuant's objective, for one basis shared by all layers: the mean over sites of Sx / tr Sx +
    Sw / tr Sw, with Sw the sum of W^T W of a site's readers (gains folded: `model` is folded).

    The lambdas of its code reduce to these, as their common factor cancels.
    """
    total = torch.zeros(())
    for site in sites:
        if site.stream is None or site.stream.name != stream:
            continue
        inputs = statistics.inputs[site.name].second.double()
        matrices = [weight(model, reader).double() for reader in site.readers]
        energy = torch.stack([matrix.T @ matrix for matrix in matrices]).sum(0)
        total = total + inputs / inputs.trace() + energy / energy.trace()
    return total


def value_bases(attention: Attention, statistics: Statistics, mix: Tensor) -> Tensor:
    """U_B of every KV head [H_kv, d, d]: PCA of its values, then the shared mixing."""
    basis = ascending(statistics.heads[attention.name].value)
    return basis @ mix


def key_basis(attention: Attention, statistics: Statistics, mix: Tensor) -> Tensor:
    """U_C of an attention [d, d]: PCA of its keys behind RoPE, averaged over KV heads."""
    basis = ascending(statistics.heads[attention.name].key.double().mean(0))
    return basis @ mix
