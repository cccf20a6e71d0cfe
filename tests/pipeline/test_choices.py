"""One knapsack over formats, factors, blocks of rows and shared exponents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.checkpoint.reader import read_layout
from quantlib.errors import UsageError
from quantlib.formats import Scheme, dequantize_stored
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.pipeline import workfiles
from quantlib.pipeline.compress import Result, apply_plan, compress
from quantlib.pipeline.dense import bank_weight
from quantlib.pipeline.opening import reopen_run
from quantlib.pipeline.plan import Budget, allocation_problem
from quantlib.pipeline.run import candidates
from quantlib.recipe import Recipe
from quantlib.runtime.load import load
from quantlib.search.constraints import Rule
from quantlib.search.solve import solve

Squeeze = Callable[..., Result]
PLAIN = ["w2g32z4s4", "w4g32zs4", "w6g64zs6"]
FACTORS, ROWS, EXPONENTS = "w2g32z4s4+r4", "w6g64zs6@1/8+w4g32zs4@3/8+w2g32z4s4d40", "w4g32ze"
ALONE = "r4w8"
CHOICES = [*PLAIN, FACTORS, ROWS, EXPONENTS, ALONE]


def test_every_kind_of_weight_gets_the_candidates_that_fit_it() -> None:
    recipe = Recipe.create(data="x", schemes=CHOICES)
    assert recipe.candidates("linear") == (*PLAIN, FACTORS, EXPONENTS)
    assert recipe.candidates("conv") == (*PLAIN, FACTORS, EXPONENTS, ALONE)
    assert recipe.candidates("experts") == (*PLAIN, EXPONENTS)
    assert recipe.candidates("head") == (*PLAIN, EXPONENTS)
    assert recipe.candidates("embedding") == (*PLAIN, ROWS, EXPONENTS)
    only = Recipe.create(data="x", schemes=[FACTORS])
    assert only.candidates("linear") == (FACTORS,)
    assert only.candidates("embedding") == ("w2g32z4s4",)


def test_a_group_has_the_candidates_that_all_its_members_have_room_for(llama: Path) -> None:
    model_map = ModelMap.from_source(Source.open(llama))
    narrow = min(w.out_features for w in model_map.weights if w.kind == "linear")
    wide = f"w4+r{narrow}"
    found = candidates(model_map, Recipe.create(data="x", schemes=["w4", wide]))
    for group in model_map.groups:
        least = min(min(w.out_features, w.in_features) for w in model_map.members(group))
        fits = group.kind == "linear" and least > narrow
        for name in group.members:
            assert found[name] == (("w4", wide) if fits else ("w4",))
    with pytest.raises(UsageError, match="too small"):
        candidates(model_map, Recipe.create(data="x", schemes=[wide]))


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, text: str, small: dict[str, Any]
) -> Result:
    """A tiny Llama compressed with all candidates, the composite ones pinned in places."""
    folder = tmp_path_factory.mktemp("choices")
    pins = (f"embedding={ROWS}", f"*.0.self_attn.q_proj={FACTORS}", f"*.1.mlp.*={EXPONENTS}")
    changes: dict[str, Any] = {"schemes": CHOICES, "refine": False, "pins": pins, "size": "30%"}
    return compress(**{"model": llama, "out": folder / "out", "data": text, **small, **changes})


def test_the_file_is_as_large_as_planned(measured: Result) -> None:
    schemes = measured.plan.schemes
    assert {ROWS, FACTORS, EXPONENTS} <= set(schemes.values())
    assert 0 <= measured.plan.bytes - measured.file_bytes < 4096
    checkpoint = read_layout(measured.path)
    checkpoint.verify()
    assert {name: str(s) for name, s in checkpoint.schemes.items()} == schemes


def test_what_was_measured_is_what_ships(measured: Result) -> None:
    checkpoint = read_layout(measured.path)
    with reopen_run(measured.work) as run:
        for name, scheme in measured.plan.schemes.items():
            shipped = dequantize_stored(checkpoint.quantized(name))
            assert torch.equal(bank_weight(run, name, scheme), shipped), name


def test_the_loaded_model_computes_with_it(measured: Result) -> None:
    loaded = load(measured.path, mode="exact")
    assert loaded.engine == "plain"
    with reopen_run(measured.work) as run, torch.no_grad():
        from quantlib.pipeline.dense import DensePlan

        dense = DensePlan(run)
        dense.load(measured.plan.schemes)
        ids = torch.arange(16)[None] + 5
        expected, found = dense.model(ids).logits, loaded.model(ids).logits
    # float32 sums in another order.
    assert not float((found - expected).abs().max()) > 1e-3 * float(expected.abs().max())


def test_more_choices_never_cost_predicted_loss(measured: Result) -> None:
    known = workfiles.load_model(measured.work)
    table = workfiles.load_table(measured.work, known.model_map)
    from dataclasses import replace

    plain = replace(
        table,
        rows={w: {s: e for s, e in row.items() if s in PLAIN} for w, row in table.rows.items()},
    )
    strictly = 0
    for share in ("18%", "20%", "24%", "30%"):
        budget = Budget(size=share)
        limit = budget.in_bytes(known.model_map) or 0
        losses = []
        for offered in (plain, table):
            problem = allocation_problem(known.model_map, offered, budget)
            losses.append(problem.loss(solve(problem, limit).picks))
        assert losses[1] <= losses[0] * (1 + 1e-9)
        strictly += losses[1] < losses[0] * (1 - 1e-3)
    assert strictly > 0


def test_factors_are_not_rounded_again(measured: Result, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out"):
        Recipe.create(data="x", schemes=[FACTORS], refine=True)
    plan = tmp_path / "plan.json"
    measured.plan.save(plan)
    with pytest.raises(UsageError, match="leave out --refine"):
        apply_plan(plan, tmp_path / "again", measured.work, refine=True)


def test_latency_budgets_refuse_what_the_native_engine_does_not_run(squeeze: Squeeze) -> None:
    with pytest.raises(UsageError, match="several matrices"):
        squeeze(schemes=[*PLAIN, FACTORS], refine=False, latency=("decode=5ms",))


def test_floors_and_ceilings_mean_every_row() -> None:
    assert not Rule.parse("floor", "embedding=4").allows(str(Scheme.parse(ROWS)))
    assert Rule.parse("floor", "embedding=2").allows(str(Scheme.parse(ROWS)))
    assert not Rule.parse("ceiling", "embedding=5").allows(str(Scheme.parse(ROWS)))
    assert Rule.parse("ceiling", "embedding=6").allows(str(Scheme.parse(ROWS)))
