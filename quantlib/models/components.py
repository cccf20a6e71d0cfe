"""The component table: what every part of a model weighs, and what in it is left as it is, and why.

One row for each component; in it, the tensors that are not quantized, by name (tensors that differ
only in the numbers of their blocks and experts together), each with its reason. The rows account
for every parameter: what stays in 16 bits cannot hide in a sum.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from quantlib.models.listing import together
from quantlib.models.modelmap import ModelMap
from quantlib.models.rows import Kept

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class KeptTensors:
    """Tensors of a component that are left as they are, for one reason.

    name:   with `*` in the place of numbers, where several differ only in these.
    count:  how many tensors. parameters, bytes: of all of them. dtype: as stored ("BF16").
    """

    name: str
    reason: str
    count: int
    parameters: int
    bytes: int
    dtype: str


@dataclass(frozen=True)
class Component:
    """One part of a model, everything counted.

    bytes, share, bits: as it is stored, its fraction of the model, and bits for each parameter.
    before:     bytes in the source.
    quantized:  parameters of the weights that are, or in a source will be, quantized.
    schemes:    scheme -> parameters in it; empty for a source.
    kept:       what is left as it is, largest first.
    """

    name: str
    parameters: int
    bytes: int
    share: float
    bits: float
    before: int
    quantized: int
    schemes: Mapping[str, int] = field(default_factory=dict)
    kept: tuple[KeptTensors, ...] = ()

    @property
    def kept_bytes(self) -> int:
        """Bytes of everything that is left as it is."""
        return sum(row.bytes for row in self.kept)


def component_table(
    model_map: ModelMap,
    sizes: Mapping[str, int] | None = None,
    schemes: Mapping[str, str] | None = None,
) -> list[Component]:
    """All components, in the order of the model.

    sizes:   weight -> bytes it takes now; the source's where it is left out.
    schemes: weight -> scheme it has now.
    """
    sizes, schemes = sizes or {}, schemes or {}
    rows = []
    for summary in model_map.components():
        weights = [row for row in model_map.weights if row.component == summary.name]
        kept = [row for row in model_map.kept if row.component == summary.name]
        used = Counter[str]()
        for row in weights:
            if row.name in schemes:
                used[schemes[row.name]] += row.parameters
        nbytes = sum(sizes.get(row.name, row.nbytes) for row in weights)
        nbytes += sum(row.nbytes for row in kept)
        rows.append(
            Component(
                name=summary.name,
                parameters=summary.parameters,
                bytes=nbytes,
                share=0.0,
                bits=8 * nbytes / summary.parameters,
                before=summary.bytes,
                quantized=sum(row.parameters for row in weights),
                schemes=dict(used.most_common()),
                kept=_grouped(kept),
            )
        )
    total = sum(row.bytes for row in rows)
    return [replace(row, share=row.bytes / total) for row in rows]


def by_reason(kept: Iterable[KeptTensors]) -> list[KeptTensors]:
    """Tensors of one reason and dtype as one row, whose name has all of theirs in it: shorter than
    `Component.kept`, and as complete."""
    groups: dict[tuple[str, str], list[KeptTensors]] = {}
    for row in kept:
        groups.setdefault((row.reason, row.dtype), []).append(row)
    return [
        KeptTensors(
            name=together([row.name for row in rows]),
            reason=reason,
            count=sum(row.count for row in rows),
            parameters=sum(row.parameters for row in rows),
            bytes=sum(row.bytes for row in rows),
            dtype=dtype,
        )
        for (reason, dtype), rows in groups.items()
    ]


def _grouped(kept: Iterable[Kept]) -> tuple[KeptTensors, ...]:
    """Tensors of one name but for its numbers, one dtype and one reason together."""
    groups: dict[tuple[str, str, str], list[Kept]] = {}
    for row in kept:
        key = _NUMBER.sub("*", row.name), row.reason, row.dtype
        groups.setdefault(key, []).append(row)
    found = [
        KeptTensors(
            name=name if len(rows) > 1 else rows[0].name,
            reason=reason,
            count=len(rows),
            parameters=sum(row.parameters for row in rows),
            bytes=sum(row.nbytes for row in rows),
            dtype=dtype,
        )
        for (name, reason, dtype), rows in groups.items()
    ]
    return tuple(sorted(found, key=lambda row: -row.bytes))
