"""ModelMap: every parameter of a model in exactly one row, from its config and headers alone.

The map is what all later stages agree on: which weights exist, which read one input, which blocks
repeat, what is kept and why, and how many bytes each part has now. It holds no tensors and is
written as JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

from quantlib.errors import ModelError
from quantlib.models.claims import claim
from quantlib.models.compose import flatten
from quantlib.models.rows import ComponentSummary, CoverageRow, Kept, LinearGroup, Stack, Weight
from quantlib.models.source import Source
from quantlib.models.tables import find

__all__ = ["ComponentSummary", "CoverageRow", "Kept", "LinearGroup", "ModelMap", "Stack", "Weight"]

JSON_VERSION = 1

Row = TypeVar("Row", Weight, LinearGroup, Kept, Stack)


@dataclass(frozen=True)
class ModelMap:
    """Rows of one model, in the order of its module. Equal maps describe the same model.

    blocks:      names of the repeated blocks, in order: of the language model, where there is one,
                 of the only encoder otherwise. `calibration.stream` runs a language model by them.
    stacks:      repeated blocks of the other components (a vision tower, an image decoder).
    generic:     the family was derived from the module, not read from a table.
    fingerprint: of the source it was made from.
    """

    model_type: str
    architecture: str
    fingerprint: str
    generic: bool
    blocks: tuple[str, ...]
    weights: tuple[Weight, ...]
    groups: tuple[LinearGroup, ...]
    kept: tuple[Kept, ...]
    stacks: tuple[Stack, ...] = ()

    @staticmethod
    def from_source(source: Source, allow_unclaimed: Sequence[str] = ()) -> ModelMap:
        """Map a source, from its headers (two stored copies of a tied embedding are compared).

        allow_unclaimed: fnmatch patterns of parameters and tensors that need no rule; they are kept
                         as they are.
        Raises ModelError naming the parameter, tensor or rule that does not fit.
        """
        # imported here: a map read back from its file needs no transformers
        from quantlib.models import skeleton
        from quantlib.models.generic import derive_family

        module = skeleton.build(source)
        known = find(source.model_type)
        family = flatten(known, source.config, find) if known else derive_family(module)
        claims = claim(family, module, source, allow_unclaimed)
        return ModelMap(
            model_type=source.model_type,
            architecture=type(module).__name__,
            fingerprint=source.fingerprint,
            generic=known is None,
            blocks=claims.blocks,
            weights=tuple(claims.weights),
            groups=tuple(claims.groups),
            kept=tuple(claims.kept),
            stacks=tuple(claims.stacks),
        )

    def weight(self, name: str) -> Weight:
        """The weight of this name or alias. Raises ModelError when it is none (or kept)."""
        if name not in self._weights:
            kept = any(name in (row.name, *row.aliases) for row in self.kept)
            what = "is kept as it is, not quantized" if kept else "is not a weight of this model"
            raise ModelError(f"{name} {what}.")
        return self._weights[name]

    def group(self, name: str) -> LinearGroup:
        """The group of this name. Raises ModelError when there is none."""
        if name not in self._groups:
            raise ModelError(f"this model has no linear group {name}.")
        return self._groups[name]

    def members(self, group: LinearGroup) -> tuple[Weight, ...]:
        """The weights of a group, in its order."""
        return tuple(self.weight(name) for name in group.members)

    def groups_in(self, block: str | None) -> tuple[LinearGroup, ...]:
        """Groups of one block; those outside all blocks for None."""
        return tuple(group for group in self.groups if group.block == block)

    def weights_in(self, block: str | None) -> tuple[Weight, ...]:
        """Weights of one block; those outside all blocks for None."""
        return tuple(weight for weight in self.weights if weight.block == block)

    def keeping(self, components: Iterable[str], reason: str) -> ModelMap:
        """This map with the weights of these components kept, for `reason`: what calibration will
        not reach, or what a comparison leaves alone.

        Raises ModelError for a component that the model does not have.
        """
        chosen = set(components)
        known = [component.name for component in self.components()]
        unknown = sorted(chosen.difference(known))
        if unknown:
            raise ModelError(
                f"this model has no component {unknown[0]}; it has {', '.join(known)}."
            )
        names = [row.name for row in self.weights if row.component in chosen]
        return self.keeping_weights(names, reason)

    def keeping_weights(self, names: Iterable[str], reason: str) -> ModelMap:
        """This map with the weights of these names kept, for `reason`. What is left of a group is
        one. Raises ModelError for a name that is no weight."""
        chosen = {self.weight(name).name for name in names}
        groups = []
        for group in self.groups:
            left = tuple(name for name in group.members if name not in chosen)
            if left:
                groups.append(replace(group, members=left) if left != group.members else group)
        kept = [_as_kept(row, reason) for row in self.weights if row.name in chosen]
        return replace(
            self,
            weights=tuple(row for row in self.weights if row.name not in chosen),
            groups=tuple(groups),
            kept=(*self.kept, *kept),
        )

    @property
    def parameters(self) -> int:
        """Numbers in the model, a tied tensor counted once."""
        return sum(row.parameters for row in self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of these parameters on disk."""
        return sum(row.nbytes for row in self._rows)

    def coverage(self) -> list[CoverageRow]:
        """One row per parameter, the weights first; they add up to the model's parameters."""
        return [
            CoverageRow(
                component=row.component,
                group=row.group if isinstance(row, Weight) else "",
                name=row.name,
                shape=row.stored_shape if isinstance(row, Weight) else row.shape,
                parameters=row.parameters,
                bytes=row.nbytes,
                role=_role(row),
            )
            for row in self._rows
        ]

    def components(self) -> list[ComponentSummary]:
        """Parameters and bytes of each component, in order of appearance."""
        names = dict.fromkeys(row.component for row in self._rows)
        total = self.nbytes
        summaries = []
        for name in names:
            rows = [row for row in self._rows if row.component == name]
            nbytes = sum(row.nbytes for row in rows)
            parameters = sum(row.parameters for row in rows)
            summaries.append(ComponentSummary(name, parameters, nbytes, nbytes / total))
        return summaries

    def to_json(self) -> dict[str, Any]:
        """The map as plain JSON values. What only models of several stacks have is left out of the
        others: their file is what it was before there were such models."""
        stacks = {"stacks": [asdict(stack) for stack in self.stacks]} if self.stacks else {}
        return {
            "version": JSON_VERSION,
            "model_type": self.model_type,
            "architecture": self.architecture,
            "fingerprint": self.fingerprint,
            "generic": self.generic,
            "blocks": list(self.blocks),
            "weights": [_weight_json(row) for row in self.weights],
            "groups": [asdict(row) for row in self.groups],
            "kept": [asdict(row) for row in self.kept],
            **stacks,
        }

    @staticmethod
    def from_json(data: Any) -> ModelMap:
        """Inverse of `to_json`. Raises ModelError when the data is not a map of this version."""
        try:
            if data["version"] != JSON_VERSION:
                raise ModelError(
                    f"the model map has version {data['version']}, this quantlib reads "
                    f"{JSON_VERSION}: inspect the model again."
                )
            return ModelMap(
                model_type=str(data["model_type"]),
                architecture=str(data["architecture"]),
                fingerprint=str(data["fingerprint"]),
                generic=bool(data["generic"]),
                blocks=tuple(str(block) for block in data["blocks"]),
                weights=tuple(_row(Weight, row) for row in data["weights"]),
                groups=tuple(_row(LinearGroup, row) for row in data["groups"]),
                kept=tuple(_row(Kept, row) for row in data["kept"]),
                stacks=tuple(_row(Stack, row) for row in data.get("stacks", ())),
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ModelError(
                f"the model map is damaged ({error}): inspect the model again."
            ) from error

    @property
    def _rows(self) -> Iterable[Weight | Kept]:
        return (*self.weights, *self.kept)

    @cached_property
    def _weights(self) -> dict[str, Weight]:
        return {name: row for row in self.weights for name in (row.name, *row.aliases)}

    @cached_property
    def _groups(self) -> dict[str, LinearGroup]:
        return {group.name: group for group in self.groups}


def _role(row: Weight | Kept) -> str:
    if isinstance(row, Kept):
        return f"kept: {row.reason}"
    return "embedding and head" if row.head is not None else row.kind


def _as_kept(row: Weight, reason: str) -> Kept:
    return Kept(
        name=row.name,
        shape=row.stored_shape,
        reason=reason,
        component=row.component,
        block=row.block,
        dtype=row.dtype,
        nbytes=row.nbytes,
        aliases=row.aliases,
    )


def _weight_json(weight: Weight) -> dict[str, Any]:
    values = asdict(weight)
    if not weight.tensor_shape:
        del values["tensor_shape"]
    return values


def _row(kind: type[Row], data: dict[str, Any]) -> Row:
    """A row from its JSON object; JSON has no tuples, the rows have no lists."""
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in data.items()
    }
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise KeyError(f"unknown field {sorted(unknown)[0]}")
    return kind(**values)
