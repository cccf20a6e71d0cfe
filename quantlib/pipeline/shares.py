"""Who decides how each part of a model is rounded: shares of streams, and of what tokens are.

A matrix is rounded under the mean of w_t x_t x_t^T over its tokens, and tokens do not count alike:
by their own gradients (token importance, as VLMQ has it, arXiv:2508.03351), by the root of that, or
by the mean gradient of their modality (MBQ, arXiv:2412.19509); streams by what an error adds to
their loss. So a picture of six hundred tokens may decide less than an answer of three. Two shares
say how much less: of the tokens, which is what an unweighted Hessian would be made of, and of the
weight, which is what this one is made of.

A modality is what a token of the language model is: text, image (one that is read), image token or
image vector (one that is written), audio. Other parts read one kind of token only, and have shares
of streams alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlib.checkpoint.disk import atomic_write_json, read_json
from quantlib.errors import CheckpointError

if TYPE_CHECKING:
    from quantlib.pipeline.parts import Summary

SHARES_FILE = "weighting.json"


@dataclass(frozen=True)
class Share:
    """Fractions of a whole: tokens before weighting, weight after it."""

    tokens: float
    weight: float


@dataclass(frozen=True)
class Shares:
    """Of one component, the mean over its linear groups; each of the two sums up to one, or is
    empty."""

    streams: Mapping[str, Share] = field(default_factory=dict)
    modalities: Mapping[str, Share] = field(default_factory=dict)


def component_shares(
    owners: Mapping[str, str], seen: Sequence[Summary], weights: Mapping[str, float]
) -> dict[str, Shares]:
    """Component -> its shares.

    owners:  linear group -> its component. seen: what every stream left behind.
    weights: of one term of a stream's loss beside those of others.

    Components that no loss depends on are left out, and so are all where a stream's statistics were
    collected before gradient energies were kept in its summary.
    """
    if not all(one.energies for one in seen):
        return {}
    streams: dict[str, list[dict[str, Share]]] = {}
    modalities: dict[str, list[dict[str, Share]]] = {}
    for group, component in owners.items():
        energies = {one.name: weights[one.name] * one.energies.get(group, 0.0) for one in seen}
        if not sum(energies.values()) > 0:
            continue
        tokens = {
            one.name: sum(count for count, _ in one.groups[group])
            for one in seen
            if energies[one.name] > 0
        }
        streams.setdefault(component, []).append(_shares(tokens, energies))
        found = _of_modalities(group, seen, energies)
        if found:
            modalities.setdefault(component, []).append(found)
    return {
        component: Shares(_mean(rows), _mean(modalities.get(component, [])))
        for component, rows in streams.items()
    }


def _of_modalities(
    group: str, seen: Sequence[Summary], energies: Mapping[str, float]
) -> dict[str, Share]:
    """Of a group that reads what the language model reads; {} for another."""
    tokens: dict[str, float] = {}
    weight: dict[str, float] = {}
    for one in seen:
        for modality, share in one.modalities.get(group, {}).items():
            count = one.modality_tokens[modality]
            if count and energies[one.name] > 0:
                tokens[modality] = tokens.get(modality, 0.0) + count
                weight[modality] = weight.get(modality, 0.0) + energies[one.name] * share
    return _shares(tokens, weight) if tokens else {}


def _shares(tokens: Mapping[str, float], weight: Mapping[str, float]) -> dict[str, Share]:
    of_tokens, of_weight = sum(tokens.values()), sum(weight.values())
    return {n: Share(tokens[n] / of_tokens, weight[n] / of_weight) for n in tokens}


def _mean(rows: Sequence[Mapping[str, Share]]) -> dict[str, Share]:
    """Of the groups of a component; what one of them has not counts as nothing there."""
    nothing = Share(0.0, 0.0)
    return {
        name: Share(
            sum(row.get(name, nothing).tokens for row in rows) / len(rows),
            sum(row.get(name, nothing).weight for row in rows) / len(rows),
        )
        for name in dict.fromkeys(name for row in rows for name in row)
    }


def told(component: str, shares: Shares) -> str:
    """What a progress line says of a component; "" of one that has nothing to share out."""
    parts = [
        ", ".join(
            f"{name} {100 * share.weight:.0f} % (of the tokens {100 * share.tokens:.0f} %)"
            for name, share in found.items()
        )
        for found in (shares.streams, shares.modalities)
        if len(found) > 1
    ]
    return f"{component} is rounded for {'; for '.join(parts)}" if parts else ""


def save_shares(work: Path, found: Mapping[str, Shares]) -> None:
    """Write them to the work directory."""
    atomic_write_json(work / SHARES_FILE, {name: asdict(shares) for name, shares in found.items()})


def load_shares(work: Path) -> dict[str, Shares]:
    """Component -> its shares; {} where there are none: a model that was calibrated on text alone.

    Raises CheckpointError for a damaged file.
    """
    file = work / SHARES_FILE
    if not file.exists():
        return {}
    data: Any = read_json(file)
    try:
        return {
            component: Shares(
                **{
                    kind: {name: Share(**share) for name, share in given[kind].items()}
                    for kind in ("streams", "modalities")
                }
            )
            for component, given in data.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error!r}): delete it and run quantlib measure again, which keeps "
            "what was measured"
        ) from error
