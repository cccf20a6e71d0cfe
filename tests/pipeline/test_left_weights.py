"""Weights that a plan leaves as they are, and plans in which no task is worse than in another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quantlib
from quantlib.checkpoint.contents import contents
from quantlib.checkpoint.reader import read_layout
from quantlib.errors import UsageError
from quantlib.models.source import Source
from quantlib.pipeline.compress import Result, compress
from quantlib.pipeline.dense import DensePlan
from quantlib.pipeline.opening import reopen_run
from quantlib.pipeline.plan import Budget, allocation_problem, no_worse, search
from quantlib.pipeline.probe import probe_plans
from quantlib.pipeline.task_trials import TaskTrials
from quantlib.pipeline.workfiles import load_model, load_table
from quantlib.report.collect import collect
from quantlib.search.left import LEFT, keeping_left
from quantlib.search.sensitivity import Sensitivity

from . import whole_models

LEAVING: dict[str, Any] = {
    "windows": 4,
    "probe_windows": 2,
    "probes": 3,
    "passes": 0,
    "schemes": ["w2g32z4s4", "w4g32zs4", "f32", "bf16"],
    "expert_tokens": 4,
}
"""The tiny models are stored in 32 bits, so to stay in 16 is none of their candidates."""


@pytest.fixture(scope="module")
def janus(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A tiny Janus whose image decoder has to stay as it is, with a report."""
    root = tmp_path_factory.mktemp("janus")
    model, data = whole_models.save("janus", root / "model"), whole_models.records("janus", root)
    pins = ("image_decoder=f32",)
    return compress(model, out=root / "out", data=data, size="60%", pins=pins, **LEAVING)


def _table(result: Result) -> Sensitivity:
    return load_table(result.work, load_model(result.work).model_map)


def test_only_the_type_that_a_weight_is_stored_in_leaves_it_as_it_is(janus: Result) -> None:
    model_map = load_model(janus.work).model_map
    for name, row in _table(janus).rows.items():
        assert "bf16" not in row
        left = row["f32"]
        assert set(left.loss.values()) == set(left.error.values()) == {0.0}
        assert model_map.weight(name).nbytes < left.bytes < model_map.weight(name).nbytes + 300


def test_what_is_left_is_named_with_its_reason_and_its_bytes_are_in_the_plan(
    janus: Result,
) -> None:
    left = {name for name, scheme in janus.plan.schemes.items() if scheme == "f32"}
    table = contents(read_layout(janus.path))
    reasons = {row.name: row.reason for row in table.model_map.kept}
    assert left <= reasons.keys()
    source = load_model(janus.work).model_map
    for name in left:
        pinned = source.weight(name).component == "image_decoder"
        assert reasons[name] == ("asked for by --pin image_decoder=f32" if pinned else LEFT)
    decoder = next(row for row in table.components if row.name == "image_decoder")
    assert decoder.quantized == 0
    assert janus.file_bytes <= janus.plan.bytes
    assert janus.plan.bytes - janus.file_bytes < 64 * len(janus.plan.schemes) * 4


def test_the_page_has_every_tensor_that_is_left_with_the_reason_that_the_checkpoint_has(
    janus: Result,
) -> None:
    assert janus.report is not None
    model = load_model(janus.work)
    data = collect(model.model_map, janus.plan, title="janus")
    shown = {(row.component, row.name, row.reason, row.count) for row in data.kept}
    table = contents(read_layout(janus.path))
    assert shown == {
        (part.name, row.name, row.reason, row.count)
        for part in table.components
        for row in part.kept
    }
    page = janus.report.read_text(encoding="utf-8")
    assert "asked for by --pin image_decoder=f32" in page
    assert all(reason in page for _, _, reason, _ in shown)


def test_the_checkpoint_has_the_sources_own_numbers_there(janus: Result) -> None:
    """And says on every path what the plan says in the dense model."""
    source, packed = Source.open(janus.source), quantlib.load(janus.path, engine="plain").model
    there = dict(packed.named_parameters())
    left = [name for name, scheme in janus.plan.schemes.items() if scheme == "f32"]
    assert left
    for name in left:
        assert torch.equal(there[name].detach().float(), source.read(name).float()), name
    with reopen_run(janus.work, with_data=True) as run, torch.no_grad():
        plan = DensePlan(run)
        plan.load(janus.plan.schemes)
        codes = torch.arange(16)[None] % 8
        assert torch.equal(
            plan.model.model.vqmodel.decode(codes), packed.model.vqmodel.decode(codes)
        )
        assert TaskTrials(run).measure(janus.plan.schemes)["decoder"].value == 0


def test_probes_round_everything(janus: Result) -> None:
    model_map, table = load_model(janus.work).model_map, _table(janus)
    problem = allocation_problem(model_map, table, Budget())
    assert set(problem.schemes(problem.best()).values()) == {"f32"}
    for plan in probe_plans(problem, 3):
        assert "f32" not in plan.values()
    assert table.calibrations


def test_no_task_is_predicted_to_lose_more_than_in_the_plan_it_is_guarded_by(
    janus: Result,
) -> None:
    """With the decoder as it is, and the words rounded: a plan of the same bytes that may round
    everything loses nothing in pictures, and no more in any other task."""
    model_map, table = load_model(janus.work).model_map, _table(janus)
    guard = {
        weight.name: "w2g32z4s4" if weight.component == "language_model" else "f32"
        for weight in model_map.weights
    }
    problem = allocation_problem(model_map, table, Budget())
    size = problem.bytes(problem.picks(guard))
    limits = no_worse(problem, guard)
    assert limits["decoder"] == limits["codes"] == 0 < limits["text"]
    budget = Budget(size=str(size), task_limits=limits)
    plan, _, solution = search(model_map, table, budget)
    losses = problem.task_losses(solution.picks)
    assert plan.bytes <= size
    assert all(losses[task] <= limit * (1 + 1e-9) for task, limit in limits.items())
    assert losses["text"] < limits["text"]
    free, _, _ = search(model_map, table, Budget(size=str(size)))
    assert free.loss <= plan.loss
    assert budget.asked_for(plan, model_map)
    assert not replace(budget, task_limits={}).asked_for(plan, model_map)


def test_a_limit_on_a_loss_that_is_not_measured_is_refused(janus: Result) -> None:
    model_map, table = load_model(janus.work).model_map, _table(janus)
    with pytest.raises(UsageError, match=r"task 'sound', and what is measured are the los"):
        search(model_map, table, Budget(size="1MB", task_limits={"sound": 1.0}))


def test_a_language_model_names_what_is_to_stay_with_keep(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 400)
    with pytest.raises(UsageError, match=r"f32 among the candidates .* with --keep"):
        compress(llama, out=tmp_path / "out", data=text, size="60%", schemes=["w4g32zs4", "f32"])


@pytest.mark.parametrize("rule", ["--pin image_decoder=f32", "--floor image_decoder=16"])
def test_a_rule_that_leaves_nothing_else_is_the_reason(janus: Result, rule: str) -> None:
    model_map = load_model(janus.work).model_map
    others = ("--ceiling image_decoder=32", "--floor image_decoder=8")
    kept = keeping_left(model_map, replace(janus.plan, rules=(*others, rule))).kept
    reasons = {row.name: row.reason for row in kept}
    decoder = [row.name for row in model_map.weights if row.component == "image_decoder"]
    assert decoder
    assert {reasons[name] for name in decoder} == {f"asked for by {rule}"}
    free = keeping_left(model_map, replace(janus.plan, rules=others)).kept
    assert {row.reason for row in free if row.name in decoder} == {LEFT}
