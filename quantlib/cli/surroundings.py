"""What a checkpoint says of how it runs, beside its weights: for `quantlib inspect`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlib.checkpoint.surroundings import Surroundings


def described(around: Surroundings) -> dict[str, Any]:
    """As JSON.

    kv:        formats of the KV cache by what a token is, or by attention module; {} when keys and
               values are kept as they are.
    kv_static: tensors of scales of images that are known beforehand.
    integers:  operator -> how many layers compute with it.
    rotated:   whether the model is in another basis.
    """
    from quantlib.kernels.nonlinear.operators import describe

    kv, static = {name: str(found.kv) for name, found in around.caches.items()}, 0
    if around.kv is not None:
        kv = {name: str(form) for name, form in around.kv.formats.items()}
        static = len(around.kv.static)
    return {
        "kv": kv,
        "kv_static": static,
        "integers": describe(around.nonlinear),
        "rotated": around.settings is not None,
    }


def rows(around: Surroundings) -> list[tuple[str, str]]:
    """The same as facts for people; nothing is said of what is not there."""
    found = described(around)
    told: list[tuple[str, str]] = []
    if around.kv is not None:
        formats = ", ".join(f"{name} {form}" for name, form in found["kv"].items())
        fixed = sorted({name.split(".")[1] for name in around.kv.static})
        scales = f"; scales of {', '.join(fixed)} known for every place" if fixed else ""
        told.append(("KV cache", formats + scales))
    elif found["kv"]:
        counts = Counter(found["kv"].values()).most_common()
        told.append(("KV cache", ", ".join(f"{form} in {n} layers" for form, n in counts)))
    if found["integers"]:
        layers = ", ".join(f"{count} {name}" for name, count in found["integers"].items())
        told.append(("in integers", layers))
    if found["rotated"]:
        told.append(("basis", "rotated"))
    return told
