"""Getting an empty transformers model ready for a packed checkpoint.

The model comes from `from_pretrained` on `meta`; it leaves with packed modules whose buffers have
the names, dtypes and shapes that transformers' loader will find in the files. The checkpoint is
checked before a byte of it is loaded: transformers only warns of a missing tensor, and leaves
uninitialized memory in its place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from quantlib.checkpoint.cache_formats import PREFIX as KV_PREFIX
from quantlib.checkpoint.reader import PackedCheckpoint, read_layout
from quantlib.checkpoint.surroundings import PREFIX
from quantlib.errors import CheckpointError
from quantlib.runtime import nonlinear
from quantlib.runtime.assemble import Inputs, replace_modules
from quantlib.runtime.describe import states_of
from quantlib.runtime.fused_turn import take_turn
from quantlib.runtime.hearing_cache import attach_hearing_cache
from quantlib.runtime.modality_hooks import attach_caches
from quantlib.runtime.modules import QuantizedLinear
from quantlib.runtime.packed_module import PackedModule
from quantlib.transforms.attention import attach_attention
from quantlib.transforms.binding import wire
from quantlib.transforms.online import attach
from quantlib.transforms.wiring import Wiring


def prepare(model: Any, folder: str | os.PathLike[str]) -> None:
    """Swap the packed modules of the checkpoint in `folder` into `model` (on `meta`).

    A model of another class than the checkpoint's (`AutoModel`: the decoder without its head) takes
    the weights it has. What the checkpoint's rotation does while the model runs is attached, and
    what is done to keys and values, and layers that compute in integers.
    Raises CheckpointError when the folder is damaged, and CheckpointError, ModelError or
    TransformError when config.json describes another model than the weights.
    """
    checkpoint = read_layout(folder)
    rename = _renaming(model)
    quantized = {
        name: rename(name)
        for name, scheme in checkpoint.schemes.items()
        if scheme.weight is not None
    }
    present = set(model.state_dict())
    absent = [name for name, new in quantized.items() if new not in present]
    if absent and type(model).__name__ in (model.config.architectures or ()):
        raise CheckpointError(
            f"{type(model).__name__} has no weight {absent[0]} (nor {len(absent) - 1} others of "
            f"the checkpoint): its config.json is not the one it was written with"
        )
    mine = {name: new for name, new in quantized.items() if new in present}
    rotation = checkpoint.rotation()
    wiring = _wiring(model, checkpoint) if rotation is not None else None
    inputs = {
        new: Inputs(checkpoint.activations(name), checkpoint.order(name))
        for name, new in mine.items()
    }
    replace_modules(
        model,
        {new: str(checkpoint.schemes[name]) for name, new in mine.items()},
        {new: checkpoint.shapes[name] for name, new in mine.items()},
        inputs,
    )
    _draw_nothing(model)
    if checkpoint.around.caches:
        attach_attention(model, states_of(checkpoint.around.caches))
        attach_hearing_cache(model)
    nonlinear.attach(model, checkpoint.around.nonlinear)
    kv = checkpoint.around.kv
    if kv is not None:
        attach_caches(model, kv.formats, kv.image_token, checkpoint.static_scales())
        _ignore(model, KV_PREFIX)
    if rotation is not None and wiring is not None:
        with torch.device("cpu"):  # transformers builds on `meta`, and bases have values
            attach(model, wiring, rotation)
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.turn = take_turn(module)
        _ignore(model, PREFIX)


def _draw_nothing(model: Any) -> None:
    """Keep transformers from drawing weights of modules whose linears are packed: it looks for them
    by name (SigLIP's attention, for one). Modules with buffers of their own still fill these."""
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not own and any(isinstance(child, PackedModule) for child in module.children()):
            module._is_hf_initialized = True


def _ignore(model: Any, prefix: str) -> None:
    """Keep transformers from reporting tensors that no parameter is filled from."""
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = ignored | {rf"^{re.escape(prefix)}"}


def _wiring(model: Any, checkpoint: PackedCheckpoint) -> Wiring:
    """What reads and writes what in the model, before its modules are swapped.

    transformers ties weights after it has loaded them, and the wiring depends on it: so they are
    tied now, but for those that the checkpoint has of their own.
    """
    stored = {*checkpoint.schemes, *checkpoint.headers}
    for target, origin in model.all_tied_weights_keys.items():
        if target not in stored:
            module, _, parameter = target.rpartition(".")
            setattr(model.get_submodule(module), parameter, model.get_parameter(origin))
    return wire(model)


def _renaming(model: Any) -> Callable[[str], str]:
    """Checkpoint name -> name in this model, by transformers' own rules.

    They cover families whose modules were renamed over time, and base models without their prefix.
    """
    rules = [
        rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)
    ]
    state = model.state_dict()

    def rename(name: str) -> str:
        return (
            name
            if name in state
            else rename_source_key(name, rules, [], model.base_model_prefix, state)[0]
        )

    return rename
