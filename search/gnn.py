"""Weight columns as a graph, and a network of two graph convolutions over it (after MG-PTQ,
arXiv:2501.18154, of which neither code nor hyperparameters are public).

A node is an input column of one weight, an edge says that GPTQ lets one of its two columns pay for
the other's error: |U_ij| / sqrt(U_ii U_jj) of the Cholesky factor U of the inverse Hessian, of
which every column keeps its strongest. From what is cheap to know of a column (its energy, how
well others predict it, what plain rounding would cost it) the network predicts what it costs
*after* GPTQ, as a factor on the price of plain rounding. Nothing it is told has a unit, and the
format is an input rather than an output, so one network serves weights, models and formats that it
has not seen.

`gnn_bits.py` lets it assign bits to columns, `predict.py` sensitivities to weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantlib.errors import SearchError
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.weight import dequantize
from quantlib.formats.weight_format import Segment, WeightFormat

NEIGHBOURS = 16
"""Edges that every column keeps; with those that others keep to it, some 30."""
FEATURES = 6
FORMAT_FEATURES = 5
HIDDEN = 64
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class ColumnGraph:
    """One weight, or several side by side.

    nodes:   float32 [K, FEATURES].
    edges:   int64 [2, E]; edge_weight: float32 [E] in 0..1.
    formats: float32 [K, S, FORMAT_FEATURES], what is known of every column in every format.
    plain:   float64 [K, S], prices of plain rounding: what the network's factors multiply.
    """

    nodes: Tensor
    edges: Tensor
    edge_weight: Tensor
    formats: Tensor
    plain: Tensor

    @cached_property
    def adjacency(self) -> Tensor:
        """What a graph convolution multiplies by: edges and one loop per node, each divided by the
        roots of the degrees of its ends. Sparse float32 [K, K] in rows, symmetric."""
        columns = len(self.nodes)
        loops = torch.arange(columns).expand(2, -1)
        ends = torch.cat([self.edges, loops], dim=1)
        strength = torch.cat([self.edge_weight, torch.ones(columns)])
        root = torch.zeros(columns).index_add(0, ends[0], strength).rsqrt()
        strength = strength * root[ends[0]] * root[ends[1]]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            square = (columns, columns)
            found = torch.sparse_coo_tensor(ends, strength, square, check_invariants=True)
            return found.to_sparse_csr()


def column_graph(
    weight: Tensor,
    hessian: Tensor,
    factor: Tensor,
    rows: Tensor,
    formats: Sequence[WeightFormat],
    neighbours: int = NEIGHBOURS,
) -> ColumnGraph:
    """The graph of `weight` [N, K].

    hessian, factor: [K, K], damped and scaled, and its U (`rounding.hessian`); rows: float [N],
    what a squared error of an output costs.
    """
    conditional = factor.diagonal().double() ** -2
    plain = plain_prices(weight, conditional, rows, formats)
    energy = (rows.double() @ weight.double().square()).clamp(min=_TINY)
    edges, edge_weight = _edges(factor, neighbours)
    relative = (plain / (energy * conditional)[:, None]).clamp(min=_TINY).log()
    described = torch.tensor([_described(form) for form in formats]).expand(len(plain), -1, -1)
    return ColumnGraph(
        _features(weight, hessian, conditional, energy),
        edges,
        edge_weight,
        torch.cat([relative[..., None].float(), described], dim=2),
        plain,
    )


def plain_prices(
    weight: Tensor, conditional: Tensor, rows: Tensor, formats: Sequence[WeightFormat]
) -> Tensor:
    """What rounding to nearest costs every column, float64 [K, S]: squared errors, weighted by what
    rows cost, times the variance `conditional` [K] that other columns cannot pay for (U_jj^-2)."""
    found = []
    for form in formats:
        rounded = dequantize(quantize_rtn(weight, (Segment(0, weight.shape[1], form),)))
        found.append(rows.double() @ (rounded - weight).double().square())
    return torch.stack(found, dim=1) * conditional[:, None]


def plain_row_prices(
    weight: Tensor, conditional: Tensor, rows: Tensor, formats: Sequence[WeightFormat]
) -> Tensor:
    """What rounding to nearest costs every row, float64 [N, S]; the sum over rows is that of
    `plain_prices` over columns."""
    found = []
    for form in formats:
        rounded = dequantize(quantize_rtn(weight, (Segment(0, weight.shape[1], form),)))
        found.append((rounded - weight).double().square() @ conditional * rows.double())
    return torch.stack(found, dim=1)


def _features(weight: Tensor, hessian: Tensor, conditional: Tensor, energy: Tensor) -> Tensor:
    """[K, FEATURES]. Sizes are relative to the weight's other columns."""
    own = hessian.diagonal().double().clamp(min=_TINY)
    largest = weight.abs().amax(0).double().clamp(min=_TINY).log()
    squares = weight.double().square()
    fourth = squares.square().mean(0).clamp(min=_TINY)
    kurtosis = (fourth / squares.mean(0).square().clamp(min=_TINY)).clamp(min=1, max=1e6).log()
    columns = [
        _centred(conditional.log()),
        (own / conditional).clamp(min=1).log(),  # 1 / (1 - R^2) of predicting it from later columns
        _centred(energy.log()),
        _centred(largest),
        kurtosis,
        torch.linspace(0, 1, len(own), dtype=torch.float64),
    ]
    return torch.stack(columns, dim=1).float()


def _centred(values: Tensor) -> Tensor:
    return values - values.mean()


def _described(form: WeightFormat) -> list[float]:
    """FORMAT_FEATURES less the column's own: numbers of order one."""
    group = form.group_size if form.group_size > 0 else 1024
    zero = 0.0 if form.symmetric else form.zero_bits / form.bits
    return [form.bits / 4, torch.tensor(group).log2().item() / 6, zero, form.scale_bits / 16]


def _edges(factor: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Both directions of every edge that either end keeps, and their weights."""
    columns = len(factor)
    diagonal = factor.diagonal().abs().sqrt()
    strength = factor.triu(1).abs() / (diagonal[:, None] * diagonal)
    strength = strength + strength.T
    kept = torch.zeros_like(strength, dtype=torch.bool)
    nearest = strength.topk(min(neighbours, columns - 1), dim=1).indices
    kept.scatter_(1, nearest, True)
    kept = (kept | kept.T) & (strength > 0)
    edges = kept.nonzero().T.contiguous()
    return edges, strength[kept].clamp(max=1).float()


def side_by_side(graphs: Sequence[ColumnGraph]) -> ColumnGraph:
    """One graph of several that share their formats, without edges between them."""
    offset, edges = 0, []
    for graph in graphs:
        edges.append(graph.edges + offset)
        offset += len(graph.nodes)
    return ColumnGraph(
        torch.cat([graph.nodes for graph in graphs]),
        torch.cat(edges, dim=1),
        torch.cat([graph.edge_weight for graph in graphs]),
        torch.cat([graph.formats for graph in graphs]),
        torch.cat([graph.plain for graph in graphs]),
    )


class ColumnNetwork(nn.Module):
    """Two graph convolutions, and a head that is asked once for every format.

    Fresh, it answers that GPTQ costs what plain rounding costs.
    """

    def __init__(self, generator: torch.Generator, hidden: int = HIDDEN) -> None:
        """`generator` draws the weights. Raises SearchError without torch-geometric."""
        super().__init__()
        convolution = _convolution()
        self.first = convolution(FEATURES, hidden, normalize=False)
        self.second = convolution(hidden, hidden, normalize=False)
        asked = nn.Linear(hidden + FEATURES + FORMAT_FEATURES, hidden)
        answer = nn.Linear(hidden, 1)
        self.head = nn.Sequential(asked, nn.ReLU(), answer)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)
        nn.init.zeros_(answer.weight)

    def forward(self, graph: ColumnGraph) -> Tensor:
        """log of price after GPTQ / plain price: float32 [K, S]."""
        hidden = torch.relu(self.first(graph.nodes, graph.adjacency))
        hidden = self.second(hidden, graph.adjacency)
        own = torch.cat([hidden, graph.nodes], dim=1)
        asked, relu, answer = cast(Any, self.head)
        # What a column says of itself is multiplied once, not once for every format.
        of_column, of_format = asked.weight.split([own.shape[1], FORMAT_FEATURES], dim=1)
        heard = functional.linear(own, of_column)[:, None]
        heard = heard + functional.linear(graph.formats, of_format, asked.bias)
        out: Tensor = answer(relu(heard))
        return out.squeeze(2)

    def log_prices(self, graph: ColumnGraph) -> Tensor:
        """log of the predicted prices after GPTQ: float64 [K, S]."""
        return graph.plain.clamp(min=_TINY).log() + self(graph).double()


class _SymmetricProduct(torch.autograd.Function):
    """A sparse symmetric matrix [K, K] times [K, H]. torch transposes the matrix to go back, which
    is a sort of all edges in every step; this one is its own transpose."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, values: Tensor) -> Tensor:
        ctx.matrix = matrix
        return matrix @ values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.matrix @ gradients[0]


def _convolution() -> Any:
    """torch-geometric's graph convolution, for a `ColumnGraph.adjacency`."""
    try:
        from torch_geometric.nn import GCNConv
    except ImportError as error:
        raise SearchError(
            "the graph network needs torch-geometric, which is not installed: "
            'pip install "quantlib-torch[graph]"'
        ) from error

    class Convolution(GCNConv):
        def message_and_aggregate(self, adj_t: Tensor, x: Tensor) -> Any:
            return _SymmetricProduct.apply(adj_t, x)

    return Convolution
