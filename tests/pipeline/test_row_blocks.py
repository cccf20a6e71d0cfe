"""Rows of linears in blocks: predicted exactly, chosen by the one knapsack, shipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlib.checkpoint.reader import read_layout
from quantlib.errors import UsageError
from quantlib.formats import CompositeWeight, Scheme, dequantize_stored
from quantlib.pipeline import workfiles
from quantlib.pipeline.bytecount import weight_bytes
from quantlib.pipeline.compress import Result, apply_plan, compress, recipe_for
from quantlib.pipeline.dense import DensePlan, bank_weight
from quantlib.pipeline.measure import ordered_statistics, ordered_weight
from quantlib.pipeline.opening import open_run, reopen_run
from quantlib.pipeline.plan import TASK, Budget, allocation_problem
from quantlib.pipeline.predict import check as check_prediction
from quantlib.pipeline.reround import reround_inputs
from quantlib.pipeline.row_blocks import is_mixture, row_formats, stored_weight
from quantlib.recipe import Recipe
from quantlib.runtime.load import load
from quantlib.search.scores import fisher_score
from quantlib.search.solve import solve

SCHEMES = ["w2g32z4s4", "w4g32zs4", "w6g64zs6"]
DECADES = 2.0


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Path:
    """A tiny Llama whose outputs matter by very different amounts: rows of linears differ by two
    decades."""
    folder = tiny_llama(
        tmp_path_factory.mktemp("uneven") / "model", hidden_size=128, intermediate_size=512
    )
    file = folder / "model.safetensors"
    tensors, generator = load_file(file), torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            power = DECADES * (torch.rand(len(tensor), 1, generator=generator) - 0.5)
            tensors[name] = tensor * 10**power
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory, uneven: Path, text: str, small: dict[str, Any]
) -> Result:
    """It, compressed with mixtures of rows among the candidates, and rounded again."""
    folder = tmp_path_factory.mktemp("rows")
    call = {"model": uneven, "out": folder / "out", "data": text, "bits": 5.0}
    return compress(**{**small, **call, "schemes": SCHEMES, "rows": True, "refine": True})


def mixtures(result: Result) -> dict[str, str]:
    """Weights of the plan in blocks of rows."""
    return {name: s for name, s in result.plan.schemes.items() if "@" in s}


def test_the_solver_takes_mixtures_and_the_file_is_as_large_as_planned(mixed: Result) -> None:
    assert mixtures(mixed)
    assert all(name.endswith("_proj.weight") for name in mixtures(mixed))
    assert 0 <= mixed.plan.bytes - mixed.file_bytes < 4096
    checkpoint = read_layout(mixed.path)
    checkpoint.verify()
    assert {name: str(s) for name, s in checkpoint.schemes.items()} == mixed.plan.schemes


def test_a_mixture_loses_and_takes_what_the_table_says(mixed: Result) -> None:
    """Against the score of the whole mixed weight, as if it had been measured like any other."""
    known = workfiles.load_model(mixed.work)
    table = workfiles.load_table(mixed.work, known.model_map)
    checked = 0
    with reopen_run(mixed.work) as run:
        for group in (g for g in run.model_map.groups if g.kind == "linear"):
            (statistics,) = ordered_statistics(run, group).matrices
            for name in group.members:
                found = {s: e for s, e in table.rows[name].items() if is_mixture(run, name, s)}
                for scheme, entry in list(found.items())[::7]:
                    whole = stored_weight(run, name, scheme)
                    assert isinstance(whole, CompositeWeight)
                    error = dequantize_stored(whole) - ordered_weight(run, name)
                    # Row prices are kept in float32.
                    expected = fisher_score(error, statistics, name)
                    assert entry.loss[TASK] == pytest.approx(expected, rel=1e-4)
                    assert 0 < entry.error[TASK] < 2 * entry.loss[TASK]
                    weight = run.model_map.weight(name)
                    assert entry.bytes == weight_bytes(weight, Scheme.parse(scheme))
                    checked += 1
    assert checked > 10


def test_mixtures_never_cost_predicted_loss_and_save_much_here(mixed: Result) -> None:
    known = workfiles.load_model(mixed.work)
    table = workfiles.load_table(mixed.work, known.model_map)
    rows = {
        weight: {s: e for s, e in row.items() if "@" not in s} for weight, row in table.rows.items()
    }
    ratios = []
    for bits in (4.0, 4.5, 5.0, 5.5):
        budget = Budget(bits=bits)
        limit = budget.in_bytes(known.model_map) or 0
        losses = []
        for offered in (replace(table, rows=rows), table):
            problem = allocation_problem(known.model_map, offered, budget)
            losses.append(problem.loss(solve(problem, limit).picks))
        ratios.append(losses[1] / losses[0])
    assert max(ratios) <= 1 + 1e-9
    assert min(ratios) < 0.9


def test_rows_in_blocks_are_rows_of_what_was_measured(mixed: Result) -> None:
    with reopen_run(mixed.work) as run:
        for name, scheme in mixtures(mixed).items():
            value = bank_weight(run, name, scheme)
            whole = stored_weight(run, name, scheme)
            assert isinstance(whole, CompositeWeight)
            assert whole.block is not None
            for index, part in enumerate(whole.scheme.rows):
                rows = whole.block == index
                assert torch.equal(value[rows], bank_weight(run, name, str(part.format))[rows])


def test_what_ships_is_the_better_of_the_bank_and_the_rounding_behind_it(mixed: Result) -> None:
    assert mixed.refinement is not None
    checkpoint = read_layout(mixed.path)
    with reopen_run(mixed.work, with_data=True) as run:
        inputs = reround_inputs(run, mixed.plan.schemes)
        for name, scheme in mixtures(mixed).items():
            again = run.bank.key(name, scheme, inputs)
            key = again if mixed.refinement.kept else None
            shipped = checkpoint.quantized(name)
            assert torch.equal(bank_weight(run, name, scheme, key), dequantize_stored(shipped))
            first, second = (stored_weight(run, name, scheme, k) for k in (None, again))
            assert isinstance(first, CompositeWeight)
            assert isinstance(second, CompositeWeight)
            assert torch.equal(first.block, second.block), "rows stay in their blocks"


def test_what_ships_runs_on_the_native_engine(mixed: Result) -> None:
    loaded = load(mixed.path, mode="exact")
    assert loaded.engine == "native"
    ids = list(range(5, 21))
    with torch.no_grad():
        expected = loaded.model(torch.tensor([ids])).logits[0]
    found = loaded.make_engine().score(ids)
    # float32 sums in another order
    assert not (found - expected).abs().max() > 1e-5 * expected.abs().max()


def test_the_plan_is_applied_again_without_data_and_computes_the_same(
    mixed: Result, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    mixed.plan.save(plan)
    again = apply_plan(plan, tmp_path / "again", mixed.work)
    loaded = load(again.path, mode="exact")
    with reopen_run(mixed.work) as run, torch.no_grad():
        dense = DensePlan(run)
        dense.load(mixed.plan.schemes)
        ids = torch.arange(16)[None] + 5
        expected, found = dense.model(ids).logits, loaded.model(ids).logits
    # float32 sums in another order.
    assert not float((found - expected).abs().max()) > 1e-3 * float(expected.abs().max())


def test_formats_that_round_inputs_or_widen_columns_are_not_mixed(
    uneven: Path, tmp_path: Path, text: str, small: dict[str, Any]
) -> None:
    plain = {key: small[key] for key in ("seqlen", "windows", "probes", "probe_windows")}
    for schemes, expected in (
        (["w2g32z4s4", "w4g32zs4", "w4g32zs4+r4"], ["w2g32z4s4", "w4g32zs4"]),
        (["w4g32zs4a8", "w6g64zs6a8"], []),
        (["w4g32zs4"], []),
    ):
        recipe = Recipe.create(data=text, schemes=schemes, rows=True, **plain)
        with open_run(uneven, tmp_path / "work", recipe) as run:
            groups = [g for g in run.model_map.groups if g.kind == "linear"]
            assert [row_formats(run, group) for group in groups] == [expected] * len(groups)


def test_what_does_not_go_with_rows_is_said(
    uneven: Path, tmp_path: Path, text: str, mixed: Result, small: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="leave out rows"):
        Recipe.create(data="x", rows=True, latency=("12ms",))
    with pytest.raises(UsageError, match="leave out --rows or --engine"):
        recipe_for(Budget(bits=4, engine="vllm"), data="x", rows=True)
    plain = {key: value for key, value in small.items() if key != "report"}
    with open_run(uneven, tmp_path / "work", Recipe.create(data=text, rows=True, **plain)) as run:
        for method in ("rows", "ridge"):
            with pytest.raises(UsageError, match="mixtures of rows"):
                check_prediction(run, method)
    plan = tmp_path / "plan.json"
    mixed.plan.save(plan)
    recipe = mixed.work / workfiles.RECIPE_FILE
    before = recipe.read_text()
    try:
        recipe.write_text(before.replace("learning: 0", "learning: 5"))
        with pytest.raises(UsageError, match="blocks of rows: set learning to 0"):
            apply_plan(plan, tmp_path / "again", mixed.work, refine=True)
    finally:
        recipe.write_text(before)
