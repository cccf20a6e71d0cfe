"""torch's own linear on a dense weight: bfloat16 (oneDNN with AVX512-BF16 where there is one) or
float32."""

from __future__ import annotations

import torch
from torch.nn import functional

from quantlib.bench.peers.linear import Bind, copies
from quantlib.bench.timing import Candidate


def prepare(dtype: str, rows: int, columns: int) -> Bind:
    """See `LinearPeer`. dtype: of weight, input and output."""
    kind: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(kind)
    weights = copies(weight.clone, weight.nbytes)

    def bind(tokens: int) -> Candidate:
        x = torch.randn(tokens, columns, generator=generator).to(kind)
        return lambda index: functional.linear(x, weights[index % len(weights)])

    return bind
