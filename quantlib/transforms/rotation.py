"""Rotation: the bases a model is changed to, as data, and the file it is kept in.

A basis is an orthogonal matrix U; vectors are rows, so `x_rotated = x @ U`. What is done with it is
`apply.py`'s and `online.py`'s business; how it is found, `bases.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantlib.errors import TransformError
from quantlib.transforms import hadamard
from quantlib.transforms.means import check_means
from quantlib.transforms.wiring import DECODER, ENCODER, Hidden, Wiring

VERSION, WITH_MEANS = 2, 3
_READ = (1, VERSION, WITH_MEANS)
"""Version 1 knows no order of hidden channels, and none that a Hadamard matrix leaves alone; only
rotations with means are of version 3."""
_METADATA = "quantlib_rotation"
_ORDER = "hidden_order."
MEAN = "mean."
"""What names of means begin with among a rotation's tensors."""
_ORTHOGONAL = 1e-6
"""Largest |U^T U - I| of a basis: far above float64's rounding, far below what a model notices."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """Bases of one model; everything left out stays as it is. Bases are float64.

    residual:   [D, D], of the residual stream (of the decoder, where there is an encoder too).
    encoder:    [D, D], of an encoder's residual stream.
    value:      attention -> [H_kv, d, d], of each head's values; fused into value and output
                projections. Attentions are named as in `wiring.Attention`: by their block.
    key:        attention -> [d, d], or [H_kv, d, d], of queries and keys after RoPE; online.
    hidden:     block -> Hadamard block size at the down projection's input; online, its inverse
                fused.
    hidden_order: block -> int64 [I]: channel j of the hidden layer is `order[j]` of the original;
                fused into what writes and reads it.
    hidden_high: block -> how many channels, the last ones, the Hadamard matrices leave alone; left
                out: 0. Their blocks cover the others (`hadamard.covers`). Channels that stand out
                belong there: a Hadamard matrix would add their energy to every other column.
    fold_norms: gains of the norms move into the linears that read them. A stream with a basis needs
                that and does it anyway; by itself it is a change of scale between columns.
    means:      what is taken out of linears' inputs and put into biases (`means.py`), float64 in
                the original coordinates: norm (folded, without gain and bias) -> [D]; output
                projection's weight -> [H_kv, d], of values; down projection's weight -> [I].
    """

    residual: Tensor | None = None
    value: Mapping[str, Tensor] = field(default_factory=dict)
    key: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Mapping[str, int] = field(default_factory=dict)
    encoder: Tensor | None = None
    fold_norms: bool = False
    hidden_order: Mapping[str, Tensor] = field(default_factory=dict)
    hidden_high: Mapping[str, int] = field(default_factory=dict)
    means: Mapping[str, Tensor] = field(default_factory=dict)

    def basis(self, stream: str) -> Tensor | None:
        """The basis of a residual stream, by the stream's name."""
        return {DECODER: self.residual, ENCODER: self.encoder}[stream]

    def folds(self, stream: str) -> bool:
        """Whether the gains of a stream's norms move into their readers."""
        return self.fold_norms or self.basis(stream) is not None

    def check(self, wiring: Wiring) -> None:
        """Raise TransformError unless this is a rotation of a model with that wiring."""
        for name in (DECODER, ENCODER):
            _check_stream(name, self.basis(name), wiring)
        for kind, bases in (("value", self.value), ("key", self.key)):
            for name, basis in bases.items():
                _check_heads(kind, name, basis, wiring)
        for name in sorted({*self.hidden, *self.hidden_order, *self.hidden_high}):
            site = _hidden_site(name, wiring)
            _check_hidden(site, self.hidden.get(name, 1), self.hidden_high.get(name, 0))
            if name in self.hidden_order:
                _check_order(site, self.hidden_order[name])
        check_means(self.means, wiring, self.folds)

    def hidden_mean(self, site: Hidden) -> Tensor | None:
        """What is subtracted from a hidden layer while the model runs, in the order of its
        channels there; None for nothing."""
        mean, order = self.means.get(site.down.weight), self.hidden_order.get(site.name)
        return mean if mean is None or order is None else mean[order]

    def online(self, wiring: Wiring) -> Rotation:
        """The part that `online.attach` needs beside weights that were rotated already: what a
        packed checkpoint stores."""
        kept = {
            stream.name: self.basis(stream.name)
            for stream in wiring.streams
            if stream.enters or stream.leaves is not None or stream.centred
        }
        return Rotation(
            residual=kept.get(DECODER),
            key=self.key,
            hidden=self.hidden,
            encoder=kept.get(ENCODER),
            hidden_high=self.hidden_high,
            means={
                site.down.weight: mean
                for site in wiring.hiddens
                if (mean := self.hidden_mean(site)) is not None
            },
        )

    @cached_property
    def content_hash(self) -> str:
        """sha256 (hex) of everything in it: equal rotations have equal hashes."""
        tensors, settings = self.to_tensors()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(f"\0{name}\0{list(tensors[name].shape)}\0".encode())
            digest.update(tensors[name].numpy().tobytes())
        return digest.hexdigest()

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(float64 bases and means, int64 orders by name; the rest as JSON values). `from_tensors`
        is the inverse."""
        named = {"residual": self.residual, "encoder": self.encoder}
        named |= {f"value.{name}": basis for name, basis in self.value.items()}
        named |= {f"key.{name}": basis for name, basis in self.key.items()}
        tensors = {
            name: basis.detach().to("cpu", torch.float64).contiguous()
            for name, basis in named.items()
            if basis is not None
        }
        for name, order in self.hidden_order.items():
            tensors[_ORDER + name] = order.detach().to("cpu", torch.int64).contiguous()
        for name, mean in self.means.items():
            tensors[MEAN + name] = mean.detach().to("cpu", torch.float64).contiguous()
        settings = {
            "version": WITH_MEANS if self.means else VERSION,
            "hidden": dict(sorted(self.hidden.items())),
            "hidden_high": dict(sorted(self.hidden_high.items())),
            "fold_norms": self.fold_norms,
        }
        return tensors, settings

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Rotation:
        """Inverse of `to_tensors`, for its tensors in any dtype that holds them. Raises
        TransformError when the settings are of no rotation."""
        try:
            if settings["version"] not in _READ:
                raise TransformError(
                    f"the rotation has version {settings['version']}, this quantlib reads "
                    f"{_READ[0]} to {_READ[-1]}: compute it again."
                )
            return Rotation(
                residual=tensors.get("residual"),
                value=_below("value.", tensors),
                key=_below("key.", tensors),
                hidden=_counts(settings["hidden"]),
                encoder=tensors.get("encoder"),
                fold_norms=bool(settings["fold_norms"]),
                hidden_order={n: t.to(torch.int64) for n, t in _below(_ORDER, tensors).items()},
                hidden_high=_counts(settings["hidden_high"] if settings["version"] > 1 else {}),
                means=_below(MEAN, tensors),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TransformError(
                f"the rotation's settings are damaged ({error!r}): compute it again."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write it to one safetensors file, whole or not at all."""
        tensors, settings = self.to_tensors()
        temporary = Path(f"{path}.part")
        try:
            save_file(tensors, temporary, metadata={_METADATA: json.dumps(settings)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> Rotation:
        """Read what `save` wrote. Raises TransformError when the file holds no rotation."""
        try:
            with safe_open(path, framework="pt") as file:
                settings = json.loads((file.metadata() or {})[_METADATA])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except OSError as error:
            raise TransformError(f"{path} cannot be read: {error.strerror or error}.") from error
        except (SafetensorError, KeyError, ValueError) as error:
            raise TransformError(f"{path} holds no rotation of quantlib's.") from error
        return Rotation.from_tensors(tensors, settings)


def _counts(given: Mapping[str, Any]) -> dict[str, int]:
    return {str(name): int(count) for name, count in given.items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _check_stream(name: str, basis: Tensor | None, wiring: Wiring) -> None:
    if basis is None:
        return
    stream = wiring.stream(name)
    if stream is None:
        raise TransformError(
            f"the rotation has a basis of the {name}'s residual stream, and this "
            f"{wiring.model_type} has no {name}: it was made for another model."
        )
    if stream.obstacle:
        raise TransformError(stream.obstacle)
    _check_orthogonal(f"the {name}'s residual basis", basis, (stream.width,) * 2)


def _check_heads(kind: str, name: str, basis: Tensor, wiring: Wiring) -> None:
    attention = wiring.attention(name)
    if attention is None:
        raise TransformError(
            f"the rotation has a {kind} basis of {name}, and this {wiring.model_type} has no such "
            "attention: it was made for another model."
        )
    square = (attention.head_dim,) * 2
    single = kind == "key" and basis.ndim == 2
    _check_orthogonal(
        f"the {kind} basis of {name}", basis, square if single else (attention.kv_heads, *square)
    )


def _hidden_site(name: str, wiring: Wiring) -> Hidden:
    site = wiring.hidden(name)
    if site is None:
        raise TransformError(
            f"the rotation changes the hidden layer of {name}, and this {wiring.model_type} has "
            "no such block: it was made for another model."
        )
    return site


def _check_hidden(site: Hidden, size: int, high: int) -> None:
    if not 0 <= high < site.width:
        raise TransformError(
            f"{high} of the {site.width} columns of {site.down.weight} cannot be left out of its "
            f"Hadamard matrices: leave out 0 to {site.width - 1}, or have no such matrices."
        )
    columns = site.width - high
    if not hadamard.covers(size, columns):
        which = f"the first {columns} of {site.width}" if high else f"the {columns}"
        raise TransformError(
            f"Hadamard blocks of {size} do not divide {which} columns of {site.down.weight}: use "
            f"{hadamard.block_size(columns)}."
        )
    hadamard.split(size)


def _check_order(site: Hidden, order: Tensor) -> None:
    every = torch.arange(site.width, device=order.device)
    if order.dtype != torch.int64 or not torch.equal(order.sort().values, every):
        raise TransformError(
            f"the order of {site.name}'s hidden channels, {order.dtype} {list(order.shape)}, does "
            f"not name each of {site.width} channels once: it was made for another model, or is "
            "damaged."
        )


def _check_orthogonal(what: str, basis: Tensor, shape: tuple[int, ...]) -> None:
    """Raise TransformError unless `basis` has this shape and orthonormal columns."""
    if tuple(basis.shape) != shape:
        raise TransformError(
            f"{what} is {list(basis.shape)}, this model needs {list(shape)}: it was made for "
            "another model."
        )
    exact = basis.double()
    identity = torch.eye(shape[-1], dtype=torch.float64, device=basis.device)
    error = float((exact.mT @ exact - identity).abs().max())
    if not error <= _ORTHOGONAL:  # a nan is no rotation either
        raise TransformError(
            f"{what} is not orthogonal: U^T U differs from the identity by {error:.1e} (at most "
            f"{_ORTHOGONAL:.0e}). Compute it in float64, or orthogonalize it."
        )
