"""Attention on rotated queries and keys, and on keys and values as a packed KV cache keeps them.

Two things of an attention layer cannot be fused into its weights: a basis for queries and keys that
is applied after the rotary embedding, and the rounding of what goes into the KV cache. Both happen
here, in an attention function that transformers calls with queries, keys and values (after RoPE)
and that hands what it made of them to transformers' own function, which knows masks, scales,
soft-capping and grouped heads. It is registered twice, because a mask has the form that the
function behind it wants: "quantlib" ends in sdpa, "quantlib_eager" in the `eager_attention_forward`
of the model's own file (Gemma 2's soft-capping exists only there).

What a layer does is its module's attribute `quantlib_attention`, an `AttentionState`; a module
without one computes exactly what it did before. That holds for decoder, encoder and cross attention
alike, because nothing here asks where keys come from.

With a cache of transformers, keys and values come here as the cache returns them: it keeps them
unrounded, and all of them are rounded again at every step. Since every token and head is rounded on
its own, the numbers are those of a packed cache; the memory and the time are not. Keys that come
from a packed cache (`PACKED`) are attended to by that. The first
positions of a sequence (`sinks`) are taken to be the first keys given, so batches must not be
padded on the left, and caches that forget (sliding windows) must hold the whole sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantlib.errors import ModelError, UsageError
from quantlib.kernels.kv_format import KvFormat, SideFormat
from quantlib.kernels.kv_reference import numbers, rotate, round_to_codes
from quantlib.transforms.explicit_attention import Softmax, attend
from quantlib.transforms.rotation import Rotation
from quantlib.transforms.wiring import Wiring

NAME, EAGER_NAME = "quantlib", "quantlib_eager"
ATTRIBUTE = "quantlib_attention"
PACKED = "quantlib_packed"
"""Attribute of keys whose cache packs them and attends by itself (`runtime.packed_cache`)."""

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called with queries [B, H, T, d], keys and values [B, H_kv, L, d] before anything is done."""


@dataclass(frozen=True)
class AttentionState:
    """What one attention module does to its queries, keys and values.

    key_basis:  float32 orthogonal [d, d], or [H_kv, d, d] with one per KV head: queries and keys
                are multiplied by it from the right. Columns that the KV format keeps wide come
                first.
    kv:         keys and values are rounded as a cache of this format keeps them.
    sinks:      so many first positions are kept as they are, or as many as `kv` keeps so, whichever
                is more.
    query_bits: queries (in the key basis) are rounded to so many bits, symmetric, with one scale
                per token and head; 0: not at all.
    observe:    is shown what came in.
    softmax:    makes weights of scores in place of torch's (`explicit_attention`).
    """

    key_basis: Tensor | None = None
    kv: KvFormat | None = None
    sinks: int = 0
    query_bits: int = 0
    observe: Observer | None = None
    softmax: Softmax | None = None


def attach_attention(model: PreTrainedModel, states: Mapping[str, AttentionState]) -> None:
    """Give attention modules (by their names in `model`) a state; those not named keep theirs.

    Works on modules with weights on meta too. Raises ModelError when there is no such module or its
    model does not call attention functions by name, UsageError when a state does not fit its heads.
    """
    for name, state in states.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ModelError(f"this model has no module {name} to attach attention to") from None
        owner = _owner(model, name)
        if not owner._can_set_attn_implementation():
            raise ModelError(
                f"{type(owner).__name__} computes attention itself instead of calling a function "
                "by name: its keys and queries cannot be rotated, nor its KV cache rounded"
            )
        _check(name, module, state)
    configs = [
        (part.config, part.config._attn_implementation)
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and part._can_set_attn_implementation()
    ]
    for config, before in configs:
        eager = before in ("eager", EAGER_NAME)
        config._attn_implementation = EAGER_NAME if eager else NAME
    for name, state in states.items():
        setattr(model.get_submodule(name), ATTRIBUTE, state)


def detach_attention(model: nn.Module) -> None:
    """Take all states away: every attention module computes what it did before."""
    for module in model.modules():
        if ATTRIBUTE in module.__dict__:
            delattr(module, ATTRIBUTE)


def attention_states(
    wiring: Wiring,
    rotation: Rotation,
    kv: KvFormat | None = None,
    sinks: int = 0,
    query_bits: int = 0,
) -> dict[str, AttentionState]:
    """The states of all attentions of a model, by module: the rotation's key bases, and one way to
    round what is cached. Attentions with nothing to do are left out."""
    states = {}
    for attention in wiring.attentions:
        basis = rotation.key.get(attention.name)
        if basis is not None or kv is not None or query_bits:
            key_basis = None if basis is None else basis.float()
            states[attention.module] = AttentionState(key_basis, kv, sinks, query_bits)
    return states


@contextmanager
def watched_attention(model: PreTrainedModel, observers: Mapping[str, Observer]) -> Iterator[None]:
    """Show the queries, keys and values of attention modules, by their names in `model`, while the
    context lasts; states they have go on working. Raises as `attach_attention`."""
    with changed_attention(model, {n: {"observe": observe} for n, observe in observers.items()}):
        yield


@contextmanager
def changed_attention(
    model: PreTrainedModel, changes: Mapping[str, Mapping[str, Any]]
) -> Iterator[None]:
    """Change fields of the states of attention modules, by their names in `model`, while the
    context lasts. Raises as `attach_attention`."""
    modules = {name: model.get_submodule(name) for name in changes}
    before = {name: module.__dict__.get(ATTRIBUTE) for name, module in modules.items()}
    states = {
        name: replace(before[name] or AttentionState(), **fields)
        for name, fields in changes.items()
    }
    attach_attention(model, states)
    try:
        yield
    finally:
        for name, module in modules.items():
            if before[name] is None:
                delattr(module, ATTRIBUTE)
            else:
                setattr(module, ATTRIBUTE, before[name])


def transform(
    query: Tensor, key: Tensor, value: Tensor, state: AttentionState
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, T, d], keys and values [B, H_kv, L, d] as attention of this state sees them.

    Rounding has the gradient of the identity.
    """
    if state.observe is not None:
        state.observe(query, key, value)
    if state.key_basis is not None:
        basis = state.key_basis.to(key)
        grouped = query.unflatten(1, (key.shape[1], -1))
        per_head = basis if basis.ndim == 2 else basis[:, None]
        query, key = (grouped @ per_head).flatten(1, 2), key @ basis
    if state.query_bits:
        query = _Rounded.apply(query, lambda x: _round_symmetric(x, state.query_bits))
    if state.kv is not None:
        sinks = max(state.sinks, state.kv.sinks)
        key = _round_side(key, state.kv.key, sinks)
        value = _round_side(value, state.kv.value, sinks)
    return query, key, value


def round_kv(x: Tensor, form: SideFormat) -> Tensor:
    """Keys or values [..., d] as a packed cache gives them back, in x's dtype; NaN for rows that
    are not finite."""
    if form.bits == 32:
        return x
    rounded = numbers(*round_to_codes(x.detach().float(), form), form, x.shape[-1])
    return (rotate(rounded) if form.rotate else rounded).to(x.dtype)


def _round_side(x: Tensor, form: SideFormat, sinks: int) -> Tensor:
    if form.bits == 32:
        return x
    rounded: Tensor = _Rounded.apply(x, lambda exact: round_kv(exact, form))
    return torch.cat((x[..., :sinks, :], rounded[..., sinks:, :]), dim=-2) if sinks else rounded


def _round_symmetric(x: Tensor, bits: int) -> Tensor:
    """x [..., d] in codes of +-(2^(bits-1) - 1) times amax of its row; zeros stay zeros."""
    levels = (1 << (bits - 1)) - 1
    scale = x.float().abs().amax(-1, keepdim=True) / levels
    codes = (x.float() / torch.where(scale > 0, scale, 1.0)).round()
    return (codes * scale).to(x.dtype)


class _Rounded(torch.autograd.Function):
    """function(x), with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention contract, ending in sdpa."""
    packed = getattr(key, PACKED, None)
    if packed is not None:
        return packed.attend(module, query, key, value, **kwargs), None
    query, key, value = _stated(module, query, key, value)
    softmax = _softmax(module)
    if softmax is not None:
        return attend(softmax, module, query, key, value, attention_mask, **kwargs)
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    result: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention contract, ending in the eager function of the model's own file."""
    packed = getattr(key, PACKED, None)
    if packed is not None:
        return packed.attend(module, query, key, value, **kwargs), None
    query, key, value = _stated(module, query, key, value)
    softmax = _softmax(module)
    if softmax is not None:
        return attend(softmax, module, query, key, value, attention_mask, **kwargs)
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    function = next((f for f in (vars(x).get(_EAGER) for x in files) if f is not None), None)
    if function is None:
        raise ModelError(f"{type(module).__name__} has no {_EAGER} beside it to compute with")
    result: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


_EAGER = "eager_attention_forward"


def _softmax(module: nn.Module) -> Softmax | None:
    state = module.__dict__.get(ATTRIBUTE)
    return None if state is None else state.softmax


def _stated(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    state = module.__dict__.get(ATTRIBUTE)
    return (query, key, value) if state is None else transform(query, key, value, state)


def _owner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost transformers model that the module `name` is part of."""
    owner = model
    parts = name.split(".")
    for count in range(1, len(parts)):
        part = model.get_submodule(".".join(parts[:count]))
        owner = part if isinstance(part, PreTrainedModel) else owner
    return owner


def _check(name: str, module: nn.Module, state: AttentionState) -> None:
    """Raise UsageError unless the state fits the module's heads (as far as it says what they
    are)."""
    head_dim = getattr(module, "head_dim", None)
    basis = state.key_basis
    if basis is not None:
        square = basis.ndim in (2, 3) and basis.shape[-1] == basis.shape[-2]
        if not square or (head_dim is not None and basis.shape[-1] != head_dim):
            raise UsageError(
                f"{name}: the key basis has shape {list(basis.shape)}, and heads have "
                f"{head_dim or 'as many'} columns: it belongs to another model"
            )
    if state.kv is not None and head_dim is not None:
        state.kv.key.check(head_dim)
        state.kv.value.check(head_dim)
    if state.sinks < 0:
        raise UsageError(f"{name}: {state.sinks} first positions cannot be kept: use 0 or more")
    if state.query_bits and not 2 <= state.query_bits <= 8:
        raise UsageError(f"{name}: queries cannot be rounded to {state.query_bits} bits: use 2..8")


AttentionInterface.register(NAME, _attention)
AttentionInterface.register(EAGER_NAME, _eager_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionMaskInterface.register(EAGER_NAME, eager_mask)
