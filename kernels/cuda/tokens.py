"""Rounds inputs and lays them out for kernel (b), in torch: what the fused quantizer must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.formats.activation import ActivationSegment, quantize, scale_columns
from quantlib.kernels.cuda.integer_layout import pack_tokens
from quantlib.kernels.cuda.segmented import Layout, LayoutSegment, Tokens

PADDING = 4
"""Of tokens in `Tokens.meta`: 16 bytes."""


def pack(x: Tensor, layout: Layout, activations: Sequence[ActivationSegment]) -> Tokens:
    """x [M, K], rounded as the segments say (`formats.activation`), in the layout."""
    codes, scales = quantize(x, activations)
    firsts = torch.tensor([columns.start for columns in scale_columns(activations)])
    parts, meta = [], []
    for part in layout.segments:
        own = codes[:, part.start : part.start + part.length]
        spans, size = part.case.spans, part.case.span_columns
        starts = part.start + torch.arange(spans) * size
        # Spans in the padding have the segment's last scale, and codes 0.
        last = part.start + part.length - 1
        index = torch.searchsorted(firsts, starts.clamp(max=last), right=True) - 1
        zero = _zeros(own, part)
        by_span = functional.pad(own, (0, spans * size - part.length)).unflatten(1, (spans, size))
        scale = scales[:, index]
        planes = [scale.view(torch.int32)]
        if layout.any_zeros:
            planes.append((scale * by_span.sum(-1).to(torch.float32)).view(torch.int32))
        if layout.any_unsigned:
            group = part.activation.group or part.length
            at = ((starts - part.start) // group).clamp(max=zero.shape[1] - 1)
            planes.append(zero[:, at])
            own = own + _by_column(zero, group, part.length)
        parts.append(pack_tokens(own.to(torch.int8), part.case.kind))
        meta.append(torch.stack(planes))
    joined = torch.cat(meta, -1).permute(2, 0, 1)  # [spans, planes, M]
    padded = functional.pad(joined, (0, -len(x) % PADDING))
    return Tokens(len(x), torch.cat(parts, 1).contiguous(), padded.contiguous())


def _zeros(codes: Tensor, part: LayoutSegment) -> Tensor:
    """int32 [M, groups]: the zero points that rounding has taken off, for unsigned nibbles; else 0.

    The smallest number of a group has the code 0 before, unless all are positive: then there is
    none to take off.
    """
    group = part.activation.group or part.length
    groups = -(-part.length // group)
    padded = functional.pad(codes, (0, groups * group - part.length)).unflatten(1, (groups, group))
    least = padded.amin(-1).to(torch.int32).clamp(max=0)
    return -least if part.case.kind.unsigned else torch.zeros_like(least)


def _by_column(zero: Tensor, group: int, length: int) -> Tensor:
    return zero.repeat_interleave(group, 1)[:, :length]
