"""Losses that were not measured: sampled rows are unbiased, and what is learned is learned."""

import math

import pytest
import torch
from torch import Tensor

from quantlib.calibration.statistics import EmbeddingStatistics, MatrixStatistics
from quantlib.errors import SearchError
from quantlib.formats.scheme import Scheme
from quantlib.rounding.hessian import damped, inverse_factor
from quantlib.search import scores
from quantlib.search.gnn import ColumnGraph, column_graph
from quantlib.search.predict import Example, Ridge, facts, spread_of
from quantlib.search.predict_graph import Teaching, teach
from quantlib.search.predict_rows import draw_rows, embedding_rows, linear_rows

FORMATS = [
    Scheme.parse(name).segments(1)[0].format
    for name in ("w2g64z4s4", "w3g32z4s4", "w4g64z5s5", "w6g64zs6")
]


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def graph(seed: int, columns: int = 48) -> ColumnGraph:
    generator = draw(seed)
    weight = torch.randn(20, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) * (seed % 5) / 8
    inputs = torch.randn(300, columns, generator=generator) @ (torch.eye(columns) + mixing)
    moment = damped(inputs.T @ inputs / 300, 0.01)
    rows = torch.rand(20, generator=generator).double()
    return column_graph(weight, moment, inverse_factor(moment), rows, FORMATS)


def log_linear(one: ColumnGraph) -> Tensor:
    """Losses that are a fixed function of a weight's facts."""
    found = facts(one)
    return one.plain.sum(0) * torch.exp(0.4 * found[:, 2] - 0.3 * found[:, 9] - 0.7)


def test_a_sample_of_everything_is_everything() -> None:
    sizes = torch.tensor([1.0, 0.0, 2.0, 3.0])
    sample = draw_rows(sizes, 8, draw())
    assert sample.rows.tolist() == [0, 2, 3]
    assert sample.total(torch.tensor([1.0, 5.0, 7.0])) == (13.0, 0.0)


def test_losses_in_proportion_to_sizes_are_known_from_any_rows() -> None:
    sizes = torch.rand(1000, generator=draw(1)).double().exp()
    sample = draw_rows(sizes, 20, draw(2))
    loss, error = sample.total(3 * sizes[sample.rows])
    assert loss == pytest.approx(3 * float(sizes.sum()))
    assert error == pytest.approx(0, abs=1e-6 * loss)
    assert float(sample.times.sum()) == 20


def test_estimates_are_unbiased_and_as_far_off_as_they_say() -> None:
    sizes = torch.rand(600, generator=draw(3)).double() ** 6 + 1e-6
    losses = sizes * (1 + 0.5 * torch.randn(600, generator=draw(4)).double().clamp(-1.9, 1.9))
    truth, found, said = float(losses.sum()), [], []
    for seed in range(300):
        sample = draw_rows(sizes, 40, draw(seed))
        estimate, error = sample.total(losses[sample.rows])
        found.append(estimate)
        said.append(error)
    spread = torch.tensor(found).std().item()
    # 300 estimates: their mean is known to spread / sqrt(300), their spread to 4 %
    assert abs(sum(found) / 300 - truth) < 4 * spread / math.sqrt(300)
    assert 0.7 < spread / (sum(said) / 300) < 1.2


def test_a_row_of_size_zero_is_never_drawn() -> None:
    sizes = torch.ones(100).double()
    sizes[::2] = 0
    for seed in range(5):
        assert bool((draw_rows(sizes, 30, draw(seed)).rows % 2 == 1).all())
    nothing = draw_rows(torch.zeros(5), 3, draw())
    assert nothing.total(torch.zeros(0)) == (0.0, 0.0)


@pytest.mark.parametrize("sizes", [[1.0, -1.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_sizes_that_are_no_sizes_are_refused(sizes: list[float]) -> None:
    with pytest.raises(SearchError, match="finite"):
        draw_rows(torch.tensor(sizes), 1, draw())


def test_rows_of_a_linear_add_up_to_its_score() -> None:
    error, fisher = torch.randn(9, 16, generator=draw(1)), torch.rand(9, generator=draw(2))
    x = torch.randn(50, 16, generator=draw(3))
    statistics = MatrixStatistics(x.T @ x / 50, 50, 50.0, {"w": fisher})
    found = linear_rows(error, statistics.hessian, fisher)
    expected = scores.fisher_score(error, statistics, "w")
    assert float(found.sum()) == pytest.approx(expected, rel=1e-5)
    plain = linear_rows(error, torch.ones(16), fisher)
    assert float(plain.sum()) == pytest.approx(0.5 * float(fisher @ error.square().sum(1)))


@pytest.mark.parametrize(("head", "lookup"), [(True, False), (False, True), (True, True)])
def test_rows_of_an_embedding_add_up_to_its_score(head: bool, lookup: bool) -> None:
    error = torch.randn(12, 8, generator=draw(1))
    h = torch.randn(40, 8, generator=draw(2))
    statistics = EmbeddingStatistics(
        torch.rand(12, generator=draw(3)) * 10,
        torch.rand(8, generator=draw(4)),
        h.T @ h / 40,
        torch.rand(12, generator=draw(5)),
        h,
        torch.zeros(40, dtype=torch.int64),
        40,
    )
    found = embedding_rows(error, statistics, head, lookup)
    expected = scores.embedding_score(error, statistics, head, lookup)
    assert float(found.sum()) == pytest.approx(expected, rel=1e-5)


def test_ridge_learns_what_is_a_function_of_the_facts() -> None:
    examples = {str(i): Example(one := graph(i), log_linear(one)) for i in range(12)}
    fitted = Ridge.fit(examples, strength=1e-6)
    for seed in (50, 51, 52):
        unseen = graph(seed)
        torch.testing.assert_close(fitted.predict(unseen), log_linear(unseen), rtol=0.02, atol=0)
    assert fitted.sigma < 0.02


def test_ridge_knows_how_far_off_it_is() -> None:
    noise = draw(9)
    examples = {}
    for i in range(40):
        one = graph(i)
        factor = torch.exp(0.3 * torch.randn(4, generator=noise).double())
        examples[str(i)] = Example(one, log_linear(one) * factor)
    # 160 logs with a deviation of 0.3, of which the facts explain some by chance
    assert 0.25 < Ridge.fit(examples).sigma < 0.4


def test_nothing_is_learned_of_one_weight_or_of_no_numbers() -> None:
    one = graph(0)
    with pytest.raises(SearchError, match="at least two"):
        Ridge.fit({"a": Example(one, log_linear(one))})
    broken = Example(one, torch.tensor([1.0, math.nan, 1.0, 1.0]).double())
    with pytest.raises(SearchError, match="no number above 0"):
        Ridge.fit({"a": broken, "b": Example(one, log_linear(one))})


def test_spread_of_small_deviations_is_the_deviation() -> None:
    assert spread_of(0.05) == pytest.approx(0.05, rel=0.01)
    assert math.isfinite(spread_of(1e9))


def test_the_network_learns_sums_over_columns_of_weights_it_has_not_seen() -> None:
    pytest.importorskip("torch_geometric", reason="the graph network needs torch-geometric")
    examples = {str(i): Example(one := graph(i), log_linear(one)) for i in range(12)}
    steps: list[float] = []
    taught = teach(
        examples, Teaching(steps=120, learning_rate=1e-2), lambda _, loss: steps.append(loss)
    )
    assert len(steps) == 120
    missed, plain = [], []
    for seed in (50, 51, 52):
        unseen = graph(seed)
        truth = log_linear(unseen).log()
        missed.append(float((taught.predict(unseen).log() - truth).square().mean()))
        plain.append(float((unseen.plain.sum(0).log() - truth).square().mean()))
    assert sum(missed) < 0.1 * sum(plain)
    assert math.isfinite(taught.sigma)


def test_the_network_needs_a_weight_to_be_held_out() -> None:
    pytest.importorskip("torch_geometric", reason="the graph network needs torch-geometric")
    one = graph(0)
    with pytest.raises(SearchError, match="measure more, or predict with ridge"):
        teach({"a": Example(one, log_linear(one))})
