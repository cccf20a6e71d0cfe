"""Rounding: pure functions from a weight, the second moment of its input, and a format to a
`QuantizedWeight`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.weight import QuantizedWeight
from quantlib.rounding.asymmetric import Moments, Target, least_squares_targets
from quantlib.rounding.fixed import round_fixed
from quantlib.rounding.integer import (
    DEFAULTS,
    Layout,
    RoundingOptions,
    is_batchable,
    round_integers,
)
from quantlib.rounding.learned import Learned, LearningOptions, learn
from quantlib.rounding.lowrank import round_low_rank
from quantlib.rounding.objective import OutputMetric
from quantlib.rounding.rows import round_members, round_rows
from quantlib.rounding.scales import refit_scales
from quantlib.rounding.sparsegpt import prune, round_alone, round_sparse
from quantlib.rounding.stack import concatenate

__all__ = [
    "Layout",
    "Learned",
    "LearningOptions",
    "Moments",
    "OutputMetric",
    "RoundingOptions",
    "Target",
    "concatenate",
    "is_batchable",
    "learn",
    "least_squares_targets",
    "prune",
    "quantize_rtn",
    "refit_scales",
    "round_fixed",
    "round_group",
    "round_integers",
    "round_low_rank",
    "round_members",
    "round_rows",
    "round_sparse",
]


def round_group(
    weights: Mapping[str, Tensor],
    hessian: Tensor | None,
    layouts: Sequence[Layout],
    options: RoundingOptions = DEFAULTS,
) -> dict[tuple[str, int], QuantizedWeight]:
    """Round the members of a linear group (name -> [N, K]) to every candidate layout (K segments).

    hessian: [K, K] of the shared input; None means no data reached it, and rounds to nearest.
    Returns (name, index of the layout) -> QuantizedWeight. Layouts of integers are rounded together
    by `round_integers`, the others one by one by `round_alone`; each raises what they raise.
    """
    out: dict[tuple[str, int], QuantizedWeight] = {}
    if hessian is None:
        for index, layout in enumerate(layouts):
            out |= {(name, index): quantize_rtn(w, layout) for name, w in weights.items()}
        return out
    batch = [i for i, layout in enumerate(layouts) if all(is_batchable(p.format) for p in layout)]
    if batch:
        rounded = round_integers(weights, hessian, [layouts[i] for i in batch], options)
        out |= {(name, batch[i]): weight for (name, i), weight in rounded.items()}
    for index in sorted(set(range(len(layouts))) - set(batch)):
        for name, weight in weights.items():
            out[name, index] = round_alone(weight, hessian, layouts[index], options.damping)
    return out
