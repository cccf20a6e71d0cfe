"""Where a model's linears get their inputs: the places at which activations are rounded.

All linears that read one vector are one `Site`. They come from the wiring of `quantlib.transforms`,
so one list serves Llama-like decoders and Whisper. Embeddings and the output head are no sites:
every method here keeps them, as ResQ and its baselines do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from quantlib.transforms.wiring import Attention, Hidden, Matrix, Norm, Stream, Wiring

Kind = Literal["residual", "output", "hidden"]


@dataclass(frozen=True)
class Site:
    """One input and its readers.

    name: the first reader's parameter.
    kind: behind a norm of the residual stream, in front of an output projection, or of a down
          projection; `norm` and `stream`, `attention` or `hidden` say which.
    """

    name: str
    kind: Kind
    readers: tuple[Matrix, ...]
    width: int
    stream: Stream | None = None
    norm: Norm | None = None
    attention: Attention | None = None
    hidden: Hidden | None = None


def sites_of(wiring: Wiring) -> tuple[Site, ...]:
    """Every site of a model's blocks. Raises ValueError for experts, which no baseline here has."""
    inside = tuple(f"{block}." for block in wiring.blocks)
    found = []
    for stream in wiring.streams:
        for norm in stream.norms:
            readers = tuple(r for r in norm.readers if r.weight.startswith(inside))
            if readers:
                found.append(
                    Site(readers[0].weight, "residual", readers, stream.width, stream, norm)
                )
    for attention in wiring.attentions:
        width = attention.heads * attention.head_dim
        output = attention.output
        found.append(Site(output.weight, "output", (output,), width, attention=attention))
    for hidden in wiring.hiddens:
        if hidden.inner:
            raise ValueError(f"{hidden.name} has experts: the baselines are of dense models")
        down = hidden.down
        found.append(Site(down.weight, "hidden", (down,), hidden.width, hidden=hidden))
    return tuple(found)


def linear(model: nn.Module, matrix: Matrix) -> nn.Module:
    """The module that a matrix is the weight of."""
    return model.get_submodule(matrix.weight.rpartition(".")[0])


def weight(model: nn.Module, matrix: Matrix) -> Tensor:
    """The weight's own storage, [N, K]."""
    return model.get_parameter(matrix.weight).data


def cached(wiring: Wiring, attention: Attention) -> bool:
    """Whether the attention's keys and values are kept in a cache: not in an encoder's blocks."""
    return attention in wiring.cached


def head_order(heads: int, head_dim: int, high: int) -> Tensor:
    """Columns of an output projection's input with the last `high` of every head at the end:
    int64 [heads * head_dim], low columns head by head, then high ones."""
    columns = torch.arange(heads * head_dim).view(heads, head_dim)
    split = head_dim - high
    return torch.cat([columns[:, :split].flatten(), columns[:, split:].flatten()])
