"""The rows of a ModelMap: weights to quantize, the groups they form, what is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """One matrix `[N, K]`, or stack of matrices `[E, N, K]`, to quantize; K is summed over.

    name:      parameter name; `source.read(name)` reads it.
    module:    the module that owns it.
    kind:      "linear", "embedding" `[vocabulary, K]`, "head", "experts", or "conv": a convolution
               of N filters, whose K are the channels and the window they read.
    component: part of the model that budgets, floors and reports speak of ("language_model",
               "embeddings", ...).
    block:     the repeated block it is in, None outside blocks.
    group:     name of its LinearGroup.
    aliases:   other parameter names of the same tensor (the head of a tied embedding).
    head:      of a tied embedding: the module that multiplies by it as the output head.
    dtype:     as stored on disk ("BF16"); nbytes its size there.
    tensor_shape: of the parameter, where it is not `shape`: a convolution's
               `[N, channels, *window]`.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    kind: str
    component: str
    block: str | None
    group: str
    dtype: str
    nbytes: int
    aliases: tuple[str, ...] = ()
    head: str | None = None
    tensor_shape: tuple[int, ...] = ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the parameter, as the module and the files have it."""
        return self.tensor_shape or self.shape

    def matrix(self, tensor: Tensor) -> Tensor:
        """The parameter, or anything of its shape, as it is rounded: of `shape`."""
        return tensor.reshape(self.shape)

    def tensor(self, matrix: Tensor) -> Tensor:
        """Inverse of `matrix`: as the module holds it."""
        return matrix.reshape(self.stored_shape)

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def out_features(self) -> int:
        """N: rows of a matrix (the vocabulary, for an embedding)."""
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        """K: the axis that groups of scales run along."""
        return self.shape[-1]

    @property
    def experts(self) -> int:
        """E: matrices in the stack, 1 for a plain matrix."""
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(frozen=True)
class LinearGroup:
    """Weights that read one input: they share statistics, and a scheme where engines fuse them.

    members:      names of Weights, in the order an engine would fuse them.
    kind:         of its members.
    fused:        inference engines run the members as one matrix product.
    input_module: the module whose first input is the members' x; the head module for a tied
                  embedding. None when no module reads it from outside: an untied embedding reads
                  token ids, an expert's down projection reads what its own module computes.
    """

    name: str
    component: str
    block: str | None
    members: tuple[str, ...]
    kind: str
    fused: bool
    input_module: str | None


@dataclass(frozen=True)
class Stack:
    """Repeated blocks of one component, in the order of the module."""

    component: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Kept:
    """A parameter (or stored buffer) left in the dtype of the source, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str
    component: str
    block: str | None
    dtype: str
    nbytes: int
    aliases: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class CoverageRow:
    """One parameter of the coverage table: `group` is "" when it is kept, `bytes` are on disk."""

    component: str
    group: str
    name: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    role: str


@dataclass(frozen=True)
class ComponentSummary:
    """A component's size; `share` is its fraction of the model's bytes."""

    name: str
    parameters: int
    bytes: int
    share: float
