"""How much of an activation's range to keep: clip factors chosen for the outputs they change.

A token's scale follows from its largest number. Keeping less of the range makes every other number
of the token finer and saturates the largest, which pays at few bits. The cost is taken where it
counts: with e the rounding error of a token's inputs, its outputs move by W e, and the cost is
w_t e^T S e with S = sum_n f_n W_n W_n^T over the outputs n of all weights that read these inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats.activation import ActivationSegment, fake_quantize, with_clips

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
"""Shares of the range that are tried."""


def choose_clips(
    inputs: Tensor,
    segments: Sequence[ActivationSegment],
    cost: Tensor,
    token_weight: Tensor,
) -> tuple[float, ...]:
    """The clip factor of each segment with the least cost; 1 for segments that are not rounded.

    inputs: tokens before rounding, [T, K]; cost: S, [K, K]; token_weight: [T]. Segments are decided
    one by one: their rounding errors have nothing to do with each other. Raises RoundingError on
    shapes that disagree, inf or nan.
    """
    width = inputs.shape[-1]
    if cost.shape != (width, width) or token_weight.shape != inputs.shape[:1]:
        raise RoundingError(
            f"inputs {list(inputs.shape)} need a cost of [{width}, {width}] and a weight for each "
            f"token, not {list(cost.shape)} and {list(token_weight.shape)}"
        )
    if not bool(torch.isfinite(inputs).all() and torch.isfinite(cost).all()):
        raise RoundingError("inputs to choose clip factors by hold inf or nan: calibrate again")
    return tuple(_best_clip(inputs, segment, cost, token_weight) for segment in segments)


def _best_clip(
    inputs: Tensor, segment: ActivationSegment, cost: Tensor, token_weight: Tensor
) -> float:
    if not segment.format.rounds:
        return 1.0
    columns = slice(segment.start, segment.start + segment.length)
    x, own = inputs[:, columns].to(torch.float32), cost[columns, columns].to(torch.float32)
    alone = ActivationSegment(0, segment.length, segment.format)
    costs = []
    for clip in CLIPS:
        error = fake_quantize(x, with_clips([alone], [clip])) - x
        costs.append(float((((error @ own) * error).sum(1) * token_weight).sum()))
    return CLIPS[costs.index(min(costs))]
