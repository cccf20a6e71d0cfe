"""A rotation applied to a model: to one in memory, or to a source whose parameters are rotated when
they are read.

`RotatedSource` is a `Source`: calibration, search and rounding run on it and never know. What no
weight can hold (`online.py`) is attached wherever its module is built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlib.errors import ModelError
from quantlib.models import skeleton
from quantlib.models.source import Source
from quantlib.models.stored import StoredParameter
from quantlib.transforms import online
from quantlib.transforms.binding import wire
from quantlib.transforms.changes import Change, changed, changed_stack, changes
from quantlib.transforms.rotation import Rotation
from quantlib.transforms.wiring import Wiring


@torch.no_grad()
def rotate_module(model: PreTrainedModel, wiring: Wiring, rotation: Rotation) -> None:
    """Rotate a model in memory: its parameters in place, in their dtype, and `online.attach`.

    Raises TransformError, with the model unchanged, when the rotation does not belong to it.
    """
    found = changes(wiring, rotation)
    online.refuse_twice(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # Matrices depend on vectors (gains) and biases on matrices: vectors as they were are kept.
    before = {name: p.clone() for name, p in parameters.items() if p.ndim == 1}

    def read(name: str, expert: int | None) -> Tensor:
        tensor = before[name] if name in before else parameters[name]
        return tensor if expert is None else tensor[expert]

    for name in sorted(found, key=lambda name: parameters[name].ndim):
        parameter, change = parameters[name], found[name]
        if parameter.ndim == 3:
            for expert, matrix in enumerate(parameter):
                matrix.copy_(changed(name, change, read, expert))
        else:
            parameter.copy_(changed(name, change, read))
    online.attach(model, wiring, rotation)


@dataclass(frozen=True)
class RotatedSource(Source):
    """A source in other bases. Use `RotatedSource.of`.

    parameters:  changed ones are float32, whatever they are stored in.
    fingerprint: covers the original's and all of the rotation.
    path, config, headers, file_bytes: the original's.

    Nothing is kept: `read` computes one parameter from its original. That takes, beside the result
    and the bases, the memory `changes.changed` tells: for a matrix whose rows are mixed, its
    float64 copies (one expert's, for a stack); for the others, embeddings included, a slice.
    """

    original: Source
    rotation: Rotation
    wiring: Wiring
    changes: Mapping[str, Change]

    @staticmethod
    def of(source: Source, rotation: Rotation) -> RotatedSource:
        """The source rotated. Raises ModelError when its family's wiring is not known, and
        TransformError when the rotation was not made for it."""
        if isinstance(source, RotatedSource):
            raise ModelError(f"{source.path} is rotated already: rotate the original.")
        wiring = wire(skeleton.build(source))
        found = changes(wiring, rotation)
        identity = f"{source.fingerprint}\0{rotation.content_hash}"
        return RotatedSource(
            path=source.path,
            config=source.config,
            headers=source.headers,
            parameters={
                name: _as_float32(stored, found.get(name))
                for name, stored in source.parameters.items()
            },
            fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
            file_bytes=source.file_bytes,
            original=source,
            rotation=rotation,
            wiring=wiring,
            changes=found,
        )

    def read_raw(self, name: str, expert: int | None = None) -> Tensor:
        """As `Source.read_raw`; a parameter that a rotation changes is float32."""
        change = self.changes.get(name)
        if change is None:
            return self.original.read_raw(name, expert)
        shape = self.parameters[name].shape
        if len(shape) == 3 and expert is None:
            return changed_stack(name, change, self.original.read, shape)
        return changed(name, change, self.original.read, expert)

    def same_data(self, first: str, second: str) -> bool:
        """Whether two parameters hold the same values: so they do if they did in the original, as
        tied ones are never changed."""
        return self.original.same_data(first, second)

    def attach(self, model: nn.Module) -> None:
        """Add to the module what its rotated parameters need beside them."""
        if not isinstance(model, PreTrainedModel):
            raise ModelError("only transformers models can be rotated.")
        online.attach(model, self.wiring, self.rotation)


def _as_float32(stored: StoredParameter, change: Change | None) -> StoredParameter:
    if change is None or isinstance(change.constant, float):
        return stored
    size = torch.Size(stored.shape).numel()
    return replace(stored, dtype="F32", nbytes=size * torch.float32.itemsize)
