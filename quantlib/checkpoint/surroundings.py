"""What a checkpoint says of everything around its weights, as entries of `quantization_config`.

    clips       {weight: [0.95, 1.0]}: the share of the range that is kept when the weight's inputs
                are rounded, one for each activation segment of its scheme; left out: 1 for all
    orders      [weight]: those whose columns are not in their inputs' order; the tensor
                `X.weight_order`, int32 [K], holds it (`formats.weight.ORDER`)
    transforms  {"rotation": {"tensors": {"residual": "quantlib_rotation.residual"}, ...}}: the
                bases that are applied while the model runs, as `Rotation.to_tensors` gives them:
                the names of tensors in the files, in float32, and settings
    caches      {attention module: {"kv": "int4h16r", "sinks": 4, "query_bits": 0}}: how keys and
                values are rounded, but for so many first tokens, and queries with them
    nonlinear   {layer: {"kind": "gelu", "method": "ivit8", "scale": 0.02}}: layers of encoders that
                compute softmax, GELU or LayerNorm in integers (`kernels.nonlinear`)
    kv_modalities  formats of the KV cache by what a token is (`cache_formats`); instead of caches

Entries that would be empty are left out. All are checked when a checkpoint is opened; what needs
values (an order that is none, a basis that is not orthogonal) when those are read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantlib.checkpoint.cache_formats import CacheFormats
from quantlib.errors import CheckpointError, FormatError, TransformError
from quantlib.formats.activation import AS_THEY_ARE, ActivationFormat, ActivationSegment, with_clips
from quantlib.formats.scheme import Scheme
from quantlib.kernels.kv_format import KvFormat
from quantlib.kernels.nonlinear import Operator
from quantlib.transforms.rotation import Rotation

ENTRIES = ("clips", "orders", "transforms", "caches", "nonlinear", "kv_modalities")
PREFIX = "quantlib_rotation."
"""What the names of a rotation's tensors begin with. No module of a model is named so."""
STORED = torch.float32
"""Of a rotation's tensors: half of float64's bytes, and orthogonal to 1e-7."""


@dataclass(frozen=True)
class CacheSettings:
    """What is done to the keys and values of one attention module (`transforms.AttentionState`).

    kv:         the format of its cache.
    sinks:      so many first tokens are kept as they are, or as many as `kv` keeps so, whichever is
                more.
    query_bits: bits of its queries; 0: not rounded.
    """

    kv: KvFormat
    sinks: int = 0
    query_bits: int = 0

    @staticmethod
    def parse(name: str, given: Any) -> CacheSettings:
        """From JSON values. Raises CheckpointError, naming the module, when they are none."""
        try:
            numbers = {key: given[key] for key in ("sinks", "query_bits")}
            if set(given) != {"kv", *numbers} or any(type(n) is not int for n in numbers.values()):
                raise ValueError(f"{given!r}")
            if numbers["sinks"] < 0 or numbers["query_bits"] not in (0, *range(2, 9)):
                raise ValueError(f"{given!r}")
            return CacheSettings(KvFormat.parse(given["kv"]), **numbers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(f"the cache of {name}: {error}") from error
        except FormatError as error:
            raise CheckpointError(f"the cache of {name}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The inverse of `parse`."""
        return {"kv": str(self.kv), "sinks": self.sinks, "query_bits": self.query_bits}


@dataclass(frozen=True)
class Surroundings:
    """The entries, read and checked against schemes and shapes.

    clips:    weight -> clip factors.
    orders:   weights with an order.
    tensors:  a rotation's name of a tensor -> the name in the files.
    settings: the rest of the rotation, None when there is none.
    caches:   attention module -> what is done to its keys and values.
    nonlinear: layer -> what it computes in integers.
    kv:       formats of the KV cache by modality, if it has such.
    """

    clips: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    orders: frozenset[str] = frozenset()
    tensors: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    caches: Mapping[str, CacheSettings] = field(default_factory=dict)
    nonlinear: Mapping[str, Operator] = field(default_factory=dict)
    kv: CacheFormats | None = None


def entries(
    clips: Mapping[str, Sequence[float]],
    orders: Collection[str],
    rotation: Rotation | None,
    caches: Mapping[str, CacheSettings],
    nonlinear: Mapping[str, Operator] | None = None,
    kv: CacheFormats | None = None,
) -> dict[str, Any]:
    """The entries of `quantization_config`; `read` is the inverse."""
    found: dict[str, Any] = {}
    if clips:
        found["clips"] = {name: [float(clip) for clip in clips[name]] for name in sorted(clips)}
    if orders:
        found["orders"] = sorted(orders)
    if rotation is not None:
        tensors, settings = rotation.to_tensors()
        names = {name: PREFIX + name for name in sorted(tensors)}
        found["transforms"] = {"rotation": {"tensors": names, **settings}}
    if caches:
        found["caches"] = {name: caches[name].to_json() for name in sorted(caches)}
    if nonlinear:
        found["nonlinear"] = {name: nonlinear[name].to_json() for name in sorted(nonlinear)}
    if kv is not None:
        found["kv_modalities"] = kv.to_json()
    return found


def rotation_tensors(rotation: Rotation | None) -> dict[str, Tensor]:
    """The tensors of a rotation by the name they have in a checkpoint's files, float32."""
    tensors = rotation.to_tensors()[0] if rotation is not None else {}
    return {PREFIX + name: tensor.to(STORED) for name, tensor in tensors.items()}


def is_known_to_version_1(scheme: Scheme) -> bool:
    """Whether a scheme could be written before columns had formats of their own."""
    return scheme.high is None and scheme.activation in (AS_THEY_ARE, ActivationFormat(8))


def is_known_to_version_2(scheme: Scheme) -> bool:
    """Whether a scheme could be written before weights were several matrices, columns had three
    widths, and integers shared exponents."""
    formats = [scheme.weight, *(block.format for block in scheme.rows)]
    shared = any(form is not None and form.shares_exponent for form in formats)
    return not (scheme.is_composite or scheme.higher or shared)


def read(
    described: Mapping[str, Any],
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, ...]],
) -> Surroundings:
    """The entries of a `quantization_config`.

    Raises CheckpointError, not naming the file, when one is of another form, names a weight that
    there is not or that has no use for it, or has values that are none.
    """
    clips, orders = described.get("clips", {}), described.get("orders", [])
    transforms, caches = described.get("transforms", {}), described.get("caches", {})
    if not isinstance(clips, dict) or not isinstance(orders, list):
        raise _damaged("clips are no mapping, or orders no list")
    for name in (*clips, *orders):
        if name not in schemes or schemes[name].weight is None:
            raise CheckpointError(
                f"clip factors or an order are given for {name}, which is no packed weight of it"
            )
    checked = {}
    for name, given in clips.items():
        try:
            checked[name] = tuple(float(clip) for clip in given)
            with_clips(schemes[name].activations(shapes[name][-1]), checked[name])
        except (TypeError, ValueError) as error:
            raise _damaged(f"the clip factors of {name} are {given!r}") from error
        except FormatError as error:
            raise CheckpointError(f"clip factors of {name} ({schemes[name]}): {error}") from error
    tensors, settings = _read_transforms(transforms)
    if not isinstance(caches, dict):
        raise _damaged("caches are no mapping")
    parsed = {name: CacheSettings.parse(name, given) for name, given in caches.items()}
    operators = _read_nonlinear(described.get("nonlinear", {}))
    kv = None
    if "kv_modalities" in described:
        kv = CacheFormats.parse(described["kv_modalities"])
        if parsed:
            raise _damaged("caches are given by module and by modality")
    return Surroundings(checked, frozenset(orders), tensors, settings, parsed, operators, kv)


def _read_nonlinear(given: Any) -> dict[str, Operator]:
    if not isinstance(given, dict):
        raise _damaged("nonlinear is no mapping")
    found = {}
    for name, operator in given.items():
        try:
            found[name] = Operator.parse(operator)
        except FormatError as error:
            raise CheckpointError(f"the integer operator of {name}: {error}") from error
    return found


def _read_transforms(transforms: Any) -> tuple[dict[str, str], dict[str, Any] | None]:
    if not isinstance(transforms, dict):
        raise _damaged("transforms are no mapping")
    unknown = transforms.keys() - {"rotation"}
    if unknown:
        raise CheckpointError(
            f"the model is changed by {min(unknown)!r}, which this quantlib does not know: update "
            "quantlib"
        )
    if "rotation" not in transforms:
        return {}, None
    rotation = transforms["rotation"]
    tensors = rotation.get("tensors") if isinstance(rotation, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(text, str) for pair in tensors.items() for text in pair
    ):
        raise _damaged("the rotation does not name its tensors")
    settings = {key: value for key, value in rotation.items() if key != "tensors"}
    make_rotation({}, settings)  # raises on settings that are none
    return tensors, settings


def activations(
    surroundings: Surroundings, weight: str, scheme: Scheme, columns: int
) -> tuple[ActivationSegment, ...]:
    """How the inputs of a weight are rounded: as its scheme says, with its clip factors."""
    segments = scheme.activations(columns)
    clips = surroundings.clips.get(weight)
    return segments if clips is None else with_clips(segments, clips)


def check_order(weight: str, order: Tensor) -> None:
    """Raise CheckpointError unless int32 `order` [K] has each of 0..K-1 once."""
    every = torch.arange(len(order), dtype=order.dtype, device=order.device)
    if not torch.equal(order.sort().values, every):
        raise CheckpointError(
            f"the order of the inputs of {weight} does not name each of {len(order)} inputs once: "
            "the checkpoint is damaged, make it again"
        )


def make_rotation(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Rotation:
    """The rotation of a checkpoint from its float32 tensors. Raises CheckpointError on settings of
    another form, or of a newer quantlib."""
    try:
        return Rotation.from_tensors({n: t.double() for n, t in tensors.items()}, settings)
    except TransformError as error:
        raise CheckpointError(f"transforms.rotation: {error}") from error


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"its quantization_config is damaged ({what}): make it again")
