"""Weights in blocks of rows. Of an embedding: frequent tokens wide, rare ones narrow; of a linear:
outputs that matter wide.

Rows go to blocks by their price, what an error in them costs (for tokens: how often they are read
or written). Every block is rounded under the Hessian that all rows share. A block with fewer
dimensions is first brought to a basis: the directions that hold most of its rows, weighed by price
and by the Hessian, as the mixed dimensions of recommendation models have a projection for each
block of a table (arXiv:1909.11810). The basis is stored in 8 bits, the rows' coordinates are fitted
to the stored basis, and are rounded under the second moment that they are read with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats.composite import (
    BASIS,
    ROWS,
    CompositeWeight,
    Part,
    StoredWeight,
    parts_of,
    rows_of_blocks,
)
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.several import row_counts
from quantlib.formats.weight import QuantizedWeight, dequantize
from quantlib.formats.weight_format import Segment
from quantlib.rounding.hessian import check_weight
from quantlib.rounding.integer import DEFAULTS, RoundingOptions, is_batchable, round_integers
from quantlib.rounding.lowrank import Metric
from quantlib.rounding.sparsegpt import round_alone


def round_rows(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    price: Tensor,
    options: RoundingOptions = DEFAULTS,
) -> CompositeWeight:
    """An embedding [V, D] in a scheme with blocks of rows.

    hessian: [D, D], what errors of a row cost, the same for all rows but for `price` [V].
    Raises RoundingError on shapes that disagree, FormatError where blocks or widths do not fit.
    """
    check_weight("the embedding", weight, hessian)
    if not scheme.rows or tuple(price.shape) != (len(weight),):
        raise RoundingError(
            f"{scheme} with prices {list(price.shape)} for {len(weight)} rows: give one price a "
            "row and a scheme with blocks of rows, such as w6g64@1/8+w4g64"
        )
    shape = (weight.shape[0], weight.shape[1])
    expected = parts_of(scheme, shape)
    block = assign_rows(scheme, price) if len(scheme.rows) > 1 else None
    parts: dict[str, QuantizedWeight] = {}
    for index, rows in enumerate(rows_of_blocks(block, len(weight))):
        own, part = weight[rows].float(), expected[f"{ROWS}{index}"]
        if f"{BASIS}{index}" not in expected:
            parts[f"{ROWS}{index}"] = _rounded(own, hessian, part, options)
            continue
        metric = Metric.of(hessian, options.damping).weighing(price[rows])
        directions = metric.directions(own, part.shape[1]).float()
        basis = quantize_rtn(directions.T, expected[f"{BASIS}{index}"].segments)
        read = dequantize(basis).double().T
        moment = read @ metric.moment @ read.T
        fitted = torch.linalg.solve(moment, read @ metric.moment @ own.double().T).T
        parts[f"{ROWS}{index}"] = _rounded(fitted.float(), moment.float(), part, options)
        parts[f"{BASIS}{index}"] = basis
    return CompositeWeight(scheme, shape, parts, block)


def round_members(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    schemes: Mapping[str, Scheme],
    blocks: Mapping[str, Tensor | None],
    options: RoundingOptions = DEFAULTS,
) -> dict[str, StoredWeight]:
    """The members of a group (name -> [N, K]), each in a scheme of its own: of one matrix, or of
    blocks of rows.

    hessian: [K, K] of the shared input. blocks: name -> uint8 [N], the block of every row; None
    where there is one. Rows come out as if whole members were rounded to their formats.
    Raises RoundingError for schemes of other kinds.
    """
    whole = {name: parts_of(schemes[name], (w.shape[0], w.shape[1])) for name, w in weights.items()}
    alike: dict[tuple[Segment, ...], dict[str, Tensor]] = {}
    for name, parts in whole.items():
        rows = rows_of_blocks(blocks[name], len(weights[name]))
        if len(rows) != len(parts):
            raise RoundingError(
                f"{name} in {schemes[name]} is not one matrix, nor {len(rows)} blocks of rows"
            )
        for (part, shaped), own in zip(parts.items(), rows, strict=True):
            alike.setdefault(shaped.segments, {})[name + part] = weights[name][own]
    rounded: dict[str, QuantizedWeight] = {}
    for layout, pieces in alike.items():
        if all(is_batchable(segment.format) for segment in layout):
            found = round_integers(pieces, hessian, [layout], options)
            rounded |= {name: found[name, 0] for name in pieces}
        else:
            for name, piece in pieces.items():
                rounded[name] = round_alone(piece, hessian, layout, options.damping)
    return {
        name: _joined(name, schemes[name], rounded, blocks[name], whole[name]) for name in whole
    }


def _joined(
    name: str,
    scheme: Scheme,
    rounded: Mapping[str, QuantizedWeight],
    block: Tensor | None,
    parts: Mapping[str, Part],
) -> StoredWeight:
    if not scheme.rows:
        return rounded[name]
    found = {part: rounded[name + part] for part in parts}
    shape = (sum(part.shape[0] for part in parts.values()), found[f"{ROWS}0"].shape[1])
    return CompositeWeight(scheme, shape, found, block)


def block_of_rows(weight: StoredWeight) -> Tensor | None:
    """The block of every row, uint8 [N]; None where all are in one."""
    return weight.block if isinstance(weight, CompositeWeight) else None


def assign_rows(scheme: Scheme, price: Tensor) -> Tensor:
    """The block of each row, uint8 [V]: the dearest rows are in the first; of equal ones, those
    that come first."""
    counts = row_counts(scheme.rows, len(price))
    order = torch.argsort(price, descending=True, stable=True)
    block = torch.empty(len(price), dtype=torch.uint8)
    numbers = torch.arange(len(counts), dtype=torch.uint8)
    block[order] = numbers.repeat_interleave(torch.tensor(counts))
    return block


def _rounded(
    weight: Tensor, hessian: Tensor, part: Part, options: RoundingOptions
) -> QuantizedWeight:
    if all(is_batchable(segment.format) for segment in part.segments):
        return round_integers({"": weight}, hessian, [part.segments], options)["", 0]
    return round_alone(weight, hessian, part.segments, options.damping)
