"""Proxies: columns mean what they say, formulas become losses, other files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from quantlib.errors import SearchError, UsageError
from quantlib.models.rows import Weight
from quantlib.search.build import build_problem
from quantlib.search.expressions import Expression
from quantlib.search.proxies import (
    COLUMNS,
    EVOLVED,
    KNOWN,
    LAYER,
    Columns,
    Layers,
    Proxy,
    Use,
    layer_row,
    read_score,
    rescored,
    scheme_noise,
)
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.solve import solve


@pytest.fixture
def layers(table: Sensitivity) -> Layers:
    """Random statistics of every weight of `table`."""
    generator = torch.Generator().manual_seed(1)
    rows = {}
    for index, name in enumerate(table.rows):
        x = torch.randn(96, 16, generator=generator)
        weight = torch.randn(8, 16, generator=generator)
        use = Use(x.T @ x / 96, torch.rand(8, generator=generator))
        rows[name] = layer_row([(weight, [use])], index / len(table.rows))
    return Layers(table.model, {"kl": rows}, {"statistics": "s"})


def test_columns_are_the_sums_they_are_named_after() -> None:
    weight = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    use = Use(torch.tensor([[2.0, 1.0], [1.0, 4.0]]), torch.tensor([0.5, 0.25]))
    row = layer_row([(weight, [use])], 0.5)
    assert row["weight_energy"] == 14
    assert row["input_energy"] == 6
    assert row["gradient_energy"] == 0.75
    assert row["weighted_rows"] == 0.5 * 5 + 0.25 * 9
    assert row["weighted_columns"] == 2 * 1 + 4 * 13
    assert row["output_energy"] == pytest.approx((2 + 4 + 16) + 36)
    assert row["fisher_energy"] == pytest.approx(0.5 * (2 + 16) + 0.25 * 36)
    assert (row["rows"], row["columns"], row["parameters"], row["depth"]) == (2, 2, 4, 0.5)
    assert row["input_peak"] == pytest.approx(4 / 3)
    # 1 % of the mean is added to the diagonal, as rounding does
    eigenvalues = torch.linalg.eigvalsh(use.hessian) + 0.03
    assert row["input_floor"] == pytest.approx(float(eigenvalues.log().mean().exp()) / 3, rel=1e-6)


def test_a_weight_that_is_used_twice_counts_once_and_matters_twice() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    use = Use(torch.eye(8), torch.ones(4))
    once, twice = layer_row([(weight, [use])], 0.0), layer_row([(weight, [use, use])], 0.0)
    for name in ("parameters", "rows", "columns", "weight_energy", "weight_peak", "input_floor"):
        assert twice[name] == pytest.approx(once[name])
    assert twice["fisher_energy"] == pytest.approx(2 * once["fisher_energy"])
    stack = layer_row([(weight, [use]), (weight, [use])], 0.0)
    assert stack["parameters"] == 2 * once["parameters"]


def test_noise_falls_by_about_four_for_every_bit() -> None:
    noise = [scheme_noise(f"w{bits}g64") for bits in range(3, 9)]
    ratios = np.array(noise[:-1]) / np.array(noise[1:])
    # (2^b - 1)^2 levels: 5.4 from 3 to 4 bits, near 4 at the end
    assert ((ratios > 3.9) & (ratios < 6)).all()
    assert scheme_noise("w4g32") < scheme_noise("w4g64")


def test_columns_with_a_unit_are_relative_to_the_median_weight(
    table: Sensitivity, layers: Layers
) -> None:
    columns = Columns.of(table, layers, "kl")
    assert set(columns.values) == set(COLUMNS)
    energy = columns.values["weight_energy"]
    assert np.median(energy) == pytest.approx(1.0)
    bigger = {
        n: {**row, "weight_energy": 7 * row["weight_energy"]}
        for n, row in layers.rows["kl"].items()
    }
    scaled = Columns.of(table, Layers(table.model, {"kl": bigger}), "kl")
    np.testing.assert_allclose(scaled.values["weight_energy"], energy)
    first = table.rows[columns.keys[0][0]][columns.keys[0][1]]
    assert columns.values["loss"][0] == first.loss["kl"]
    with pytest.raises(SearchError, match="of model"):
        Columns.of(table, Layers("0" * 64, layers.rows), "kl")
    with pytest.raises(SearchError, match="have no"):
        Columns.of(table, Layers(table.model, {"kl": {}}), "kl")


def test_a_rescored_table_is_solved_as_any_other(
    table: Sensitivity, layers: Layers, weights: list[Weight]
) -> None:
    expression = Expression.parse(KNOWN["fisher"], COLUMNS)
    scored = rescored(table, layers, expression)
    assert sum(e.loss["kl"] for row in scored.rows.values() for e in row.values()) == (
        pytest.approx(sum(e.loss["kl"] for row in table.rows.values() for e in row.values()))
    )
    problem = build_problem(scored, weights, fixed_bytes=10_000)
    budget = int(1.5 * problem.bytes(problem.smallest()))
    picks = solve(problem, budget).picks
    mine = build_problem(table, weights, fixed_bytes=10_000)
    assert problem.bytes(picks) <= budget
    assert problem.loss(picks) <= problem.loss(mine.picks(mine.schemes(solve(mine, budget).picks)))
    assert scored.provenance["score"] == expression.text
    assert scored.calibrations == {}


def test_the_measured_score_as_a_formula_is_the_table(table: Sensitivity, layers: Layers) -> None:
    scored = rescored(table, layers, Expression.parse("loss", COLUMNS))
    for name, row in table.rows.items():
        for scheme, entry in row.items():
            assert scored.rows[name][scheme].loss["kl"] == pytest.approx(entry.loss["kl"])


def test_a_formula_that_gives_no_loss_names_weight_and_scheme(
    table: Sensitivity, layers: Layers
) -> None:
    for text in ("sub(noise, 1)", "log(sub(noise, 1))"):
        with pytest.raises(SearchError, match="which is no loss"):
            rescored(table, layers, Expression.parse(text, COLUMNS))


def test_files_come_back_as_they_were(layers: Layers, tmp_path: Path) -> None:
    again = Layers.from_json(layers.to_json(), "layers")
    assert again == layers
    proxy = Proxy(
        Expression.parse("mul(noise, rows)", COLUMNS), ("smollm2",), {"all": 0.9}, {"seed": 3}
    )
    proxy.save(tmp_path / "proxy.json")
    assert Proxy.load(tmp_path / "proxy.json") == proxy
    assert read_score(f"{EVOLVED}{tmp_path / 'proxy.json'}") == proxy.expression
    assert read_score("measured") is None
    for name in KNOWN:
        assert read_score(name) is not None
    assert set(LAYER) <= set(COLUMNS)


def test_files_of_another_schema_are_refused_with_a_sentence(
    layers: Layers, tmp_path: Path
) -> None:
    file = tmp_path / "proxy.json"
    Proxy(Expression.parse("noise", COLUMNS)).save(file)
    data = json.loads(file.read_text())
    wrong = [
        ({"version": 2}, "has version 2"),
        ({"format": "quantlib-plan"}, "is not a quantlib-proxy file"),
        ({"expression": "mul(noise, colour)"}, "reads 'colour'"),
        ({"expression": 3}, "must be a text"),
        ({"more": 1}, "nothing reads 'more'"),
    ]
    for change, said in wrong:
        file.write_text(json.dumps(data | change))
        with pytest.raises(SearchError, match=said):
            Proxy.load(file)
    with pytest.raises(SearchError, match="there is no evolved proxy"):
        read_score(f"{EVOLVED}{tmp_path / 'missing.json'}")
    for text in ("best", EVOLVED):
        with pytest.raises(UsageError, match="use measured"):
            read_score(text)
    text = layers.to_json().replace('"depth"', '"deep"')
    with pytest.raises(SearchError, match="depth"):
        Layers.from_json(text, "layers")
