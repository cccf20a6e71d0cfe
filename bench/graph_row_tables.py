"""What every row of a linear loses in every format, beside what the graph network is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantlib.bench.graph_bits import (
    Linear,
    graph_of,
    graph_parts,
    groups_of,
    kept_tables,
    table_file,
)
from quantlib.formats.composite import stored_bytes
from quantlib.formats.scheme import Scheme
from quantlib.formats.size import payload_bytes
from quantlib.formats.weight_format import Segment, WeightFormat
from quantlib.pipeline.dense import bank_weight
from quantlib.pipeline.measure import measure_groups
from quantlib.pipeline.run import Run
from quantlib.recipe import NATIVE_SCHEMES
from quantlib.rounding.hessian import damped, inverse_factor
from quantlib.search.columns import Candidates, column_prices
from quantlib.search.gnn import ColumnGraph, ColumnNetwork, column_graph, plain_row_prices
from quantlib.search.gnn_bits import Lesson, learned_prices
from quantlib.search.row_widths import RowAssignment, row_assignments

SCHEMES = ("w2z4", "w2g128z4s4", *NATIVE_SCHEMES[:8])
"""What is chosen among, 2 to 5 bits, smallest first."""
KNOWN = ("w2z", "w2g128z", "w2g64z", "w3z", "w3g128z", "w3g64z", "w4g128z")

PLAIN = "plain_columns"
"""The name of the graph's prices among a table's tensors; `plain` are those of rows."""


def form(name: str) -> WeightFormat:
    """The one format of a scheme."""
    return Scheme.parse(name).segments(1)[0].format


@dataclass(frozen=True, eq=False)
class RowTable:
    """What is known of one linear [N, K].

    prices:  float64 [N, S], nats that every row loses in each of SCHEMES.
    known:   float64 [len(KNOWN)], those of the whole linear; empty where it was not rounded so.
    columns: float64 [K, S], nats lost at every column (`columns.column_prices`).
    plain:   float64 [N, S], prices of plain rounding. graph: of the columns, in SCHEMES.
    """

    shape: tuple[int, int]
    prices: Tensor
    known: Tensor
    columns: Tensor
    plain: Tensor
    graph: ColumnGraph

    def candidates(self, method: str, prices: Tensor | None = None) -> Candidates[RowAssignment]:
        """What the solver may choose among. prices: [N, S], instead of the table's."""
        if method in ("uniform", "layers", "known"):
            losses = self.known if method == "known" else self.prices.sum(0)
            names, alike = KNOWN if method == "known" else SCHEMES, torch.zeros(self.shape[0])
            pairs = zip(names, losses.tolist(), strict=True)
            whole = [RowAssignment(name, alike.to(torch.uint8), loss) for name, loss in pairs]
            if method == "layers":
                return Candidates.of(whole, self.size)
            return Candidates(whole, [self.size(one) for one in whole])  # the same for all linears
        rates = [payload_bytes(self.shape, layout) / self.shape[0] for layout in self.layouts()]
        found = row_assignments(
            self.prices if prices is None else prices, [form(name) for name in SCHEMES], rates
        )
        return Candidates.of(found, self.size)

    def size(self, one: RowAssignment) -> int:
        """Bytes of the tensors of an assignment."""
        return stored_bytes(self.shape, Scheme.parse(one.scheme))

    def layouts(self) -> list[tuple[Segment, ...]]:
        """The segments of each of SCHEMES."""
        return [Scheme.parse(name).segments(self.shape[1]) for name in SCHEMES]

    def lost(self, one: RowAssignment) -> float:
        """What an assignment of these formats really loses, by the table."""
        if one.scheme in KNOWN:
            return float(self.known[KNOWN.index(one.scheme)])
        indices = torch.tensor([SCHEMES.index(name) for name in one.formats])
        return float(self.prices.gather(1, indices[one.block.long()][:, None]).sum())

    def lesson(self) -> Lesson:
        """What the graph network learns of this linear; widths ascend."""
        sizes = [payload_bytes(self.shape, layout) for layout in self.layouts()]
        rates = torch.tensor(sizes, dtype=torch.float64) / self.shape[1]
        return Lesson(self.graph, self.columns, rates)

    def judged(self, network: ColumnNetwork) -> Tensor:
        """Prices [N, S] by the network: plain ones, times the factor that it gives a format."""
        factor = learned_prices(network, self.graph).sum(0) / self.graph.plain.sum(0)
        return self.plain * factor


def table_of(run: Run, linear: Linear, known: bool) -> dict[str, Tensor]:
    """The tensors of a table, by the names of its fields; from the bank."""
    weight, hessian = linear.weight, damped(linear.hessian, run.damping)
    factor, formats = inverse_factor(hessian), [form(name) for name in SCHEMES]
    prices, columns = [], []
    for name in SCHEMES:
        error = bank_weight(run, linear.name, name) - weight
        prices.append(_row_prices(linear, hessian, error))
        columns.append(column_prices(error, factor, linear.rows))
    totals = [
        _row_prices(linear, hessian, bank_weight(run, linear.name, name) - weight).sum()
        for name in (KNOWN if known else ())
    ]
    graph = column_graph(weight, hessian, factor, linear.rows, formats)
    conditional = factor.diagonal().double() ** -2
    return {
        "prices": torch.stack(prices, dim=1),
        "known": torch.stack(totals) if totals else torch.zeros(0, dtype=torch.float64),
        "columns": torch.stack(columns, dim=1),
        "plain": plain_row_prices(weight, conditional, linear.rows, formats),
        **graph_parts(graph, PLAIN),
    }


def _row_prices(linear: Linear, hessian: Tensor, error: Tensor) -> Tensor:
    return linear.rows * ((error @ hessian) * error).sum(1).clamp(min=0).double()


def tables(run: Run, rounding: str, every: int, known: bool) -> dict[str, RowTable]:
    """Linear -> its table; kept by group in a folder of the work directory. known: the formats of
    KNOWN are among the run's candidates."""
    folder = run.work.path / f"graph_rows_{rounding}{'_known' if known else ''}"
    groups = groups_of(run, every)
    measure_groups(run, [group for group in groups if not table_file(folder, group).exists()])
    return kept_tables(run, groups, folder, partial(table_of, run, known=known), _table)


def _table(own: Mapping[str, Tensor]) -> RowTable:
    shape = (len(own["prices"]), len(own["columns"]))
    graph = graph_of(own, PLAIN)
    return RowTable(shape, own["prices"], own["known"], own["columns"], own["plain"], graph)
