"""Memory that kernels share sums in: one buffer for each stream of each device, of one size.

A launch allocates nothing: it divides its work so that its partial sums fit. The buffer is made
when a stream is first used; kernels of one stream run one after the other, so they can share it,
and a captured graph finds it where it was.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

BYTES = 64 << 20
"""Of the buffer of partial sums: those of 4 splits of 64 tokens by 65536 rows."""
FLAGS = 4096
"""Of blocks that wait for each other; int32, zero between launches."""

_lock = threading.Lock()
_made: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def partial_sums(device: torch.device) -> Tensor:
    """float32 [BYTES / 4] of the current stream, with whatever is in it."""
    return _of_stream(device)[0]


def flags(device: torch.device) -> Tensor:
    """int32 [FLAGS] of the current stream, zero: whoever sets one sets it back."""
    return _of_stream(device)[1]


def _of_stream(device: torch.device) -> tuple[Tensor, Tensor]:
    # Threads take the place of streams where there are none.
    cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if cuda else threading.get_ident()
    key = (device, stream)
    with _lock:
        if key not in _made:
            sums = torch.empty(BYTES // 4, dtype=torch.float32, device=device)
            _made[key] = sums, torch.zeros(FLAGS, dtype=torch.int32, device=device)
        return _made[key]
