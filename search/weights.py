"""What the search asks of a model: its weights, which of them belong together, and for whom.

These are the few attributes of `quantlib.models` rows that an allocation depends on, so that a
problem can be built, and tested, without a model.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Protocol

ENGINES = {"quantlib": False, "vllm": True}
"""Engines a plan can be for, and whether they fuse the linears that read one input into one
matrix."""


class WeightInfo(Protocol):
    """What the search needs to know about a weight (`quantlib.models.modelmap.Weight` has it all).

    group: name of the linear group the weight belongs to, None or empty when it stands alone.
    block: name of the repeated block it lives in, None or empty outside of blocks.
    """

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def component(self) -> str: ...
    @property
    def block(self) -> str | None: ...
    @property
    def group(self) -> str | None: ...
    @property
    def aliases(self) -> Sequence[str]: ...
    @property
    def parameters(self) -> int: ...
    @property
    def in_features(self) -> int: ...


class GroupInfo(Protocol):
    """What the search needs to know about a linear group (`LinearGroup` of the same module)."""

    @property
    def name(self) -> str: ...
    @property
    def fused(self) -> bool: ...


def units(
    weights: Iterable[WeightInfo],
    engine: str,
    groups: Iterable[GroupInfo] | None = None,
    shared_inputs: Container[str] = (),
) -> dict[str, list[WeightInfo]]:
    """Name -> the weights that need one scheme for `engine`, in order of first appearance.

    For an engine that fuses, those are the groups marked `fused` in `groups` (all, when it is
    None). shared_inputs: weights whose inputs are rounded; those of one group read one input, which
    is rounded once. Every other weight is a unit of its own.
    """
    fused = {group.name for group in groups if group.fused} if groups is not None else None
    found: dict[str, list[WeightInfo]] = {}
    for weight in weights:
        fuses = ENGINES[engine] and (fused is None or weight.group in fused)
        together = weight.group and (fuses or weight.name in shared_inputs)
        name = weight.group if together and weight.group else weight.name
        found.setdefault(name, []).append(weight)
    return {
        name if len(members) > 1 else members[0].name: members for name, members in found.items()
    }
