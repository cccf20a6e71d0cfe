"""Puts every parameter of a model in exactly one row, by the rules of its family.

Whatever is left over on any side is an error: a parameter without a rule, a rule without a
parameter, a tensor on disk that is neither parameter nor buffer. A user may allow left-overs by
name; they are kept as they are, so nothing is lost on the way to a compressed checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn

from quantlib.errors import ModelError
from quantlib.models.families import EMBEDDINGS, HEAD, Family, GroupRule, KeptRule, Part
from quantlib.models.listing import some
from quantlib.models.matching import Parameter, match
from quantlib.models.rows import Kept, LinearGroup, Stack, Weight
from quantlib.models.source import Source
from quantlib.models.stored import StoredParameter

_AXES = {"experts": (3, 3), "conv": (3, 5)}
"""Fewest and most axes of a weight of a kind; of every other kind it is a matrix."""

BUFFER = "buffer of the module"
ALLOWED = "allowed by name"


@dataclass
class Claims:
    """The rows found so far; `left` are the parameters nobody claimed yet, in module order.

    blocks: the family's own; `stacks` are the repeated blocks of its parts.
    """

    parameters: dict[str, Parameter]  # under each of its names
    blocks: tuple[str, ...]
    left: dict[str, Parameter]
    stacks: list[Stack] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    groups: list[LinearGroup] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    def take(self, name: str, rule: str) -> Parameter:
        """The parameter of this name, which is claimed from now on."""
        parameter = self.parameters[name]
        if self.left.pop(parameter.name, None) is None:
            raise ModelError(
                f"{parameter.name} is claimed by two rules of its family, the second is {rule}."
            )
        return parameter

    def keep(self, row: Parameter | StoredParameter, reason: str, component: str) -> None:
        """Add a row for what is left as it is."""
        blocks = (*self.blocks, *(block for stack in self.stacks for block in stack.blocks))
        block = next((b for b in blocks if row.name.startswith(b + ".")), None)
        aliases = row.aliases if isinstance(row, Parameter) else ()
        kept = Kept(
            name=row.name,
            shape=row.shape,
            reason=reason,
            component=component,
            block=block,
            dtype=row.dtype,
            nbytes=row.nbytes,
            aliases=aliases,
        )
        self.kept.append(kept)


def claim(
    family: Family, module: nn.Module, source: Source, allow_unclaimed: Sequence[str] = ()
) -> Claims:
    """Rows of all parameters of `module` and all tensors of `source`.

    allow_unclaimed: fnmatch patterns of parameters that need no rule, and of tensors on disk that
    the module does not have.
    Raises ModelError naming what is left over, or what `match` finds.
    """
    found = match(module, source)
    claims = _start(family, found.parameters)
    name = family.model_types[0]
    for rule in family.groups:
        _claim_group(claims, rule, claims.blocks, family.component, name)
    for part in family.parts:
        if isinstance(part, Part):
            _claim_part(claims, part, name)
    _claim_ends(claims, family)
    for kept in family.kept:
        _claim_kept(claims, kept)
    for buffer in found.buffers:
        claims.keep(buffer, BUFFER, _component_of(claims, buffer.name) or family.component)
    _claim_allowed(claims, family, found.strangers, allow_unclaimed)
    order = {parameter.name: position for position, parameter in enumerate(found.parameters)}
    claims.weights.sort(key=lambda weight: order[weight.name])
    claims.groups.sort(key=lambda group: order[group.members[0]])
    claims.kept.sort(key=lambda kept: order.get(kept.name, len(order)))
    return claims


def _component_of(claims: Claims, name: str) -> str | None:
    """The component of a parameter beside this buffer, None when its module has none."""
    owner = name.rpartition(".")[0]
    rows: list[Kept | Weight] = [*claims.kept, *claims.weights]
    return next((row.component for row in rows if row.name.rpartition(".")[0] == owner), None)


def _start(family: Family, parameters: Sequence[Parameter]) -> Claims:
    by_name = {name: parameter for parameter in parameters for name in parameter.names}
    pattern = re.compile(re.escape(family.blocks) + r"\.(\d+)\.")
    numbers = {int(found[1]) for name in by_name if (found := pattern.match(name))}
    if not numbers:
        raise ModelError(
            f"the model has no blocks: no parameter is named {family.blocks}.<number>."
        )
    blocks = tuple(f"{family.blocks}.{number}" for number in sorted(numbers))
    return Claims(by_name, blocks, {parameter.name: parameter for parameter in parameters})


def _claim_group(
    claims: Claims,
    rule: GroupRule,
    places: Sequence[str],
    component: str,
    family: str,
    blocks: bool = True,
) -> None:
    """Claim the rule's group in every place that has it; blocks: the places are blocks."""
    matched = False
    for place in places:
        names = [_join(place, member) for member in rule.members]
        present = [name for name in names if name in claims.parameters]
        if not present:
            continue
        if len(present) < len(names):
            absent = next(name for name in names if name not in claims.parameters)
            raise ModelError(f"group {rule.name} of {place} is incomplete: there is no {absent}.")
        matched = True
        _add_group(claims, rule, names, _join(place, rule.name), component, place if blocks else "")
    if not matched and not rule.optional:
        where = "no block has" if blocks else "the model does not have"
        raise ModelError(
            f"{where} the group {rule.name} ({some(rule.members)}), which the family of "
            f"{family} must have: the model is not what its model_type says."
        )


def _add_group(
    claims: Claims, rule: GroupRule, names: Sequence[str], group: str, component: str, block: str
) -> None:
    members = [
        _weight(claims.take(name, rule.name), rule.kind, component, block or None, group)
        for name in names
    ]
    claims.weights.extend(members)
    claims.groups.append(
        LinearGroup(
            name=group,
            component=component,
            block=block or None,
            members=tuple(member.name for member in members),
            kind=rule.kind,
            fused=rule.fused,
            input_module=None if rule.inner or rule.kind == "embedding" else members[0].module,
        )
    )


def _claim_part(claims: Claims, part: Part, family: str) -> None:
    """Claim the groups of a part in all its places, which form a stack if they are blocks."""
    places = [place for pattern in part.at for place in _places(claims, pattern)]
    if part.blocks and places:
        claims.stacks.append(Stack(part.component, tuple(places)))
    for rule in part.groups:
        _claim_group(claims, rule, places, part.component, family, part.blocks)


def _places(claims: Claims, pattern: str) -> list[str]:
    """Modules with parameters whose name matches, in the order of the module."""
    if not pattern:
        return [""]
    compiled = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+") + r"(?=\.)")
    matches = (compiled.match(name) for name in claims.parameters)
    return list(dict.fromkeys(match[0] for match in matches if match))


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place and name else place or name


def _weight(
    parameter: Parameter, kind: str, component: str, block: str | None, group: str
) -> Weight:
    fewest, most = _AXES.get(kind, (2, 2))
    if not fewest <= len(parameter.shape) <= most:
        axes = str(most) if fewest == most else f"{fewest} to {most}"
        raise ModelError(
            f"{parameter.name} has shape {list(parameter.shape)}, {kind} weights have {axes} axes."
        )
    shape = parameter.shape
    if kind == "conv":
        shape = (shape[0], math.prod(shape[1:]))
    return Weight(
        name=parameter.name,
        module=parameter.names[0].rpartition(".")[0],
        shape=shape,
        kind=kind,
        component=component,
        block=block,
        group=group,
        dtype=parameter.dtype,
        nbytes=parameter.nbytes,
        aliases=parameter.aliases,
        tensor_shape=parameter.shape if shape != parameter.shape else (),
    )


def _claim_ends(claims: Claims, family: Family) -> None:
    """The embedding and the head; one weight with two names when they are tied."""
    for name in family.embeddings:
        if name not in claims.parameters:
            raise ModelError(f"the model has no embedding {name}, which its family must have.")
        tied = family.head if family.head in claims.parameters[name].names else None
        _claim_end(claims, name, "embedding", EMBEDDINGS, tied)
    if family.head is None:
        return
    if family.head not in claims.parameters:
        raise ModelError(f"the model has no head {family.head}, which its family must have.")
    if claims.parameters[family.head].name in claims.left:
        _claim_end(claims, family.head, "head", HEAD, family.head)


def _claim_end(claims: Claims, name: str, kind: str, component: str, head: str | None) -> None:
    """Add an embedding or head; `head` is its parameter name where it is the output head."""
    module = name.rpartition(".")[0]
    parameter = claims.take(name, kind)
    reader = head.rpartition(".")[0] if head is not None else None
    weight = _weight(parameter, kind, component, block=None, group=module)
    if kind == "embedding":
        weight = replace(weight, module=module, head=reader)
    claims.weights.append(weight)
    claims.groups.append(
        LinearGroup(
            name=module,
            component=component,
            block=None,
            members=(weight.name,),
            kind=kind,
            fused=False,
            input_module=reader,
        )
    )


def _claim_kept(claims: Claims, rule: KeptRule) -> None:
    matches = {
        parameter.name: parameter
        for name, parameter in claims.parameters.items()
        if fnmatchcase(name, rule.pattern)
    }
    if not matches and not rule.optional:
        raise ModelError(
            f"no parameter matches {rule.pattern!r} ({rule.reason}), which its family must have: "
            "the model is not what its model_type says."
        )
    for name in matches:
        claims.keep(claims.take(name, rule.pattern), rule.why, rule.component)


def _claim_allowed(
    claims: Claims, family: Family, strangers: Sequence[StoredParameter], patterns: Sequence[str]
) -> None:
    """Keep what a pattern allows; refuse what none does, and patterns that allow nothing."""
    used: set[str] = set()
    refused = []
    rows: list[Parameter | StoredParameter] = [*claims.left.values(), *strangers]
    for row in rows:
        matching = [pattern for pattern in patterns if fnmatchcase(row.name, pattern)]
        used.update(matching)
        if not matching:
            refused.append(f"{row.name} {list(row.shape)}")
            continue
        if row.name in claims.left:
            claims.take(row.name, ALLOWED)
        claims.keep(row, ALLOWED, family.component)
    if refused:
        raise ModelError(
            f"{len(refused)} tensors have no rule: {some(refused)}. "
            "Allow them by name to keep them as they are, or add them to the family's table."
        )
    idle = [pattern for pattern in patterns if pattern not in used]
    if idle:
        raise ModelError(
            f"the pattern {idle[0]!r} allows nothing: no tensor without a rule matches it. "
            "Correct it or leave it out."
        )
