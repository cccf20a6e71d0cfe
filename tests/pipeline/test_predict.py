"""`--predict`: a part is measured, the table is whole, and what ships is what measuring gives."""

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from quantlib.errors import UsageError
from quantlib.models.rows import LinearGroup
from quantlib.pipeline.compress import (
    apply_plan,
    measured_table,
    open_run,
    recipe_for,
    rotated,
)
from quantlib.pipeline.measure import entry_key
from quantlib.pipeline.plan import Budget, search
from quantlib.pipeline.predict import METHODS, spread_over
from quantlib.pipeline.workfiles import save_plan
from quantlib.search.sensitivity import Sensitivity

TASK = "kl"
RECIPE = {"seqlen": 64, "windows": 4, "probe_windows": 2, "probes": 0, "passes": 1, "seed": 0}
SCHEMES = ["w2g32z4s4", "w4g32zs4", "w6g64zs6"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Path:
    """A tiny Llama of six blocks, so that there are layers nobody measured."""
    return tiny_llama(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=6)


def table(model: Path, work: Path, text: str, method: str | None, **changes: Any) -> Sensitivity:
    recipe = recipe_for(Budget(), data=text, **(RECIPE | {"schemes": SCHEMES} | changes))
    with open_run(model, work, recipe) as run:
        return measured_table(rotated(run), method)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory in which `measured` was. Not to be changed."""
    return tmp_path_factory.mktemp("measured") / "work"


@pytest.fixture(scope="module")
def measured(deep: Path, text: str, whole: Path) -> Sensitivity:
    return table(deep, whole, text, None)


@pytest.mark.parametrize("method", METHODS)
def test_the_table_is_whole_and_near_the_measured_one(
    method: str, deep: Path, text: str, tmp_path: Path, measured: Sensitivity
) -> None:
    if method == "graph":
        pytest.importorskip("torch_geometric", reason="the graph network needs torch-geometric")
    found = table(deep, tmp_path / "work", text, method)
    assert found.provenance["predicted"] == method
    assert {n: list(row) for n, row in found.rows.items()} == {
        name: list(row) for name, row in measured.rows.items()
    }
    ratios = []
    for name, row in found.rows.items():
        for scheme, entry in row.items():
            truth = measured.entry(name, scheme)
            assert entry.bytes == truth.bytes
            assert entry.error[TASK] >= 0
            ratios.append(entry.loss[TASK] / truth.loss[TASK])
    within = sum(0.5 < ratio < 2 for ratio in ratios) / len(ratios)
    assert within > 0.95
    assert any(ratio != 1 for ratio in ratios)


def test_rows_of_a_weight_with_few_rows_are_no_estimate(
    deep: Path, text: str, tmp_path: Path, measured: Sensitivity
) -> None:
    found = table(deep, tmp_path / "work", text, "rows")
    name = "model.layers.3.self_attn.k_proj.weight"  # 32 rows
    for scheme, entry in found.rows[name].items():
        # the same rows are rounded in other company: float32 sums in another order
        assert entry.loss[TASK] == pytest.approx(measured.entry(name, scheme).loss[TASK], rel=1e-4)


def test_a_plan_from_predictions_ships_what_measuring_would_have(
    deep: Path, text: str, tmp_path: Path, measured: Sensitivity, whole: Path
) -> None:
    assert not measured.provenance.get("predicted")
    predicted = tmp_path / "predicted"
    found = table(deep, predicted, text, "rows")
    recipe = recipe_for(Budget(), data=text, **RECIPE, schemes=SCHEMES)
    with open_run(deep, predicted, recipe) as run:
        plan, _, _ = search(run.model_map, found, Budget(bits=4.5))
        save_plan(predicted, plan)
        name = "model.layers.3.mlp.up_proj.weight"
        assert not run.bank.has(entry_key(run, name, plan.schemes[name]))
    guessed = apply_plan(predicted / "plan.json", tmp_path / "guessed", predicted)
    expected = tmp_path / "plan.json"
    expected.write_text(plan.to_json())
    sure = apply_plan(expected, tmp_path / "sure", Path(shutil.copytree(whole, tmp_path / "whole")))
    weights = [folder.path / "model.safetensors" for folder in (guessed, sure)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_measuring_goes_on_from_a_predicted_table(
    deep: Path, text: str, tmp_path: Path, measured: Sensitivity
) -> None:
    table(deep, tmp_path / "work", text, "ridge")
    found = table(deep, tmp_path / "work", text, None)
    assert found == measured


def test_what_was_predicted_is_not_predicted_again(
    deep: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantlib.pipeline import predict

    first = table(deep, tmp_path / "work", text, "rows")
    monkeypatch.setattr(predict, "by_rows", None)
    assert table(deep, tmp_path / "work", text, "rows") == first


def test_groups_are_taken_from_the_whole_depth() -> None:
    groups = [
        LinearGroup(
            f"blocks.{i}.{place}", "c", f"blocks.{i}", (f"{i}{place}",), "linear", False, ""
        )
        for i in range(20)
        for place in ("attn", "mlp")
    ]
    chosen = [group.name for group in spread_over(groups, Fraction(1, 10))]
    assert chosen == ["blocks.0.attn", "blocks.19.attn", "blocks.0.mlp", "blocks.19.mlp"]
    assert len(spread_over(groups, Fraction(1, 4))) == 10
    assert spread_over(groups[:1], Fraction(1, 10)) == groups[:1]


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("guess", {}, "choose one of rows, ridge, graph"),
        ("rows", {"gradients": False}, "without gradients"),
        ("ridge", {"schemes": ["w4g32zs4a8", "w8g32zs6a8"]}, "round inputs"),
        ("ridge", {"schemes": ["w2g32zs4h4/8", "w4g32zs4h8/8"]}, "wider columns"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_any_work(
    method: str, changes: dict[str, Any], reason: str, deep: Path, text: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=reason):
        table(deep, tmp_path / "work", text, method, **changes)
    assert not list((tmp_path / "work").glob("statistics/*"))


def test_rows_predict_wider_columns_too(deep: Path, text: str, tmp_path: Path) -> None:
    schemes = ["w2g32zs4h4/8", "w4g32zs4h6/8", "w6g64zs6"]
    found = table(deep, tmp_path / "a", text, "rows", schemes=schemes)
    truth = table(deep, tmp_path / "b", text, None, schemes=schemes)
    name = "model.layers.2.self_attn.v_proj.weight"
    for scheme, entry in found.rows[name].items():
        assert entry.loss[TASK] == pytest.approx(truth.entry(name, scheme).loss[TASK], rel=1e-4)


def test_rows_predict_what_rounding_inputs_costs_too(deep: Path, text: str, tmp_path: Path) -> None:
    schemes = ["w4g32zs4a4zg32h8/8", "w4g32zs4a8g32h8/8", "w8g64zs6a4zg32h8/8", "w6g64zs6"]
    found = table(deep, tmp_path / "a", text, "rows", schemes=schemes)
    truth = table(deep, tmp_path / "b", text, None, schemes=schemes)
    for place in ("self_attn.v_proj", "mlp.down_proj", "mlp.up_proj"):
        name = f"model.layers.2.{place}.weight"
        row = found.rows[name]
        for scheme in schemes[:3]:
            measured = truth.entry(name, scheme).loss[TASK]
            # rows are all there or drawn, and inputs meet exact weights instead of rounded ones
            assert row[scheme].loss[TASK] == pytest.approx(measured, rel=0.15), (name, scheme)
        few, many = (row[scheme].loss[TASK] for scheme in schemes[:2])
        assert few > 1.2 * many  # alike but for the inputs
