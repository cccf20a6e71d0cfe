"""What training leaves behind: a scheme for every weight, and the weights in it, as a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantlib.errors import SearchError
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import QuantizedWeight
from quantlib.models.modelmap import ModelMap
from quantlib.models.rows import Weight
from quantlib.search.plan import Assignment, Plan
from quantlib.search.trained.costs import Costs
from quantlib.search.trained.layers import Choice, Layers

TASK = "training"
"""The loss column of such a plan: nothing was predicted, so its losses are 0."""


def schemes_of(layers: Layers, choice: Choice) -> dict[str, str]:
    """weight -> scheme of a choice.

    Raises SearchError for layers that use a part of their channels: who stores such a model cuts
    the others off first (`pipeline.narrowed`).
    """
    for name, shares in layers.space.shares(choice).items():
        if min(shares) < 1:
            raise SearchError(
                f"{name} was trained at {min(shares):.0%} of its width: cut the other channels off "
                "before it is stored"
            )
    return {name: c.name for name, c in layers.space.candidates(choice).items()}


@torch.no_grad()
def rounded(layers: Layers, schemes: Mapping[str, str]) -> dict[str, QuantizedWeight]:
    """weight -> what the layer trained with, to the bit, columns in its order."""
    found = {}
    for name, scheme in schemes.items():
        layer = layers.of[name]
        matrix = layer.weight.detach().float().flatten(1)
        order = order_of(layers, name)
        matrix = matrix if order is None else matrix.index_select(1, order)
        found[name] = quantize_rtn(matrix, Scheme.parse(scheme).segments(matrix.shape[1]))
    return found


def order_of(layers: Layers, name: str) -> Tensor | None:
    """int64 [K]: the input that each stored column takes; None: its own."""
    order = getattr(layers.of[name], "order", None)
    return order if isinstance(order, Tensor) else None


def plan_of(
    model_map: ModelMap,
    schemes: Mapping[str, str],
    size: Callable[[Weight, Scheme], int],
    fixed_bytes: int,
    method: str,
    costs: Costs | None = None,
    choice: Choice | None = None,
    target: float | None = None,
) -> Plan:
    """The plan of a trained model.

    schemes: of all its weights. size: (weight, scheme) -> its bytes in a checkpoint.
    costs, choice, target: what it costs and was allowed to.
    """
    rows = {
        weight.name: Assignment(
            schemes[weight.name], size(weight, Scheme.parse(schemes[weight.name])), 0.0
        )
        for weight in model_map.weights
    }
    predicted = {} if costs is None or choice is None else {costs.unit: costs.of(choice)}
    limits = {} if costs is None or target is None else {costs.unit: target}
    return Plan(
        model_map.fingerprint,
        rows,
        fixed_bytes=fixed_bytes,
        limits=limits,
        task=TASK,
        predicted=predicted,
        provenance={"method": method},
    )
