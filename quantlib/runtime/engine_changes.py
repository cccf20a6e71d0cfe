"""What a packed checkpoint does to a model besides storing its weights in few bits, as the native
engine takes it: bases that are applied while it runs, inputs that are rounded or come in another
order, and keys and values that are rounded.

Weights hold all of a rotation that weights can (`quantlib.transforms`); what is left is read from
`quantization_config` here. `unsupported_changes` says, from headers alone, what the engine cannot
do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantlib.checkpoint.reader import PackedCheckpoint
from quantlib.checkpoint.surroundings import CacheSettings
from quantlib.errors import CheckpointError
from quantlib.formats.scheme import Scheme
from quantlib.kernels.cpu import forms
from quantlib.kernels.cpu.forms import BlockRotation
from quantlib.kernels.kv_format import MAX_SINKS, KvFormat
from quantlib.runtime.engine_spec import EngineSpec
from quantlib.transforms import hadamard
from quantlib.transforms.rotation import MEAN

_ORTHOGONAL = 1e-4
"""A basis changes no vector's length by more than this share: float32's rounding is far below."""


@dataclass(frozen=True, eq=False)
class Changes:
    """residual:   float32 [D, D], the basis of the residual stream between embedding and tied head.
    key_bases:  layer -> float32 [kv_heads, d, d].
    hidden:     layer -> rotation of its down projection's inputs.
    caches:     layer -> how it keeps keys and values.
    query_bits: layer -> bits of its queries.
    """

    residual: Tensor | None = None
    key_bases: Mapping[int, Tensor] = field(default_factory=dict)
    hidden: Mapping[int, BlockRotation] = field(default_factory=dict)
    caches: Mapping[int, KvFormat] = field(default_factory=dict)
    query_bits: Mapping[int, int] = field(default_factory=dict)


NO_CHANGES = Changes()


def block_name(layer: int) -> str:
    """A layer, as rotations name it."""
    return f"model.layers.{layer}"


def attention_name(layer: int) -> str:
    """A layer's attention, as caches name it."""
    return f"{block_name(layer)}.self_attn"


def typical_changes(spec: EngineSpec, residual: bool, rotated: bool, kv: KvFormat) -> Changes:
    """Changes that take as long as those of a checkpoint, before there is one.

    residual: the residual stream has a basis of its own beside a tied embedding. rotated: keys have
    bases, and the inputs of down projections are rotated. kv: of all layers.
    """
    layers = range(len(spec.layers))
    exact = kv == KvFormat.parse("f32")
    caches: dict[int, KvFormat] = {} if exact else dict.fromkeys(layers, kv)
    if not rotated:
        return Changes(caches=caches)
    size = hadamard.block_size(spec.intermediate)
    order, _ = hadamard.split(size)
    turn = BlockRotation(size, hadamard.signs(order) if order > 1 else None)
    keys = torch.eye(spec.head_dim, device="cpu").expand(spec.kv_heads, -1, -1).contiguous()
    return Changes(
        residual=torch.eye(spec.hidden, device="cpu") if residual else None,
        key_bases=dict.fromkeys(layers, keys),
        hidden=dict.fromkeys(layers, turn),
        caches=caches,
    )


def read_changes(checkpoint: PackedCheckpoint, spec: EngineSpec) -> Changes:
    """The changes of a checkpoint. Raises CheckpointError when they are another model's."""
    layers = range(len(spec.layers))
    caches = {i: checkpoint.around.caches.get(attention_name(i)) for i in layers}
    settings = {i: cache for i, cache in caches.items() if cache is not None}
    kept = {i: cache_format(cache) for i, cache in settings.items()}
    bits = {i: cache.query_bits for i, cache in settings.items()}
    rotation = checkpoint.rotation()
    if rotation is None:
        return Changes(caches=kept, query_bits=bits)
    square = (spec.head_dim,) * 2
    sizes = {
        i: (rotation.hidden.get(block_name(i), 1), rotation.hidden_high.get(block_name(i), 0))
        for i in layers
    }
    rotations = {
        (size, still): _block_rotation(checkpoint, spec, size, still)
        for size, still in set(sizes.values())
    }
    bases = {i: rotation.key.get(block_name(i)) for i in layers}
    return Changes(
        residual=_basis(checkpoint, "residual", rotation.residual, (spec.hidden,) * 2),
        key_bases={
            i: found.expand(spec.kv_heads, *square).contiguous()
            for i, basis in bases.items()
            if basis is not None
            and (found := _basis(checkpoint, f"keys of layer {i}", basis, square, spec.kv_heads))
            is not None
        },
        hidden={i: rotations[size] for i, size in sizes.items() if size[0] > 1},
        caches=kept,
        query_bits=bits,
    )


def _in_row_blocks(scheme: Scheme) -> bool:
    """Whether a weight is several matrices, each some of its rows as they are."""
    return bool(scheme.rows) and not any(block.width for block in scheme.rows)


def cache_format(settings: CacheSettings) -> KvFormat:
    """The format of a cache with its first positions. float32 has no need of them."""
    form, sinks = settings.kv, max(settings.kv.sinks, settings.sinks)
    exact = form.key.bits == form.value.bits == 32
    return form.with_sinks(0 if exact else sinks)


def _basis(
    checkpoint: PackedCheckpoint,
    what: str,
    basis: Tensor | None,
    square: tuple[int, int],
    heads: int = 0,
) -> Tensor | None:
    """float32 and contiguous. Raises CheckpointError unless it is a rotation of that size."""
    if basis is None:
        return None
    shapes = [square, (heads, *square)] if heads else [square]
    x = torch.randn(3, square[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = x @ basis.double() if tuple(basis.shape) in shapes else x * torch.nan
    change = (turned.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max()
    if not change <= _ORTHOGONAL:
        raise CheckpointError(
            f"the basis of the {what} in {checkpoint.path} is {list(basis.shape)}, or no rotation, "
            f"and config.json calls for one of {list(square)}: make the checkpoint again"
        )
    return basis.to(torch.float32).contiguous()


def _block_rotation(
    checkpoint: PackedCheckpoint, spec: EngineSpec, size: int, still: int
) -> BlockRotation:
    """Of all inputs of a down projection but the last `still`."""
    rotated = spec.intermediate - still
    fits = 0 <= still < spec.intermediate and hadamard.covers(size, rotated)
    if not fits or not hadamard.exists(size):
        raise CheckpointError(
            f"{checkpoint.path} rotates all inputs of down projections but {still} in blocks of "
            f"{size}, and there are {spec.intermediate} of them: make the checkpoint again"
        )
    order, _ = hadamard.split(size)
    return BlockRotation(size, hadamard.signs(order) if order > 1 else None, still)


def unsupported_changes(checkpoint: PackedCheckpoint, spec: EngineSpec) -> str | None:
    """What the checkpoint asks for and the engine cannot do, if anything.

    The sentence fits after "the native engine does not run this model: ".
    """
    around = checkpoint.around
    known = {attention_name(layer) for layer in range(len(spec.layers))}
    for name, settings in around.caches.items():
        if name not in known:
            return f"the keys and values of {name} are rounded"
        if settings.sinks > MAX_SINKS:
            return f"{name} keeps more than {MAX_SINKS} first positions as they are"
    if "encoder" in around.tensors:
        return "it has an encoder with a basis of its own"
    if any(name.startswith(MEAN) for name in around.tensors):
        return "means are subtracted from the inputs of its linears"
    if around.kv is not None:
        return "its KV cache keeps words and images in formats of their own"
    for name, scheme in checkpoint.schemes.items():
        if scheme.is_composite and not _in_row_blocks(scheme):
            return f"{name} is stored as several matrices ({scheme})"
        activations = checkpoint.activations(name)
        if scheme.weight is None and activations:
            return f"the inputs of {name}, which is not packed, are rounded"
        if name.endswith("embed_tokens.weight") and name in around.orders:
            return f"{name} is in another order"
        if activations:
            reason = forms.why_not(checkpoint.segments(name), activations)
            if reason:
                return f"the inputs of {name} are rounded as {scheme} says ({reason})"
    return None
