"""Linears whose columns have widths of their own: their price tables, and rounding them for real.

Plain GPTQ throughout (no coordinate descent behind it), the same for every way of choosing bits, so
that rows differ by the choice alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from quantlib.checkpoint.tensorfile import atomic_save_tensors, read_tensors
from quantlib.formats.scheme import Scheme
from quantlib.formats.size import payload_bytes
from quantlib.formats.weight import QuantizedWeight, dequantize
from quantlib.models.rows import LinearGroup
from quantlib.pipeline.measure import ordered_statistics, ordered_weight
from quantlib.pipeline.run import Run
from quantlib.rounding import RoundingOptions, round_integers
from quantlib.rounding.hessian import damped, inverse_factor
from quantlib.search.columns import FORMATS, Assignment, Candidates, assignments, column_prices
from quantlib.search.gnn import ColumnGraph, column_graph
from quantlib.search.gnn_bits import Lesson

T = TypeVar("T")
GPTQ = RoundingOptions(passes=0)
FINER = ("w2g32z4s4", "w3g32z4s4", "w4g32zs4")
"""Whole weights may take these, too, whoever assigns the bits: finer groups compete with width."""
WIDTHS = tuple(Scheme.parse(name).segments(1)[0].format for name in FORMATS)


@dataclass(frozen=True, eq=False)
class Linear:
    """weight: float32 [N, K]; hessian: [K, K] of its input; rows: float64 [N], what a squared error
    of an output costs in nats, in units of the Hessian scaled to a mean diagonal of 1."""

    name: str
    weight: Tensor
    hessian: Tensor
    rows: Tensor


def groups_of(run: Run, every: int) -> list[LinearGroup]:
    """The linear groups of every so many blocks."""
    blocks = set(run.model_map.blocks[::every])
    return [g for g in run.model_map.groups if g.kind == "linear" and g.block in blocks]


def linears(run: Run, groups: Sequence[LinearGroup]) -> Iterator[Linear]:
    """The linears of some groups, group by group, so that statistics are read once."""
    for group in groups:
        statistics = ordered_statistics(run, group).matrices[0]
        scale = statistics.hessian.diagonal().double().mean()
        for name in group.members:
            rows = 0.5 * scale * statistics.fisher[name].double()
            yield Linear(name, ordered_weight(run, name), statistics.hessian, rows)


@dataclass(frozen=True, eq=False)
class Table:
    """What is known of one linear before bits are chosen.

    prices: float64 [K, B] in nats, of whole-weight sweeps in each of FORMATS.
    finer:  loss in nats in each of FINER.
    """

    shape: tuple[int, int]
    prices: Tensor
    finer: tuple[float, ...]
    graph: ColumnGraph

    def candidates(
        self, prices: Tensor | None = None, mixed: bool = True
    ) -> Candidates[Assignment]:
        """What the solver may choose among; `mixed`: columns of several widths too. prices: [K, B],
        to be used instead of the table's."""
        found = assignments(self.prices if prices is None else prices, WIDTHS)
        if not mixed:
            found = [one for one in found if one.order is None]
        whole = torch.zeros(self.shape[1], dtype=torch.int64)
        found += [Assignment(name, whole, loss) for name, loss in zip(FINER, self.finer)]
        return Candidates.of(found, self.size)

    def size(self, assignment: Assignment) -> int:
        """Bytes of the tensors of an assignment, its order included (int32 [K])."""
        columns = self.shape[1]
        packed = payload_bytes(self.shape, Scheme.parse(assignment.scheme).segments(columns))
        return packed + (4 * columns if assignment.order is not None else 0)

    def lesson(self, prices: Tensor | None = None) -> Lesson:
        """What the graph network learns of this linear."""
        length = self.shape[1]
        sizes = [payload_bytes(self.shape, Scheme.parse(n).segments(length)) for n in FORMATS]
        rates = torch.tensor(sizes, dtype=torch.float64) / length
        return Lesson(self.graph, self.prices if prices is None else prices, rates)


def tables(run: Run, groups: Sequence[LinearGroup], folder: Path) -> dict[str, Table]:
    """Weight -> its table, of plain GPTQ."""
    return kept_tables(run, groups, folder, _measured, _table)


def kept_tables(
    run: Run,
    groups: Sequence[LinearGroup],
    folder: Path,
    make: Callable[[Linear], Mapping[str, Tensor]],
    read: Callable[[Mapping[str, Tensor]], T],
) -> dict[str, T]:
    """Weight -> what `read` makes of its tensors; those of a group are made once, linear by linear,
    and kept in a safetensors file of `folder`."""
    folder.mkdir(exist_ok=True)
    found = {}
    for group in groups:
        file = table_file(folder, group)
        if not file.exists():
            tensors = {
                f"{linear.name}|{key}": value
                for linear in linears(run, [group])
                for key, value in make(linear).items()
            }
            atomic_save_tensors(file, tensors)
        stored = read_tensors(file)
        for name in group.members:
            whole = f"{name}|"  # one name may begin another
            own = {k.removeprefix(whole): t for k, t in stored.items() if k.startswith(whole)}
            found[name] = read(own)
    return found


def table_file(folder: Path, group: LinearGroup) -> Path:
    """Where a group's tables are kept."""
    return folder / f"{group.name}.safetensors"


def graph_parts(graph: ColumnGraph, plain: str = "plain") -> dict[str, Tensor]:
    """The tensors of a graph, as tables keep them. plain: the name of its prices."""
    return {
        "nodes": graph.nodes,
        "edges": graph.edges.int(),
        "edge_weight": graph.edge_weight,
        "formats": graph.formats.contiguous(),
        plain: graph.plain,
    }


def graph_of(parts: Mapping[str, Tensor], plain: str = "plain") -> ColumnGraph:
    """Inverse of `graph_parts`."""
    names = ("nodes", "edges", "edge_weight", "formats", plain)
    nodes, edges, edge_weight, formats, prices = (parts[name] for name in names)
    return ColumnGraph(nodes, edges.long(), edge_weight, formats, prices)


def _table(parts: Mapping[str, Tensor]) -> Table:
    rows, columns = parts["shape"].tolist()
    return Table((rows, columns), parts["prices"], tuple(parts["finer"].tolist()), graph_of(parts))


def _measured(linear: Linear) -> dict[str, Tensor]:
    """The parts of a table: one sweep for all of FORMATS and FINER, and the graph."""
    weight, columns = linear.weight, linear.weight.shape[1]
    layouts = [Scheme.parse(name).segments(columns) for name in (*FORMATS, *FINER)]
    rounded = round_integers({"": weight}, linear.hessian, layouts, GPTQ)
    factor = inverse_factor(damped(linear.hessian, GPTQ.damping))
    found = [
        column_prices(weight - dequantize(rounded["", index]), factor, linear.rows)
        for index in range(len(layouts))
    ]
    hessian = damped(linear.hessian, GPTQ.damping)
    graph = column_graph(weight, hessian, factor, linear.rows, WIDTHS)
    return {
        "shape": torch.tensor(weight.shape),
        "prices": torch.stack(found[: len(FORMATS)], dim=1),
        "finer": torch.stack([one.sum() for one in found[len(FORMATS) :]]),
        **graph_parts(graph),
    }


@dataclass(frozen=True, eq=False)
class Rounded:
    """A linear as it was rounded for real.

    packed: its columns in the order they are stored in. value: float32 [N, K] in the model's order.
    lost:   nats, by the scores of the sensitivity table's kind, of the damped Hessian.
    """

    packed: QuantizedWeight
    value: Tensor
    lost: float


def rounded(
    run: Run, groups: Sequence[LinearGroup], plan: Mapping[str, Assignment]
) -> Iterator[tuple[str, Rounded]]:
    """Round the linears of some groups as a plan says, GPTQ in the order columns are stored in."""
    for linear in linears(run, groups):
        yield linear.name, round_linear(linear, plan[linear.name])


def round_linear(linear: Linear, assignment: Assignment) -> Rounded:
    """Round one linear."""
    columns = linear.weight.shape[1]
    order = torch.arange(columns) if assignment.order is None else assignment.order
    layout = Scheme.parse(assignment.scheme).segments(columns)
    moved, hessian = linear.weight[:, order], linear.hessian[order][:, order]
    packed = round_integers({"": moved}, hessian, [layout], GPTQ)["", 0]
    value = dequantize(packed)[:, torch.argsort(order)]
    error = value - linear.weight
    squares = ((error @ damped(linear.hessian, GPTQ.damping)) * error).sum(1).double()
    return Rounded(packed, value, float(linear.rows @ squares))


def lost_by_column(linear: Linear, assignment: Assignment) -> Tensor:
    """Round one linear: what was lost at every column, float64 [K] in the model's order."""
    columns = linear.weight.shape[1]
    order = torch.arange(columns) if assignment.order is None else assignment.order
    hessian = damped(linear.hessian[order][:, order], GPTQ.damping)
    error = (linear.weight - round_linear(linear, assignment).value)[:, order]
    return column_prices(error, inverse_factor(hessian), linear.rows)[torch.argsort(order)]
