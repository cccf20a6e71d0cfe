"""Quantized modules: a linear, an embedding, a head tied to it, and the experts of a mixture.

Each one takes the place of a torch or transformers module, keeps that module's call, and holds
packed weights, or their tiles, and nothing else (`packed_module.py`). No dense weight is ever kept:
`dequantize()` makes one for whoever asks, and forgets it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quantlib.kernels.ops import embedding
from quantlib.runtime.packed_module import (
    SCHEME,
    PackedModule,
    Segments,
    check_mode,
    multiply,
)


class PackedLinear(PackedModule):
    """Base of linears on packed weights: `nn.Linear`'s fields. Output dtype: the input's."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        mode: str = SCHEME,
    ) -> None:
        super().__init__(mode)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)


class QuantizedLinear(PackedLinear):
    """`nn.Linear` on a packed weight `[out_features, in_features]`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        segments: Segments,
        bias: nn.Parameter | None = None,
        mode: str = SCHEME,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, mode)
        self.register_packed("weight", (out_features, in_features), segments, device)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply("weight", x, self.bias)


class PackedEmbedding(PackedModule, ABC):
    """Base of embeddings on packed weights, which can be a head's weight too.

    dtype:       of the output; it follows the model's casts.
    embed_scale: the constant that Gemma's scaled embeddings multiply their output by, rounded to
                 `dtype` first, as there. A number, not a buffer: no load has to initialize it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        embed_scale: float | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.embed_scale, self.dtype = embed_scale, dtype

    @abstractmethod
    def project(self, x: Tensor, bias: Tensor | None, mode: str) -> Tensor:
        """x [..., D] times the transposed weight, plus bias [V]: what a tied head computes."""

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows as the embedding hands them out, times the constant where there is one."""
        if self.embed_scale is None:
            return rows
        return rows * torch.tensor(self.embed_scale, dtype=self.dtype, device=rows.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class QuantizedEmbedding(PackedEmbedding):
    """`nn.Embedding` on a packed weight `[num_embeddings, embedding_dim]`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        segments: Segments,
        embed_scale: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, embed_scale, dtype)
        self.register_packed("weight", (num_embeddings, embedding_dim), segments, device)

    def forward(self, ids: Tensor) -> Tensor:
        return self.scaled(embedding(ids, self.handles("weight")[0], self.dtype))

    def project(self, x: Tensor, bias: Tensor | None, mode: str) -> Tensor:
        return multiply(x, self.handles("weight")[0], bias, mode, self.rounding("weight"))


class TiedHead(nn.Module):
    """A head whose weight is the embedding's: no tensor of its own (but a bias, if there is one).

    Its inputs are rounded as the weight's activations say, or in a mode of its own. The embedding
    sits in a tuple because `nn.Module` would otherwise register it as a child and name its buffers
    twice.
    """

    bias: nn.Parameter | None

    def __init__(
        self, source: PackedEmbedding, bias: nn.Parameter | None = None, mode: str = SCHEME
    ) -> None:
        super().__init__()
        self._source = (source,)
        check_mode(mode)
        self.mode = mode
        self.in_features, self.out_features = source.embedding_dim, source.num_embeddings
        self.register_parameter("bias", bias)

    @property
    def source(self) -> PackedEmbedding:
        """The embedding that owns the weight."""
        return self._source[0]

    def forward(self, x: Tensor) -> Tensor:
        # On the embedding's device, wherever the head's input is.
        device = self.source.packed_device(next(iter(self.source.packed_weights())))
        return self.source.project(x.to(device), self.bias, self.mode)

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, mode={self.mode}, tied to the embedding"


class QuantizedExperts(PackedModule):
    """Experts of a mixture layer: `gate_up_proj [E, 2I, H]`, `down_proj [E, H, I]`, packed or kept.

    Takes the place of the transformers modules that hold these two as 3-D parameters (Mixtral,
    Qwen3-MoE and kin), with their call: `(hidden_states [T, H], top_k_index [T, k], top_k_weights
    [T, k]) -> [T, H]`. Experts that no token chose are not touched; the index E means "no expert".
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        segments: Mapping[str, Segments],
        kept: Mapping[str, nn.Parameter],
        gate: Callable[[Tensor], Tensor],
        mode: str = SCHEME,
        device: torch.device | str | None = None,
    ) -> None:
        """Empty packed experts.

        shapes, segments: of those of gate_up_proj and down_proj that are packed.
        kept: the other one, if any.
        gate: `[t, 2I] -> [t, I]`; in most models the activation of one half times the other. It is
              kept under transformers' name, so that what is attached there is found here too.
        """
        super().__init__(mode)
        for name, shape in shapes.items():
            self.register_packed(name, shape, segments[name], device)
        for name, parameter in kept.items():
            self.register_parameter(name, parameter)
        self.num_experts = next(iter(shapes.values()))[0]
        self._apply_gate = gate

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:
                continue
            token, position = torch.where(top_k_index == expert)
            hidden = self._apply_gate(self._linear("gate_up_proj", hidden_states[token], expert))
            result = self._linear("down_proj", hidden, expert)
            result = result * top_k_weights[token, position, None]
            output.index_add_(0, token, result.to(output.dtype))
        return output

    def _linear(self, name: str, x: Tensor, expert: int) -> Tensor:
        if name in self._shapes:
            return self.multiply(name, x, matrix=expert)
        return nn.functional.linear(x, self.get_parameter(name)[expert])


def set_mode(model: nn.Module, mode: str) -> None:
    """Run every quantized module of `model` in `mode`.

    "scheme" rounds inputs as each weight's scheme says, "exact" takes them as they are, "int8"
    rounds them to 8 bits per token, "int8g128" per token and 128 columns. Raises UsageError for
    another mode.
    """
    check_mode(mode)
    for module in model.modules():
        if isinstance(module, PackedModule | TiedHead):
            module.mode = mode


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """The modules of `model` that own packed weights, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, PackedModule)
    }


def packed_weights(model: nn.Module) -> dict[str, tuple[tuple[int, ...], Segments]]:
    """Shape and segments of every packed weight of `model`, by the weight's name."""
    return {
        f"{module_name}.{name}": described
        for module_name, module in packed_modules(model).items()
        for name, described in module.packed_weights().items()
    }
