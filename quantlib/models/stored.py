"""Which tensors on disk build which parameter of the module.

Usually one tensor is one parameter. Experts are the exception: transformers 5 holds all experts of
a layer in one 3-D parameter, while checkpoints store one 2-D tensor per expert and projection. The
mapping is computed from headers alone, from disk to parameter, so every tensor on disk ends in
exactly one parameter or in the list of those the module computes itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantlib.errors import ModelError
from quantlib.models.families import DiskRules, ExpertParts
from quantlib.models.headers import TensorHeader


@dataclass(frozen=True)
class StoredParameter:
    """One parameter as it lies on disk.

    parts:   `((tensor,),)` when it is one tensor. Of a stack `[E, N, K]` stored expert by expert:
             `parts[e]` are the 2-D tensors of expert e, one under the other along N.
    stacked: whether it is such a stack.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    parts: tuple[tuple[str, ...], ...]
    stacked: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names on disk of everything it is made of."""
        return tuple(name for tensors in self.parts for name in tensors)


def stored_parameters(
    headers: Mapping[str, TensorHeader], rules: DiskRules
) -> dict[str, StoredParameter]:
    """Parameters of the module that these tensors build, by parameter name.

    Raises ModelError when experts are missing or disagree, or a parameter is stored twice.
    """
    ignored = [re.compile(pattern) for pattern in rules.ignored]
    stored: dict[str, StoredParameter] = {}
    by_expert: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    rule_of: dict[str, ExpertParts] = {}
    for tensor, header in headers.items():
        if any(pattern.search(tensor) for pattern in ignored):
            continue
        name = _renamed(tensor, rules.renames)
        place = _expert_place(name, rules.experts)
        if place is not None:
            parameter, rule, expert, part = place
            rule_of[parameter] = rule
            _refuse_twice(parameter, by_expert[parameter].get((expert, part)), tensor)
            by_expert[parameter][expert, part] = tensor
            continue
        before = stored.get(name)
        _refuse_twice(name, before.tensors[0] if before else None, tensor)
        stored[name] = StoredParameter(
            name, header.dtype, header.shape, header.nbytes, ((tensor,),)
        )
    for parameter, found in by_expert.items():
        before = stored.get(parameter)
        _refuse_twice(parameter, before.tensors[0] if before else None, next(iter(found.values())))
        stored[parameter] = _stack(parameter, rule_of[parameter], found, headers)
    return stored


def _renamed(tensor: str, renames: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        tensor = re.sub(pattern, replacement, tensor)
    return tensor


def _refuse_twice(parameter: str, first: str | None, second: str) -> None:
    if first is not None:
        raise ModelError(
            f"{parameter} is stored twice, as {first} and as {second}: remove one of them."
        )


def _expert_place(
    name: str, rules: Sequence[ExpertParts]
) -> tuple[str, ExpertParts, int, int] | None:
    """(parameter, rule, expert, part) when `name` is one expert's share of a stack."""
    for rule in rules:
        for part, suffix in enumerate(rule.parts):
            before, after = (re.escape(piece) for piece in suffix.split("{expert}"))
            match = re.fullmatch(rf"(?P<prefix>.*\.){before}(?P<expert>\d+){after}", name)
            if match:
                return match["prefix"] + rule.parameter, rule, int(match["expert"]), part
    return None


def _stack(
    parameter: str,
    rule: ExpertParts,
    found: Mapping[tuple[int, int], str],
    headers: Mapping[str, TensorHeader],
) -> StoredParameter:
    """The stack of all experts; found[e, p] is the tensor of part p of expert e."""
    experts = range(max(expert for expert, _ in found) + 1)
    places = ((expert, part) for expert in experts for part in range(len(rule.parts)))
    absent = next((place for place in places if place not in found), None)
    if absent is not None:
        name = rule.parts[absent[1]].format(expert=absent[0])
        raise ModelError(f"{parameter} is incomplete: there is no tensor ...{name}.")
    parts = tuple(
        tuple(found[expert, part] for part in range(len(rule.parts))) for expert in experts
    )
    first = [headers[tensor] for tensor in parts[0]]
    for tensors in parts:
        for tensor, like in zip(tensors, first, strict=True):
            header = headers[tensor]
            if (header.shape, header.dtype) != (like.shape, first[0].dtype):
                raise ModelError(
                    f"{tensor} is {header.dtype} {list(header.shape)}, but expert 0 of {parameter} "
                    f"is {first[0].dtype} {list(like.shape)}: they must agree."
                )
    if any(len(header.shape) != 2 or header.shape[1] != first[0].shape[1] for header in first):
        shapes = " and ".join(str(list(header.shape)) for header in first)
        raise ModelError(f"the matrices of {parameter} cannot be joined: they are {shapes}.")
    shape = (len(parts), sum(header.shape[0] for header in first), first[0].shape[1])
    nbytes = len(parts) * sum(header.nbytes for header in first)
    return StoredParameter(parameter, first[0].dtype, shape, nbytes, parts, stacked=True)
