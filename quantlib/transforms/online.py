"""What of a rotation cannot be in the weights: hooks that apply it while the model runs.

- Hadamard matrices before down projections, over all their columns or the first ones.
- Means of hidden layers, which are subtracted before that.
- Bases of queries and keys after the rotary embedding (`attention.py`).
- A tied embedding's table stays as it is, since the head reads it in another way: the basis is
  applied to what it puts out, and undone before the final norm, which keeps its gain.
- A stream that begins behind something non-linear (a convolution and its activation) is rotated
  where it enters the first block.
- Norms that subtract the mean, in a rotated stream: the mean is out already (`changes.py`), and the
  mean of rotated coordinates is not the mean; `RootMeanSquare` takes their place.

Hooks hold no parameters: names and shapes of the module stay, so a map of the rotated model is a
map of the original.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from quantlib.errors import TransformError
from quantlib.transforms.attention import ATTRIBUTE, AttentionState, attach_attention
from quantlib.transforms.changes import Basis, hidden_blocks, turn, written
from quantlib.transforms.rotation import Rotation
from quantlib.transforms.wiring import Stream, Wiring

EXPERTS = "quantlib"
"""Name of `experts_forward` among transformers' implementations of experts."""

_MARK = "quantlib_rotation"


def attach(model: PreTrainedModel, wiring: Wiring, rotation: Rotation) -> None:
    """Add to `model` (on meta or filled) what its rotated parameters need beside them.

    Do it once; modules that are replaced afterwards lose it. Raises TransformError when the
    rotation does not belong to the model, or the model has one already.
    """
    rotation.check(wiring)
    refuse_twice(model)
    setattr(model, _MARK, rotation.online(wiring))
    for stream in wiring.streams:
        basis = rotation.basis(stream.name)
        if basis is not None:
            _attach_stream(model, stream, basis)
    for site in wiring.hiddens:
        blocks, mean = hidden_blocks(site, rotation), rotation.hidden_mean(site)
        module = model.get_submodule(site.module)
        if mean is not None:
            module.register_forward_pre_hook(Shift(-mean).first_argument)
        if blocks is None:
            continue
        if site.inner:
            _turn_experts(module, Turn(blocks))
        else:
            module.register_forward_pre_hook(Turn(blocks).first_argument)
    states = {
        attention.module: _with_key_basis(model, attention.module, rotation.key[attention.name])
        for attention in wiring.attentions
        if attention.name in rotation.key
    }
    if states:
        attach_attention(model, states)


def _with_key_basis(model: nn.Module, module: str, basis: Tensor) -> AttentionState:
    """What the attention does already, in this basis too."""
    state: AttentionState | None = getattr(model.get_submodule(module), ATTRIBUTE, None)
    return replace(state or AttentionState(), key_basis=basis.float())


def attached(model: nn.Module) -> Rotation | None:
    """What `attach` added to the model: the online part of its rotation; None without one."""
    rotation: Rotation | None = getattr(model, _MARK, None)
    return rotation


def refuse_twice(model: nn.Module) -> None:
    """Raise TransformError when a rotation is attached to the model."""
    if attached(model) is not None:
        raise TransformError("this model has been rotated already: load it again.")


def _attach_stream(model: nn.Module, stream: Stream, basis: Tensor) -> None:
    into = Turn(written(stream, basis))
    for name, place in stream.enters:
        module = model.get_submodule(name)
        if place == "output":
            module.register_forward_hook(into.output)
        else:
            module.register_forward_pre_hook(into.first_argument)
    if stream.leaves is not None:
        out = Turn(basis.double().T)
        model.get_submodule(stream.leaves).register_forward_pre_hook(out.first_argument)
    if stream.centred:
        for norm in stream.norms:
            parent, _, leaf = norm.name.rpartition(".")
            old = model.get_submodule(norm.name)
            setattr(model.get_submodule(parent), leaf, RootMeanSquare.of(old))


class Turn:
    """Multiplies by a basis, in the dtype and on the device of what it is given.

    Its methods are forward hooks; an object and no closure, so that models can be copied.
    """

    def __init__(self, basis: Basis) -> None:
        self.basis = basis

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.basis, Tensor) and (
            self.basis.dtype != x.dtype or self.basis.device != x.device
        ):
            self.basis = self.basis.to(x)  # once: the dtype of a model rarely changes
        return turn(x, self.basis)

    def first_argument(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook."""
        return self(args[0]), *args[1:]

    def output(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        """A forward hook."""
        return self(output)


class Shift:
    """Adds a vector [K], in the dtype and on the device of what it is given; hooks as `Turn`'s."""

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector

    def first_argument(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook."""
        x = args[0]
        if self.vector.dtype != x.dtype or self.vector.device != x.device:
            self.vector = self.vector.to(x)
        return x + self.vector, *args[1:]


class RootMeanSquare(nn.Module):
    """A LayerNorm for inputs without mean: x / sqrt(mean(x^2) + eps) * weight + bias."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.eps = eps

    @staticmethod
    def of(norm: nn.Module) -> RootMeanSquare:
        """In place of this norm, with its parameters. Raises TransformError for other norms."""
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            raise TransformError(
                f"a {type(norm).__name__} stands where a LayerNorm with gain and bias was "
                "expected: this model cannot be rotated."
            )
        return RootMeanSquare(norm.weight, norm.bias, norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps) + self.bias


def _turn_experts(module: Any, hadamard: Turn) -> None:
    """Rotate what stands between the two matrices of every expert of this module.

    transformers calls `_apply_gate` there, except in the forward that is a model's own ("eager"),
    which `experts_forward` replaces. Packed experts call what their attribute `gate` is.
    """
    if hasattr(module, "_apply_gate") and hasattr(module, "config"):
        module._apply_gate = GateThenTurn(module._apply_gate, hadamard)
        if EXPERTS not in ALL_EXPERTS_FUNCTIONS:
            ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
        module.config._experts_implementation = EXPERTS
    elif callable(getattr(module, "gate", None)):
        module.gate = GateThenTurn(module.gate, hadamard)
    else:
        raise TransformError(
            f"{type(module).__name__} has no gate that can be followed by a rotation: leave the "
            "hidden layers of its experts as they are."
        )


class GateThenTurn:
    """An expert module's gate with a rotation behind it."""

    def __init__(self, gate: Callable[[Tensor], Tensor], hadamard: Turn) -> None:
        self.gate = gate
        self.hadamard = hadamard

    def __call__(self, x: Tensor) -> Tensor:
        return self.hadamard(self.gate(x))


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts one by one: hidden_states [T, D]; top_k_index, top_k_weights [T, k]; -> [T, D].

    Weights are transformers': `gate_up_proj` [E, 2I, D], `down_proj` [E, D, I]; the index E means
    no expert.
    """
    out = torch.zeros_like(hidden_states)
    for expert in torch.unique(top_k_index).tolist():
        if expert >= module.num_experts:
            continue
        token, position = torch.where(top_k_index == expert)
        hidden = nn.functional.linear(hidden_states[token], module.gate_up_proj[expert])
        y = nn.functional.linear(module._apply_gate(hidden), module.down_proj[expert])
        out = out.index_add(0, token, (y * top_k_weights[token, position, None]).to(out.dtype))
    return out
