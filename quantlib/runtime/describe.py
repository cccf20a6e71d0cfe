"""What `config.json` says of a model that is packed now: the inverse of `prepare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from quantlib.checkpoint.cache_formats import CacheFormats, tensor_name
from quantlib.checkpoint.surroundings import CacheSettings
from quantlib.errors import CheckpointError, FormatError
from quantlib.formats.composite import parts_of
from quantlib.formats.scheme import Scheme
from quantlib.kernels.kv_format import KvFormat
from quantlib.kernels.nonlinear import Operator
from quantlib.runtime.modality_hooks import attached_caches
from quantlib.runtime.modules import packed_modules
from quantlib.runtime.nonlinear import attached
from quantlib.runtime.packed_module import PackedModule
from quantlib.transforms.attention import ATTRIBUTE, AttentionState

_EXACT = KvFormat.parse("f32")


@dataclass(frozen=True)
class Description:
    """What `checkpoint.writer.quantization_config` takes, of a model.

    schemes, shapes: by the weight's name.
    clips:           clip factors of weights' inputs, where not all are 1.
    orders:          weights that take their inputs in an order of their own.
    caches:          attention modules whose keys and values are rounded.
    nonlinear:       layers that compute in integers.
    kv:              formats of the KV cache by modality.
    """

    schemes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    clips: Mapping[str, tuple[float, ...]]
    orders: frozenset[str]
    caches: Mapping[str, CacheSettings]
    nonlinear: Mapping[str, Operator]
    kv: CacheFormats | None


def describe(model: nn.Module) -> Description:
    """The packed weights of `model`, and what is around them, but for a rotation.

    Raises CheckpointError for formats along K that no scheme has.
    """
    schemes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    clips: dict[str, tuple[float, ...]] = {}
    orders: set[str] = set()
    for module_name, module in packed_modules(model).items():
        whole = module.composites()
        for local, (composite, size) in whole.items():
            schemes[f"{module_name}.{local}"] = str(composite)
            shapes[f"{module_name}.{local}"] = size
        parts = {
            part
            for local, (composite, size) in whole.items()
            for part in (local + suffix for suffix in parts_of(composite, size))
        }
        for local, (shape, segments) in module.packed_weights().items():
            if local in parts:
                _note_inputs(module, module_name, local, clips, orders)
                continue
            name, activations = f"{module_name}.{local}", module.activations(local)
            try:
                schemes[name] = str(Scheme.of(segments, activations))
            except FormatError as error:
                raise CheckpointError(f"{name} cannot be saved: {error}") from error
            shapes[name] = shape
            _note_inputs(module, module_name, local, clips, orders)
    states = {
        name: getattr(module, ATTRIBUTE)
        for name, module in model.named_modules()
        if getattr(module, ATTRIBUTE, None) is not None
    }
    caches = {
        name: CacheSettings(state.kv or _EXACT, state.sinks, state.query_bits)
        for name, state in states.items()
        if state.kv is not None or state.query_bits
    }
    return Description(
        schemes, shapes, clips, frozenset(orders), caches, attached(model), _cache_formats(model)
    )


def _note_inputs(
    module: PackedModule,
    module_name: str,
    local: str,
    clips: dict[str, tuple[float, ...]],
    orders: set[str],
) -> None:
    """Add the clip factors and the order of one packed weight, if it has such."""
    name, activations = f"{module_name}.{local}", module.activations(local)
    if any(part.format.clip != 1 for part in activations):
        clips[name] = tuple(part.format.clip for part in activations)
    if module.order(local) is not None:
        orders.add(name)


def _cache_formats(model: nn.Module) -> CacheFormats | None:
    found = attached_caches(model)
    if found is None:
        return None
    names = frozenset(tensor_name(place) for place in found.static)
    return CacheFormats(found.formats, found.image_token, names)


def states_of(caches: Mapping[str, CacheSettings]) -> dict[str, AttentionState]:
    """What `transforms.attention.attach_attention` takes."""
    return {
        name: AttentionState(kv=given.kv, sinks=given.sinks, query_bits=given.query_bits)
        for name, given in caches.items()
    }
