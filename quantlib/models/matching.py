"""The module's parameters against the tensors on disk: same names, same shapes, usable dtypes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from quantlib.errors import ModelError
from quantlib.models.headers import WEIGHT_DTYPES
from quantlib.models.listing import some
from quantlib.models.source import Source
from quantlib.models.stored import StoredParameter


@dataclass(frozen=True)
class Parameter:
    """A parameter of the module; `name` is the one on disk, `names` are all (several when tied)."""

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def aliases(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name != self.name)


@dataclass(frozen=True)
class Match:
    """Parameters in the module's order, and what else is on disk: buffers, and strangers."""

    parameters: tuple[Parameter, ...]
    buffers: tuple[StoredParameter, ...]
    strangers: tuple[StoredParameter, ...]


def match(module: nn.Module, source: Source) -> Match:
    """Find every parameter of `module` on disk.

    Raises ModelError when one is missing, has another shape, or a dtype that holds no weights.
    """
    names: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
        shapes[id(tensor)] = tuple(tensor.shape)
    known = {name for same in names.values() for name in same}
    buffer_names = set(module.state_dict().keys()) - known
    others = [stored for name, stored in source.parameters.items() if name not in known]
    buffers = tuple(stored for stored in others if stored.name in buffer_names)
    strangers = tuple(stored for stored in others if stored.name not in buffer_names)
    missing = [same[0] for same in names.values() if not source.parameters.keys() & set(same)]
    if missing:
        unused = some([stored.name for stored in strangers])
        hint = f"; on disk, but not in the module: {unused}" if strangers else ""
        raise ModelError(
            f"{source.path} lacks {len(missing)} parameters of {type(module).__name__} "
            f"({some(missing)}){hint}."
        )
    parameters = tuple(_parameter(same, shapes[key], source) for key, same in names.items())
    return Match(parameters, buffers, strangers)


def _parameter(names: list[str], shape: tuple[int, ...], source: Source) -> Parameter:
    name = next(name for name in names if name in source.parameters)
    stored = source.parameters[name]
    if stored.shape != shape:
        raise ModelError(
            f"{name} has shape {list(stored.shape)} in {source.path}, config.json asks for "
            f"{list(shape)}: config and weights belong to different models."
        )
    if stored.dtype not in WEIGHT_DTYPES:
        raise ModelError(
            f"{name} is stored as {stored.dtype}; weights must be {', '.join(WEIGHT_DTYPES)}. "
            "If the model is quantized, give the one it was made from."
        )
    return Parameter(name, tuple(names), shape, stored.dtype, stored.nbytes)
