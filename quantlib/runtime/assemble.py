"""Putting packed modules into a transformers model.

Two ways in, one set of rules: `replace_modules` prepares an empty model (on `meta`) for a packed
checkpoint, and `quantize_in_memory` gives a loaded model the weights that were just rounded. Both
name weights as the model's own state dict does (`model.layers.0.mlp.down_proj.weight`,
`model.layers.0.mlp.experts.gate_up_proj`), and both keep tied heads tied: the embedding owns the
weight, the head becomes a `TiedHead`.

A module is replaced only if its forward is known to be the plain one. One that does more (a normed
embedding, transposed or biased experts) is refused by name: running it as if it were plain would be
silently wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from quantlib.errors import FormatError, ModelError
from quantlib.formats.activation import check_activations
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import QuantizedWeight, pack
from quantlib.models.window import Convolution, Window
from quantlib.runtime.composite import (
    BlockedEmbedding,
    BlockedLinear,
    CanonicalConvolution,
    FactoredConvolution,
    FactoredLinear,
    ThinConvolution,
)
from quantlib.runtime.convolution import QuantizedConvolution
from quantlib.runtime.fused_turn import take_turn
from quantlib.runtime.modules import (
    PackedEmbedding,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    TiedHead,
    packed_modules,
    packed_weights,
)
from quantlib.runtime.packed_module import SCHEME, Activations, PackedModule, Segments
from quantlib.runtime.transformers_plugin import attach

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
_PLAIN_EXPERTS = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}
"""What transformers notes about experts that compute as `QuantizedExperts` does."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is done to a packed weight's inputs before they are multiplied.

    activations: how they are rounded in mode "scheme".
    order:       int32 [K] or None, see `PackedModule.set_inputs`.
    """

    activations: Activations = ()
    order: Tensor | None = None


def replace_modules(
    model: nn.Module,
    schemes: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    inputs: Mapping[str, Inputs] | None = None,
) -> None:
    """Swap the modules of the weights named in `schemes` for empty packed ones, device by device.

    schemes: weight name -> scheme name ("w4g64"); kept weights ("bf16", ...) are left alone.
    shapes:  if given, what the weights must measure.
    inputs:  if given, what is done to weights' inputs; for the others, what their schemes say.
             Orders are only measured: buffers of that size are made, empty.
    Raises ModelError for a name the model lacks, a shape that differs, and a module whose call is
    not understood.
    """
    parsed = {name: Scheme.parse(scheme) for name, scheme in schemes.items()}
    parsed = {name: scheme for name, scheme in parsed.items() if scheme.weight is not None}
    segments: dict[str, Segments] = {}
    composites: dict[str, Scheme] = {}
    prepared: dict[str, Inputs] = {}
    for name, scheme in parsed.items():
        weight = _weight(model, name)
        shape = _shape(model, name)
        if shapes is not None and tuple(shapes.get(name, shape)) != shape:
            raise ModelError(
                f"{name} is {list(shapes[name])} as quantized and {list(shape)} in the model: "
                f"they do not belong together"
            )
        if scheme.is_composite:
            composites[name] = scheme
        else:
            segments[name] = scheme.segments(shape[-1])
        given = (inputs or {}).get(name) or Inputs(scheme.activations(shape[-1]))
        if scheme.rows or (scheme.low_rank and scheme.low_rank.alone):
            continue  # whose inputs are never rounded or in another order
        order = given.order
        if order is not None:
            order = torch.empty_like(order, device=weight.device)
        prepared[name] = replace(given, order=order)
    _replace(model, segments, dict.fromkeys(parsed, SCHEME), composites)
    _set_inputs(model, prepared)


def quantize_in_memory(
    model: nn.Module,
    packed: Mapping[str, QuantizedWeight],
    mode: str = SCHEME,
    inputs: Mapping[str, Inputs] | None = None,
) -> None:
    """Give a loaded model these quantized weights, each in the place of the dense one it came from.

    A stack of experts `[E, N, K]` comes as one quantized matrix `[E*N, K]`. Weights that are packed
    already are exchanged, so candidates can be tried one after the other (and keep their mode, and
    their inputs unless others are given).
    mode:   see `modules.set_mode`.
    inputs: what is done to weights' inputs; nothing, for those it does not name.
    Raises ModelError as `replace_modules` does.
    """
    former = packed_weights(model)
    for name, weight in packed.items():
        shape = former[name][0] if name in former else _shape(model, name)
        if tuple(weight.shape) != (math.prod(shape[:-1]), shape[-1]):
            raise ModelError(
                f"{name} is {list(weight.shape)} as quantized and {list(shape)} in the model: "
                f"they do not belong together"
            )
    segments = {
        name: tuple(part.segment for part in weight.segments) for name, weight in packed.items()
    }
    fresh = {name: segments[name] for name in packed if name not in former}
    _replace(model, fresh, dict.fromkeys(fresh, mode))
    modules = packed_modules(model)
    for name, weight in packed.items():
        module_name, _, parameter = name.rpartition(".")
        module = modules[module_name]
        device = module.packed_device(parameter)
        tensors = {suffix: tensor.to(device) for suffix, tensor in pack(weight).items()}
        module.exchange_packed(parameter, segments[name], tensors)
    _set_inputs(model, inputs or {})
    if hasattr(model, "save_pretrained"):
        attach(model)


def _set_inputs(model: nn.Module, inputs: Mapping[str, Inputs]) -> None:
    modules = packed_modules(model)
    for name, given in inputs.items():
        module_name, _, parameter = name.rpartition(".")
        module, order = modules.get(module_name), given.order
        if module is None or parameter not in module.packed_weights():
            raise ModelError(f"{name} has inputs to round or reorder, but is not a packed weight")
        (*_, columns), _ = module.packed_weights()[parameter]
        if given.activations:
            check_activations(columns, given.activations)
        if order is not None:
            if isinstance(module, PackedEmbedding):
                raise ModelError(f"{name} is an embedding: its columns are outputs, in their order")
            if order.dtype != torch.int32 or tuple(order.shape) != (columns,):
                raise ModelError(
                    f"the order of the inputs of {name} is {list(order.shape)} {order.dtype}, "
                    f"expected int32 [{columns}]"
                )
            order = order.to(module.packed_device(parameter))
        module.set_inputs(parameter, given.activations, order)


def _replace(
    model: nn.Module,
    segments: Mapping[str, Segments],
    modes: Mapping[str, str],
    composites: Mapping[str, Scheme] | None = None,
) -> None:
    """Put empty packed modules in. `segments`, `modes`, and the schemes of weights that are several
    matrices, by weight name."""
    several = composites or {}
    tied = _tied_to(model, {*segments, *several})
    by_module: dict[str, list[str]] = {}
    for name in segments:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for module_name, names in by_module.items():
        old = model.get_submodule(module_name)
        mode = modes[names[0]]
        if isinstance(old, nn.Linear):
            new: nn.Module = _linear(old, module_name, segments[names[0]], mode)
        elif isinstance(old, nn.Embedding):
            new = _embedding(old, module_name, segments[names[0]])
        elif isinstance(old, Convolution):
            new = _convolution(old, module_name, segments[names[0]])
        else:
            by_parameter = {name.rpartition(".")[2]: segments[name] for name in names}
            new = _experts(old, module_name, by_parameter, mode)
        _keep_hooks(old, new)
        if isinstance(new, QuantizedLinear):
            new.turn = take_turn(new)
        model.set_submodule(module_name, new.train(old.training))
    for name, scheme in several.items():
        module_name = name.rpartition(".")[0]
        old = model.get_submodule(module_name)
        new = _composite(old, module_name, scheme, modes[name])
        _keep_hooks(old, new)
        model.set_submodule(module_name, new.train(old.training))
    for head_name, source_name in tied.items():
        _tie(model, head_name, source_name, modes[source_name])
    _forget_ties(model, {*segments, *several, *tied})


def _tie(model: nn.Module, head_name: str, source_name: str, mode: str) -> None:
    head, source = (
        model.get_submodule(name.rpartition(".")[0]) for name in (head_name, source_name)
    )
    if not isinstance(head, nn.Linear) or not isinstance(source, PackedEmbedding):
        raise ModelError(
            f"{head_name} is tied to {source_name}, but only a head can be tied to a quantized "
            f"embedding: keep {source_name} in 16 bits"
        )
    new = TiedHead(source, head.bias, mode)
    _keep_hooks(head, new)
    model.set_submodule(head_name.rpartition(".")[0], new.train(head.training))


def _keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let forward hooks of a module (a rotation's, an observer's) go on with the one in its place.

    Handles that were given out for them remove them from the old module only.
    """
    for kind in (
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        getattr(new, kind).update(getattr(old, kind))


def _weight(model: nn.Module, name: str) -> Tensor:
    module_name, _, parameter = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        module = None
    if isinstance(module, PackedModule | TiedHead):
        raise ModelError(f"{name} is quantized already: start again from the unquantized model")
    weight = getattr(module, parameter, None)
    if not isinstance(weight, Tensor):
        raise ModelError(
            f"{type(model).__name__} has no weight {name}: the plan was made for another model"
        )
    return weight


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    """Of a weight as it is packed: a convolution's filters [N, channels, *window] are [N, K]."""
    shape = tuple(_weight(model, name).shape)
    if isinstance(model.get_submodule(name.rpartition(".")[0]), Convolution):
        return shape[0], math.prod(shape[1:])
    return shape


def _linear(old: nn.Linear, name: str, segments: Segments, mode: str) -> QuantizedLinear:
    if type(old).forward is not nn.Linear.forward:
        raise _unknown(old, name)
    return QuantizedLinear(
        old.in_features, old.out_features, segments, old.bias, mode, old.weight.device
    )


def _composite(old: nn.Module, name: str, scheme: Scheme, mode: str) -> PackedModule:
    """An empty module on a weight that is several matrices."""
    try:
        if isinstance(old, nn.Embedding) and scheme.rows:
            weight, (rows, width) = old.weight, (old.num_embeddings, old.embedding_dim)
            scale = _embed_scale(old, name)
            return BlockedEmbedding(rows, width, scheme, scale, weight.dtype, weight.device)
        if isinstance(old, nn.Linear) and not (scheme.low_rank and scheme.low_rank.alone):
            if type(old).forward is not nn.Linear.forward:
                raise _unknown(old, name)
            sizes = old.in_features, old.out_features
            kind = BlockedLinear if scheme.rows else FactoredLinear
            return kind(*sizes, scheme, old.bias, mode, old.weight.device)
        if isinstance(old, Convolution) and scheme.low_rank is not None:
            window, weight = Window.of(name, _plain_convolution(old, name)), old.weight
            bias = cast("nn.Parameter | None", old.bias)
            placed = weight.dtype, weight.device
            thin = ThinConvolution if scheme.low_rank.alone else FactoredConvolution
            form = CanonicalConvolution if scheme.low_rank.window else thin
            return form(old.out_channels, window, scheme, bias, *placed)
    except FormatError as error:
        raise ModelError(f"{name}: {error}") from error
    alone = scheme.low_rank is not None and scheme.low_rank.alone
    kinds = "convolutions" if alone else "linears and convolutions"
    raise ModelError(
        f"{name} is a {type(old).__name__}, and {scheme} is for "
        f"{'embeddings and linears' if scheme.rows else kinds}: give it another scheme"
    )


def _embed_scale(old: nn.Embedding, name: str) -> float | None:
    # Gemma's scaled embeddings, and they alone, name their constant so.
    scale = getattr(old, "scalar_embed_scale", None)
    if scale is None and type(old).forward is not nn.Embedding.forward:
        raise _unknown(old, name)
    return cast("float | None", scale)


def _embedding(old: nn.Embedding, name: str, segments: Segments) -> QuantizedEmbedding:
    scale = _embed_scale(old, name)
    weight, (rows, width) = old.weight, (old.num_embeddings, old.embedding_dim)
    return QuantizedEmbedding(rows, width, segments, scale, weight.dtype, weight.device)


def _plain_convolution(old: Convolution, name: str) -> Convolution:
    if type(old).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        raise _unknown(old, name)
    return old


def _convolution(old: Convolution, name: str, segments: Segments) -> QuantizedConvolution:
    _plain_convolution(old, name)
    window, weight = Window.of(name, old), old.weight
    return QuantizedConvolution(
        old.out_channels,
        window,
        segments,
        cast("nn.Parameter | None", old.bias),
        weight.dtype,
        weight.device,
    )


def _experts(
    old: nn.Module, name: str, segments: Mapping[str, Segments], mode: str
) -> QuantizedExperts:
    """Packed experts whose gate is the old module's own method.

    The old module lives on behind that method, so its dense parameters are taken from it.
    """
    if any(getattr(old, key, None) is not value for key, value in _PLAIN_EXPERTS.items()):
        raise _unknown(old, name)
    gate = cast(Callable[[Tensor], Tensor], old._apply_gate)
    dense = {key: old.get_parameter(key) for key in EXPERT_WEIGHTS}
    for key in EXPERT_WEIGHTS:
        delattr(old, key)
    shapes = {key: tuple(dense[key].shape) for key in segments}
    kept = {key: parameter for key, parameter in dense.items() if key not in segments}
    module = QuantizedExperts(shapes, segments, kept, gate, mode, dense["down_proj"].device)
    module.config = getattr(old, "config", None)
    return module


def _unknown(module: nn.Module, name: str) -> ModelError:
    return ModelError(
        f"{name} is a {type(module).__name__}, and quantlib cannot compute what it does on packed "
        f"weights: keep it in 16 bits (pin it to bf16)"
    )


def _tied_to(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Weight that is a quantized one's alias -> name of that one.

    By transformers' table of ties, and by identity in a model that is loaded.
    """
    ties = dict(getattr(model, "all_tied_weights_keys", {}))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for aliases in owners.values():
        source = next((name for name in aliases if name in names), None)
        ties.update({name: source for name in aliases if source is not None and name != source})
    for target, source in ties.items():
        if target in names:
            raise ModelError(
                f"{target} and {source} are one weight: give {source} the scheme, {target} none"
            )
    return {target: source for target, source in ties.items() if source in names}


def _forget_ties(model: nn.Module, names: set[str]) -> None:
    """Take these weights out of transformers' tables of ties: no parameter is left to be tied."""
    for prefix, module in model.named_modules():
        local = {name.removeprefix(f"{prefix}.") for name in names} if prefix else names
        for table in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, table, None)
            if isinstance(ties, dict):
                left = {
                    to: of
                    for to, of in ties.items()
                    if not any(re.match(p, n) for p in (to, of) for n in local)
                }
                setattr(module, table, left)
