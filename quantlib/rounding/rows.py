"""An embedding in blocks of rows: frequent tokens wide, rare ones narrow.

Rows go to blocks by their price, what an error in them costs (for tokens: how often they are read
or written). Every block is rounded under the Hessian that all rows share. A block with fewer
dimensions is first brought to a basis: the directions that hold most of its rows, weighed by price
and by the Hessian, as the mixed dimensions of recommendation models have a projection for each
block of a table (arXiv:1909.11810). The basis is stored in 8 bits, the rows' coordinates are fitted
to the stored basis, and are rounded under the second moment that they are read with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats.composite import BASIS, ROWS, CompositeWeight, Part, parts_of, rows_of_blocks
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.several import row_counts
from quantlib.formats.weight import QuantizedWeight, dequantize
from quantlib.rounding.fixed import round_fixed
from quantlib.rounding.hessian import check_weight
from quantlib.rounding.integer import DEFAULTS, RoundingOptions, is_batchable, round_integers
from quantlib.rounding.lowrank import Metric


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
    return round_fixed(weight, hessian, part.segments, options.damping)
