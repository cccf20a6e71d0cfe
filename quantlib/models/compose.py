"""A family of several models as one flat table: each Submodel replaced by what its own table says.

LLaVA's table knows that there are a vision tower, a projector and a language model, and where. What
is inside the tower depends on the tower's config, and is written in the tower's own table, whose
names are moved below the tower's place. What comes out is a `Family` without Submodels, so mapping
a model (`claims.py`) knows nothing of composition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quantlib.errors import ModelError
from quantlib.models.families import DiskRules, Family, GroupRule, KeptRule, Part, Submodel

Find = Callable[[str], Family | None]
"""The table of a model type (`tables.find`)."""


def flatten(family: Family, config: Mapping[str, Any], find: Find) -> Family:
    """`family` for a model of this config: without Submodels, all names those of the whole model.

    A family without Submodels is returned as it is. Raises ModelError when a part has no table.
    """
    for submodel in (*([family.language] if family.language else []), *family.parts):
        if not isinstance(submodel, Submodel):
            continue
        inner_config = _config_at(config, submodel.config)
        inner = flatten(_table_of(family, submodel, inner_config, find), inner_config, find)
        moved = _moved(inner, submodel.prefix)
        if submodel is family.language:
            family = replace(
                family,
                language=None,
                blocks=moved.blocks,
                groups=moved.groups,
                embeddings=moved.embeddings,
                component=moved.component,
            )
        else:
            family = replace(family, parts=_without(family, submodel, _own_parts(moved)))
        family = replace(
            family,
            kept=(*family.kept, *moved.kept),
            parts=(*family.parts, *moved.parts),
            disk=_both(family.disk, inner.disk),
        )
    return family


def _config_at(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    for name in key.split("."):
        found = config.get(name)
        config = found if isinstance(found, Mapping) else {}
    return config


def _table_of(family: Family, submodel: Submodel, config: Mapping[str, Any], find: Find) -> Family:
    model_type = str(config.get("model_type") or submodel.default)
    table = find(model_type)
    if table is None:
        raise ModelError(
            f"{submodel.config} of this {family.model_types[0]} model has the model type "
            f"{model_type!r}, which has no table: what is in {submodel.prefix} is not known."
        )
    return table


def _own_parts(family: Family) -> tuple[Part, ...]:
    """A family's own blocks and embeddings as parts of a larger one."""
    blocks = Part(family.component, family.groups, (f"{family.blocks}.*",), blocks=True)
    lookups = tuple(
        GroupRule(name.rpartition(".")[0], (name,), kind="embedding") for name in family.embeddings
    )
    parts = (blocks, Part(family.component, lookups))
    return tuple(part for part in parts if part.groups)


def _without(
    family: Family, submodel: Submodel, instead: tuple[Part, ...]
) -> tuple[Part | Submodel, ...]:
    place = family.parts.index(submodel)
    return (*family.parts[:place], *instead, *family.parts[place + 1 :])


def _moved(family: Family, prefix: str) -> Family:
    """A flat family with its names below `prefix`, instead of below its root."""

    def name(own: str) -> str:
        if family.root and own.startswith(family.root + "."):
            return prefix + own.removeprefix(family.root)
        return f"{prefix}.{own}" if own else prefix

    def part(own: Part) -> Part:
        if own.at != ("",):
            return replace(own, at=tuple(name(place) for place in own.at))
        groups = tuple(
            replace(rule, name=name(rule.name), members=tuple(name(m) for m in rule.members))
            for rule in own.groups
        )
        return replace(own, groups=groups)

    return replace(
        family,
        blocks=name(family.blocks),
        embeddings=tuple(name(embedding) for embedding in family.embeddings),
        kept=tuple(_kept(rule, name) for rule in family.kept),
        parts=tuple(part(own) for own in family.parts if isinstance(own, Part)),
    )


def _kept(rule: KeptRule, name: Callable[[str], str]) -> KeptRule:
    return replace(rule, pattern=name(rule.pattern))


def _both(outer: DiskRules, inner: DiskRules) -> DiskRules:
    """Renames of the whole model come first: those of the parts expect its names. Renames of a
    part that hold at the beginning of a name are of the part when it is a model alone."""
    renames = [rename for rename in inner.renames if not rename[0].startswith("^")]
    ignored = dict.fromkeys((*outer.ignored, *inner.ignored))
    return DiskRules((*outer.renames, *renames), (*outer.experts, *inner.experts), tuple(ignored))
