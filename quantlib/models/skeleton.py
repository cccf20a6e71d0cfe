"""The transformers module of a source without its weights; parts are filled and emptied by name.

Parameters live on `meta` until `materialize` reads them from disk, and go back there with
`release`, so a pass over the blocks needs the memory of one. Buffers (rotary frequencies, Gemma's
embedding scale) are not on disk: they are computed in `__init__`, so the module is built with real
buffers and only its parameters on meta.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quantlib.errors import ModelError
from quantlib.models import pisces
from quantlib.models.memory import empty
from quantlib.models.source import Source
from quantlib.models.tables import find


def build(source: Source, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The source's module in eval mode: parameters on meta in `dtype`, buffers computed.

    Embedding and head are tied as the config says, unless two different tensors are on disk. A
    source in another basis attaches what its parameters need beside them.
    Raises ModelError when transformers cannot build the architecture without remote code.
    """
    model = from_config(source.config, dtype)
    stored = source.parameters
    for target, origin in model.all_tied_weights_keys.items():
        if target in stored and origin in stored and not source.same_data(target, origin):
            model = from_config({**source.config, "tie_word_embeddings": False}, dtype)
            break
    source.attach(model)
    return model


def from_config(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As `build`, from a config.json alone."""
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"the installed transformers has no model type {model_type!r}, and code from a model's "
            "folder is never run: a newer transformers may have it."
        )
    settings = copy.deepcopy(dict(config))
    settings.pop("auto_map", None)  # names the remote code
    try:
        parsed = CONFIG_MAPPING[model_type].from_dict(settings)
        with init_empty_weights(include_buffers=False):
            model = _construct(parsed, dtype)
    except Exception as error:  # of any kind: hundreds of architectures, a config of any origin
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"transformers cannot build a model of model type {model_type!r} from this config: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    # registering a parameter on meta makes a new object of it: the ties made in __init__ are undone
    model.tie_weights()
    model.requires_grad_(False)
    result: PreTrainedModel = model.eval()
    return result


def _construct(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of `model_class`."""
    named = model_class(config.model_type)
    make = named.from_config if named is AutoModelForCausalLM else named._from_config
    model: PreTrainedModel = make(config, dtype=dtype)
    return model


def model_class(model_type: str) -> Any:
    """The transformers class that the family's table names; `AutoModelForCausalLM` where it names
    none, or there is no table."""
    family = find(model_type)
    if family is None or not family.architecture:
        return AutoModelForCausalLM
    if family.architecture == pisces.PiscesForConditionalGeneration.__name__:
        return pisces.PiscesForConditionalGeneration  # ours: transformers has no such model
    return getattr(transformers, family.architecture)


def from_pretrained(model_type: str, folder: Path, **options: Any) -> Any:
    """`from_pretrained` of `model_class`, without what Qwen2.5-Omni's own does behind it: it opens
    a pickle of voices (`calibration.paths.voices`). Raises what transformers raises."""
    named = model_class(model_type)
    if hasattr(named, "load_speakers"):
        return vars(PreTrainedModel)["from_pretrained"].__func__(named, folder, **options)
    return named.from_pretrained(folder, **options)


def writer(model: Any) -> Any:
    """The part of a model that writes text: the model itself, but of Qwen2.5-Omni the thinker."""
    return getattr(model, "thinker", model)


def materialize(
    module: nn.Module,
    prefix: str,
    source: Source,
    dtype: torch.dtype | None = torch.float32,
    exclude: Sequence[str] = (),
) -> None:
    """Load the parameters under `prefix`, except those under `exclude`, from `source`.

        materialize(model, "model.layers.3", source)                    # one block
        materialize(model, "", source, exclude=model_map.blocks)        # all outside the blocks

    module: the whole model, so that names are those of its parameters; tied ones stay one tensor.
    dtype:  of the parameters in memory; None keeps the stored one. Buffers that are on disk are
            loaded too, in the dtype of the module.
    Raises ModelError when a tensor is missing, has another shape, or holds inf or nan.
    """
    for names, parameter in _tied_names(module, prefix, exclude):
        stored = next((name for name in names if name in source.parameters), None)
        if stored is None:
            raise ModelError(f"{source.path} has no tensor for {names[0]}.")
        value = source.read(stored)
        if value.shape != parameter.shape:
            raise ModelError(
                f"{stored} has shape {list(value.shape)} in {source.path}, "
                f"the module expects {list(parameter.shape)}."
            )
        if dtype is not None and dtype != value.dtype:
            value = empty(value.shape, dtype).copy_(value)
        _set_parameter(module, names, value)
    for name, buffer in module.named_buffers():
        if _is_under(name, prefix, exclude) and name in source.parameters:
            buffer.copy_(source.read(name))


def release(module: nn.Module, prefix: str = "", exclude: Sequence[str] = ()) -> None:
    """Put parameters back on meta: their memory is free once nothing else refers to them."""
    for names, parameter in _tied_names(module, prefix, exclude):
        _set_parameter(module, names, torch.empty_like(parameter, device="meta"))


def _tied_names(
    module: nn.Module, prefix: str, exclude: Sequence[str]
) -> Iterator[tuple[list[str], nn.Parameter]]:
    """Parameters with a name under `prefix`, each once, with all its names in the module."""
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    if not any(_is_under(name, prefix, ()) for same in names.values() for name in same):
        raise ModelError(f"the module has no parameters under {prefix!r}.")
    for key, same in names.items():
        if any(_is_under(name, prefix, exclude) for name in same):
            yield same, parameters.pop(key)


def _is_under(name: str, prefix: str, exclude: Sequence[str]) -> bool:
    if any(name == other or name.startswith(other + ".") for other in exclude):
        return False
    return prefix == "" or name == prefix or name.startswith(prefix + ".")


def _set_parameter(module: nn.Module, names: Sequence[str], value: torch.Tensor) -> None:
    parameter = nn.Parameter(value, requires_grad=False)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)
