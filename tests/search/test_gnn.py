"""The graph network: what it is told has no unit, what it learns is seen in its bits."""

import sys

import pytest
import torch
from torch import Tensor

from quantlib.errors import SearchError
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize
from quantlib.rounding import RoundingOptions, round_integers
from quantlib.rounding.hessian import damped, inverse_factor
from quantlib.search.columns import FORMATS, column_prices
from quantlib.search.gnn import (
    FEATURES,
    NEIGHBOURS,
    ColumnGraph,
    ColumnNetwork,
    column_graph,
    side_by_side,
)
from quantlib.search.gnn_bits import Lesson, Training, learned_prices, soft_bits, train

pytest.importorskip("torch_geometric", reason="the graph network needs torch-geometric")

WIDTHS = [Scheme.parse(name).segments(1)[0].format for name in FORMATS]
RATES = torch.tensor([form.bits + 0.25 for form in WIDTHS], dtype=torch.float64)
COLUMNS, ROWS = 64, 24


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the moment of inputs that depend on each other, and prices of rows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    scales = torch.exp(torch.randn(COLUMNS, generator=generator))
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    inputs = torch.randn(500, COLUMNS, generator=generator) @ (torch.eye(COLUMNS) + mixing) * scales
    rows = torch.rand(ROWS, generator=generator).double() + 0.1
    return weight, inputs.T @ inputs / len(inputs), rows


def graph_of(weight: Tensor, hessian: Tensor, rows: Tensor) -> ColumnGraph:
    moment = damped(hessian, 0.01)
    return column_graph(weight, moment, inverse_factor(moment), rows, WIDTHS)


def lesson(seed: int) -> Lesson:
    """A weight that was really swept in every width."""
    weight, hessian, rows = problem(seed)
    layouts = [Scheme.parse(name).segments(COLUMNS) for name in FORMATS]
    rounded = round_integers({"": weight}, hessian, layouts, RoundingOptions(passes=0))
    factor = inverse_factor(damped(hessian, 0.01))
    errors = [weight - dequantize(rounded["", index]) for index in range(len(layouts))]
    prices = torch.stack([column_prices(error, factor, rows) for error in errors], dim=1)
    return Lesson(graph_of(weight, hessian, rows), prices, RATES)


def network(seed: int = 0) -> ColumnNetwork:
    return ColumnNetwork(torch.Generator().manual_seed(seed), hidden=16)


def test_a_graph_has_no_units() -> None:
    weight, hessian, rows = problem(0)
    plain, scaled = graph_of(weight, hessian, rows), graph_of(8 * weight, 3 * hessian, 5 * rows)
    torch.testing.assert_close(plain.nodes, scaled.nodes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain.formats, scaled.formats, rtol=1e-3, atol=1e-3)
    assert torch.equal(plain.edges, scaled.edges)
    # the moment is scaled to a mean diagonal of 1 before, so its size is the rows' affair
    torch.testing.assert_close(scaled.plain, 64 * 5 * plain.plain, rtol=1e-3, atol=0)


def test_edges_go_both_ways_and_never_to_oneself() -> None:
    graph = graph_of(*problem(1))
    pairs = set(map(tuple, graph.edges.T.tolist()))
    assert all((b, a) in pairs and a != b for a, b in pairs)
    degree = torch.bincount(graph.edges[0], minlength=COLUMNS)
    assert int(degree.min()) >= NEIGHBOURS
    assert bool(((graph.edge_weight > 0) & (graph.edge_weight <= 1)).all())
    assert graph.nodes.shape == (COLUMNS, FEATURES)
    assert bool(torch.isfinite(graph.nodes).all())
    assert bool(torch.isfinite(graph.formats).all())


def test_columns_that_are_independent_have_no_edges() -> None:
    weight, _, rows = problem(2)
    graph = graph_of(weight, torch.eye(COLUMNS), rows)
    assert graph.edges.shape == (2, 0)
    assert bool(torch.isfinite(network()(graph)).all())


def test_a_dead_input_and_a_row_of_zeros_give_numbers() -> None:
    weight, hessian, rows = problem(3)
    hessian[5], hessian[:, 5], weight[7], weight[:, 9] = 0, 0, 0, 0
    graph = graph_of(weight, hessian, rows)
    assert bool(torch.isfinite(graph.nodes).all())
    assert bool(torch.isfinite(network().log_prices(graph)).all())


def test_a_fresh_network_answers_with_plain_rounding() -> None:
    graph = graph_of(*problem(4))
    torch.testing.assert_close(learned_prices(network(), graph), graph.plain)


def test_graphs_side_by_side_do_not_touch() -> None:
    graphs = [graph_of(*problem(seed)) for seed in (5, 6)]
    taught = network()
    with torch.no_grad():
        taught.head[-1].weight.normal_(generator=torch.Generator().manual_seed(1))
        apart = torch.cat([taught(graph) for graph in graphs])
        together = taught(side_by_side(graphs))
    assert float(apart.std()) > 0
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_soft_bits_are_shares_that_follow_the_price_of_a_byte() -> None:
    prices = torch.tensor([[4.0, 1.0, 0.25, 0.01], [1.0, 0.3, 0.05, 0.01]]).double()
    rates = RATES.expand(2, -1)
    warm = soft_bits(prices, rates, 0.5, 1.0)
    torch.testing.assert_close(warm.sum(1), torch.ones(2).double())
    assert soft_bits(prices, rates, 1e3, 0.01)[:, 0].tolist() == pytest.approx([1, 1])
    cold = soft_bits(prices, rates, 0.5, 1e-3)
    assert torch.equal(cold.argmax(1), (prices + 0.5 * rates).argmin(1))
    assert float(cold.max(1).values.min()) > 0.99


def test_training_brings_prices_nearer_to_what_sweeps_book_on_weights_it_never_saw() -> None:
    lessons = {str(seed): lesson(seed) for seed in range(10, 16)}
    unseen = lesson(99)
    budget = 2.75 * COLUMNS * len(lessons)
    taught = network()
    multiplier = train(taught, lessons, budget, Training(steps=80, batch=4, learning_rate=1e-2))
    assert multiplier > 0

    def error(prices: Tensor) -> float:
        return float((prices.log() - unseen.prices.log()).square().mean())

    plain, learned = error(unseen.graph.plain), error(learned_prices(taught, unseen.graph))
    assert learned < 0.8 * plain


def test_the_same_seed_trains_the_same_network() -> None:
    lessons = {str(seed): lesson(seed) for seed in range(3)}
    found = []
    for _ in range(2):
        taught = network()
        train(taught, lessons, 3.0 * COLUMNS * 3, Training(steps=5, batch=2))
        found.append(learned_prices(taught, lessons["0"].graph))
    assert torch.equal(*found)


@pytest.mark.parametrize("bits", [1.0, 9.0])
def test_a_budget_no_assignment_meets_is_refused_with_the_range(bits: float) -> None:
    with pytest.raises(SearchError, match="the least and the most"):
        train(network(), {"a": lesson(0)}, bits * COLUMNS, Training(steps=1))


def test_prices_that_are_no_numbers_end_the_training_with_a_sentence() -> None:
    one = lesson(0)
    broken = Lesson(one.graph, one.prices.clone(), RATES)
    broken.prices[3, 1] = torch.nan
    with pytest.raises(SearchError, match="loss is nan"):
        train(network(), {"a": broken}, 3 * COLUMNS, Training(steps=2))


def test_without_the_library_a_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(SearchError, match=r"quantlib-torch\[graph\]"):
        network()


def test_the_network_is_graph_convolutions_and_a_head_per_format() -> None:
    """Beside torch-geometric's own convolution over edges, forwards and backwards."""
    from torch_geometric.nn import GCNConv

    graph, taught = graph_of(*problem(7)), network()
    torch.nn.init.normal_(taught.head[-1].weight, generator=torch.Generator().manual_seed(1))
    found = taught(graph)
    found.square().sum().backward()
    ours = {name: weight.grad for name, weight in taught.named_parameters()}
    taught.zero_grad()
    first, second = GCNConv(FEATURES, 16), GCNConv(16, 16)
    first.load_state_dict(taught.first.state_dict())
    second.load_state_dict(taught.second.state_dict())
    hidden = second(
        first(graph.nodes, graph.edges, graph.edge_weight).relu(), graph.edges, graph.edge_weight
    )
    own = torch.cat([hidden, graph.nodes], dim=1)[:, None].expand(-1, len(WIDTHS), -1)
    expected = taught.head(torch.cat([own, graph.formats], dim=2)).squeeze(2)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected)
    assert first.lin.weight.grad is not None
    torch.testing.assert_close(ours["first.lin.weight"], first.lin.weight.grad)
    torch.testing.assert_close(ours["second.lin.weight"], second.lin.weight.grad)
    torch.testing.assert_close(ours["head.0.weight"], taught.head[0].weight.grad)
