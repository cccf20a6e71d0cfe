"""torch's int4 weight-only linear for the CPU: asymmetric, bfloat16 activations, groups of 128."""

from __future__ import annotations

import torch

from quantlib.bench.peers.linear import Bind, PeerMissing, copies
from quantlib.bench.timing import Candidate

_GROUPS = (128, 64, 32)


def prepare(rows: int, columns: int) -> Bind:
    """See `LinearPeer`. Takes the largest group that divides K: the kernel knows no shorter one."""
    group = next((size for size in _GROUPS if columns % size == 0), None)
    if group is None:
        raise PeerMissing(f"torch int4pack has no group size that divides K = {columns}")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.int32)
    scales = torch.rand(columns // group, rows, 2, generator=generator).bfloat16()
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (AttributeError, RuntimeError) as error:
        raise PeerMissing(f"torch cannot pack a {rows} x {columns} int4 weight: {error}") from error
    weights = copies(packed.clone, packed.nbytes)

    def bind(tokens: int) -> Candidate:
        x = torch.randn(tokens, columns, generator=generator).bfloat16()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return lambda index: multiply(x, weights[index % len(weights)], group, scales)

    return bind
