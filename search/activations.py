"""Mean bits of activations: what a budget for rounded inputs limits.

Every multiply-add of a linear reads one weight and one activation, so a linear counts by its
parameters: the mean is over multiply-adds, and a model whose wide columns hold 1/8 of every weight
has 1/8 of its activations at the wide format's bits. Scales and zero points count, as if they were
kept: 16 bits for every scale (microscaling formats have 8), and a zero point of as many bits as the
codes. Otherwise smaller groups would look free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from quantlib.errors import UsageError
from quantlib.formats.activation import ActivationSegment
from quantlib.formats.scheme import Scheme
from quantlib.search.weights import WeightInfo

ACTIVATION_BITS = "activation_bits"
"""Name of the cost (`search.problem.Choice.costs`)."""
SCALE_BITS = 16
"""Of one scale."""
_SMALL_SCALE_BITS = 8
"""Of one scale of a microscaling format: e8m0, or e4m3 under one float32 per token."""
_TOKEN_SCALE_BITS = 32


def mean_bits(scheme: Scheme, columns: int) -> float:
    """Of the inputs of a weight with so many `columns`; 16 where they are not rounded."""
    segments = scheme.activations(columns)
    if not segments:
        return float(scheme.activation.bits)
    codes = sum(part.length * part.format.bits for part in segments)
    return (codes + sum(map(_scale_bits, segments))) / columns


def _scale_bits(part: ActivationSegment) -> int:
    """Bits of the scales and zero points of one token's segment."""
    format = part.format
    if not format.rounds:
        return 0
    groups = -(-part.length // format.group) if format.group else 1
    if format.element.startswith("mx"):
        return groups * _SMALL_SCALE_BITS
    if format.element == "nvfp4":
        return groups * _SMALL_SCALE_BITS + _TOKEN_SCALE_BITS
    return groups * (SCALE_BITS + (0 if format.symmetric else format.bits))


def rounds_inputs(schemes: Iterable[str]) -> bool:
    """Whether some scheme of these rounds activations."""
    return any(Scheme.parse(name).activation.rounds for name in schemes)


def activation_costs(
    weights: Sequence[WeightInfo], schemes: Mapping[str, Iterable[str]]
) -> dict[tuple[str, str], float]:
    """(weight, scheme) -> its part of the mean; they add to the mean over the linears.

    schemes: weight -> its candidates. Weights none of whose candidates round activations
    (embeddings) cost nothing and do not count in the mean.
    """
    counted = {w.name for w in weights if rounds_inputs(schemes[w.name])}
    total = sum(weight.parameters for weight in weights if weight.name in counted)
    costs = {}
    for weight in weights:
        share = weight.parameters / total if weight.name in counted else 0.0
        for name in schemes[weight.name]:
            costs[weight.name, name] = share * mean_bits(Scheme.parse(name), weight.in_features)
    return costs


def parse_activation_bits(bits: float | None) -> dict[str, float]:
    """The limit that a budget of `bits` is: none for None. Raises UsageError unless 2 <= bits."""
    if bits is None:
        return {}
    if not bits >= 2:
        raise UsageError(f"activations of {bits:g} bits cannot be had: give 2 or more")
    return {ACTIVATION_BITS: bits}
