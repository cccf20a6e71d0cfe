"""Directions by importance become a rotation: slices are mixed, so that no entry stands out.

One scale spans a slice of a token, so the entries of a slice should be of one size. An orthogonal
matrix inside the slice does that and keeps the slice; it may not cross a boundary between a low and
a high slice of any consumer. The residual stream is shared, so with different ranks in different
layers it is mixed between all their boundaries (`cuts`). Every further cut costs: a low slice that
is mixed in parts has the scale of its largest part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from quantlib.errors import TransformError
from quantlib.transforms import hadamard
from quantlib.transforms.bases import HIGH_SHARE, Bases, high_columns
from quantlib.transforms.rotation import Rotation
from quantlib.transforms.wiring import DECODER, ENCODER, Attention, Wiring

Mixer = Callable[[int, torch.Generator], Tensor]
"""mixer(n, generator): orthogonal float64 [n, n]."""


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Uniform over the orthogonal group, float64 [n, n]: QR of Gaussians with the signs of R's
    diagonal taken out (Mezzadri, 2007)."""
    normal = torch.randn(size, size, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(normal)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def random_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix with random signs of its rows, float64 [n, n]; every direction is spread
    over all entries alike. Where there is none of this order, uniform."""
    if not hadamard.exists(size):
        return random_orthogonal(size, generator)
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return signs * hadamard.hadamard(size)


MIXERS: Mapping[str, Mixer] = {"random": random_orthogonal, "hadamard": random_hadamard}
"""ResQ's, and QuaRot's."""


def mixing(size: int, cuts: Iterable[int], mixer: Mixer, generator: torch.Generator) -> Tensor:
    """Orthogonal [size, size] that mixes columns between neighbouring cuts only.

    cuts: columns at which a slice may begin; 0 and `size` are understood.
    """
    edges = sorted({0, size, *cuts})
    if edges[0] < 0 or edges[-1] > size:
        raise TransformError(f"slices of {size} columns cannot begin at {edges[0]}..{edges[-1]}")
    return torch.block_diag(*(mixer(b - a, generator) for a, b in itertools.pairwise(edges)))


def rotation_of(
    bases: Bases,
    wiring: Wiring,
    seed: int,
    shares: Sequence[Fraction] = (HIGH_SHARE,),
    value_cuts: Sequence[int] | None = None,
    key_cuts: Sequence[int] | None = None,
    mixer: str = "random",
    hidden: bool = True,
    hidden_order: Mapping[str, Tensor] | None = None,
    hidden_high: Mapping[str, int] | None = None,
    block: int | None = None,
) -> Rotation:
    """The bases with slices mixed, and Hadamard matrices before down projections.

    shares:     of wide columns that linears reading a residual stream use (0 and 1 need no cut).
    value_cuts: numbers of wide columns of a head, of values and of output projections' inputs; by
                default those of `shares`. key_cuts: likewise, of keys.
    mixer:      one of MIXERS. One draw serves all heads of one size, as in ResQ.
    hidden:     with Hadamard matrices (in blocks, where the width has none).
    hidden_order, hidden_high: of the Rotation; Hadamard matrices get the size that the columns have
                which they do not leave alone.
    block:      mix the residual stream and hidden layers within runs of so many columns only: for
                formats whose scales span no more.
    """
    mix = MIXERS[mixer]
    generator = torch.Generator().manual_seed(seed)
    streams = {}
    for name, vectors in bases.residual.items():
        width = vectors.shape[-1]
        cuts = [width - high_columns(width, share) for share in shares]
        cuts += range(0, width, block or width)
        streams[name] = vectors @ mixing(width, cuts, mix, generator)
    high = hidden_high or {}
    sizes = {h.name: _hadamard_size(h.width, high.get(h.name, 0), block) for h in wiring.hiddens}
    drawn: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def mixed(vectors: Tensor, cuts: Sequence[int] | None) -> Tensor:
        size = vectors.shape[-1]
        own = tuple(head_cuts(size, shares) if cuts is None else cuts)
        if (size, own) not in drawn:
            drawn[size, own] = mixing(size, own, mix, generator)
        return vectors @ drawn[size, own]

    return Rotation(
        residual=streams.get(DECODER),
        value={name: mixed(vectors, value_cuts) for name, vectors in bases.value.items()},
        key={name: mixed(vectors, key_cuts) for name, vectors in bases.key.items()},
        hidden=sizes if hidden else {},
        encoder=streams.get(ENCODER),
        fold_norms=True,
        hidden_order=hidden_order or {},
        hidden_high=high,
    )


def _hadamard_size(width: int, high: int, block: int | None) -> int:
    """All columns get the largest matrix there is; what is left of them may have any number."""
    if block is not None and hadamard.covers(block, width - high):
        return block
    return hadamard.quick_size(width - high) if high else hadamard.block_size(width)


def head_cuts(head_dim: int, shares: Iterable[Fraction]) -> list[int]:
    """Wide columns of a head for each share, in ascending order."""
    return sorted({int(head_dim * share) for share in shares})


def output_order(attention: Attention, cuts: Sequence[int]) -> Tensor:
    """The order in which an output projection reads its input, int64 [H * d]: `x[..., order]`.

    A head's wide columns come first, a linear's last. Between two cuts (wide columns of a head) the
    columns of all heads stand together, those of the last slice first: so whichever cut is the
    boundary, all low columns come before all high ones.
    """
    d = attention.head_dim
    edges = sorted({0, d, *cuts})
    columns = torch.arange(attention.heads * d).reshape(attention.heads, d)
    parts = [columns[:, a:b].reshape(-1) for a, b in itertools.pairwise(edges)]
    return torch.cat(parts[::-1])
