"""What a method really stores and multiplies: no figure here is nominal.

ResQ's "4.5 bits" leaves out that its down projections have no 8-bit slice; QUIK's have one. So
every row of the table carries the mean over all rounded linears, counted from the very slices that
were rounded. Embeddings and output head stay at 16 bits in every method and are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from quantlib.bench.w4a4.fake import SitePlan
from quantlib.bench.w4a4.heads import HeadPlan
from quantlib.bench.w4a4.sites import Site, weight
from quantlib.formats.size import payload_bytes


@dataclass(frozen=True)
class Bits:
    """Means: of weights and activations over the weights (an activation as often as it is
    multiplied), of the KV cache over its numbers.

    `*_codes` count codes only, what papers quote; the others count scales and zero points too (and,
    for weights, padding to whole words). A scale of an activation exists only while the model runs:
    it is counted with 16 bits per token all the same.
    """

    weights: float
    weight_codes: float
    activations: float
    activation_codes: float
    kv: float
    kv_codes: float

    def to_json(self) -> dict[str, float]:
        """Every field, to four digits behind the point."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def count(
    model: nn.Module,
    sites: Sequence[Site],
    plans: Mapping[str, SitePlan],
    heads: Mapping[str, HeadPlan],
) -> Bits:
    """The bits of all sites and heads. A model without cached heads has 0 bits of KV."""
    total = stored = codes = acts = act_codes = 0.0
    for site in sites:
        plan = plans[site.name]
        for reader in site.readers:
            rows, width = weight(model, reader).shape
            total += rows * width
            stored += 8 * payload_bytes((rows, width), plan.weights)
            codes += rows * sum(part.length * part.format.bits for part in plan.weights)
            acts += rows * (sum(g.true_bits for g in plan.activations) or 16 * width)
            act_codes += rows * (sum(g.code_bits for g in plan.activations) or 16 * width)
    grids = [grid for plan in heads.values() for grid in (*plan.keys, *plan.values)]
    numbers = sum(grid.columns for grid in grids) or 1
    return Bits(
        stored / total,
        codes / total,
        acts / total,
        act_codes / total,
        sum(grid.true_bits for grid in grids) / numbers,
        sum(grid.code_bits for grid in grids) / numbers,
    )
