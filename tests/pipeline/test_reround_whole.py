"""Re-rounding of models that are run as a whole: units are replayed as the model runs them, their
moments are of what they really read and lack, and what ships loses less and goes on when killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.calibration.paths.route import objective
from quantlib.errors import UsageError
from quantlib.evaluation.estimate import Estimate
from quantlib.models.rows import LinearGroup
from quantlib.pipeline.apply import TaskRefinement
from quantlib.pipeline.compress import Result, apply_plan, compress
from quantlib.pipeline.dense import DensePlan, bank_weight
from quantlib.pipeline.estimate import _operations, for_recipe
from quantlib.pipeline.inputs import round_cache
from quantlib.pipeline.opening import reopen_run
from quantlib.pipeline.parts import whole_model
from quantlib.pipeline.replay import (
    Call,
    Discovery,
    Unit,
    discover,
    merged,
    recorded,
    records_of,
    rows_of,
    samples_of,
    units_of,
)
from quantlib.pipeline.replayed_unit import CallMetric, Pair, ReplayedUnit
from quantlib.pipeline.reporting import report_of
from quantlib.pipeline.reround_whole import reround_whole
from quantlib.pipeline.run import Run, Silent
from quantlib.pipeline.task_trials import CLOSE_NUMBERS, REFERENCE_NUMBERS, TaskTrials
from quantlib.search.tasks import Objective

from . import whole_models

TOLERANCE = 1e-3
"""Relative to the largest number (`test_whole_models`)."""
EXACT = 1e-5
"""The same sums in float32, in another order."""
SMALL: dict[str, Any] = {
    "windows": 5,
    "probe_windows": 2,
    "probes": 0,
    "passes": 0,
    "size": "60%",
    "schemes": ["w2g32z4s4", "w3g32z4s4"],
    "report": False,
    "refine": True,
}
CASES = ("whisper", "llava_dinov2")


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Case -> model and data of a request."""
    found = {}
    for case in CASES:
        root = tmp_path_factory.mktemp(case)
        data = whole_models.records(case, root, 7)
        found[case] = {"model": whole_models.save(case, root / "model"), "data": data}
    return found


@pytest.fixture(scope="module")
def refined(
    requests: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Result]:
    """refined("whisper"): the tiny model compressed and re-rounded, once."""
    made: dict[str, Result] = {}

    def build(case: str) -> Result:
        if case not in made:
            out = tmp_path_factory.mktemp("refined") / case
            made[case] = compress(**requests[case], out=out, **SMALL)
        return made[case]

    return build


@contextmanager
def models(result: Result) -> Iterator[tuple[Run, nn.Module, DensePlan]]:
    """A finished run, its full-precision model, and one with the bank's weights of its plan."""
    with reopen_run(result.work, with_data=True) as run:
        plan = DensePlan(run)
        plan.load(result.plan.schemes)
        yield run, whole_model(run), plan


def seen(run: Run, exact: nn.Module) -> Discovery:
    return discover(run.streams, exact, units_of(run.model_map), lambda _: None)


def replayed(run: Run, exact: nn.Module, plan: DensePlan, name: str) -> ReplayedUnit:
    """A unit, observed, of which everything is fitted but the last call."""
    unit = next(one for one in units_of(run.model_map) if one.name == name)
    calls = seen(run, exact).calls[name]
    mine, theirs = recorded(run.streams, exact, (exact, plan.model), name, calls)
    pairs = [Pair(a, b) for a, b in zip(mine, theirs, strict=True)]
    last = len(pairs) - 1
    found = ReplayedUnit(unit, exact, plan.model, pairs, list(range(last)), [last])
    found.observe()
    return found


@torch.no_grad()
def entering(run: Run, exact: nn.Module, model: nn.Module, module: str) -> list[Tensor]:
    """What a linear of a model reads in every calibration record, [T, K]: by a pass of the whole
    model, samples made by the exact one."""
    found: list[Tensor] = []
    for runs, sample in samples_of(run.streams, exact):
        handle = model.get_submodule(module).register_forward_hook(
            lambda _, inputs, __: found.append(inputs[0].flatten(0, -2).clone())
        )
        runs(model, **sample.inputs)
        handle.remove()
    return found


def test_names_are_merged_before_what_they_lead_to() -> None:
    answer, image = ["eye", "bridge", "a", "b"], ["pen", "a", "b", "brush"]
    assert merged([answer, image]) == ("eye", "bridge", "pen", "a", "b", "brush")
    assert merged([image, answer]) == ("pen", "eye", "bridge", "a", "b", "brush")
    assert merged([[], ["a"], ["a", "b"]]) == ("a", "b")


def test_units_are_found_in_the_order_in_which_records_run_them(
    refined: Callable[[str], Result],
) -> None:
    with models(refined("whisper")) as (run, exact, _):
        found = seen(run, exact)
        sides = [name.split(".")[1] for name in found.order]
        assert sides == ["encoder"] * sides.count("encoder") + ["decoder"] * sides.count("decoder")
        assert set(found.order) == {unit.name for unit in units_of(run.model_map)}
    with models(refined("llava_dinov2")) as (run, exact, _):
        found = seen(run, exact)
        parts = list(dict.fromkeys(name.split(".")[1] for name in found.order))
        assert parts == ["vision_tower", "multi_modal_projector", "language_model"]
        texts, answers = (records_of(run.streams)[task] for task in ("text", "answer"))
        eye = found.calls[found.order[0]]
        assert [eye[record] for record in texts] == [0] * len(texts)
        assert [eye[record] for record in answers] == [1] * len(answers)


@pytest.mark.parametrize("case", CASES)
def test_a_unit_run_alone_gives_what_the_model_computed(
    case: str, refined: Callable[[str], Result]
) -> None:
    with models(refined(case)) as (run, exact, _):
        found = seen(run, exact)
        for name in found.order:
            (calls,) = recorded(run.streams, exact, (exact,), name, found.calls[name])
            assert found.faithful(name, exact.get_submodule(name), calls)


class _Remembers(nn.Module):
    """Adds what it was given before, as a block with a cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.total = self.total + x
        return self.total


def test_a_unit_that_remembers_its_calls_is_noticed() -> None:
    call = Call(0, (torch.ones(1, 2),), {})
    found = Discovery(("unit",), {"unit": [1]}, {"unit": (0, torch.ones(1, 2))})
    assert not found.faithful("unit", _Remembers(), [call])
    assert found.faithful("unit", nn.Identity(), [call])
    assert not found.faithful("unit", nn.Identity(), [call, Call(0, (None,), {})])


def test_moments_are_of_what_a_group_really_reads_and_lacks(
    refined: Callable[[str], Result],
) -> None:
    """Whisper's second decoder block: a linear that writes to the stream lacks what the stream
    lacks, one that does not, what its own outputs lack."""
    with models(refined("whisper")) as (run, exact, plan):
        name = "model.decoder.layers.1"
        unit = replayed(run, exact, plan, name)
        assert [one.rpartition(".")[2] for one in unit.writers] == ["out_proj", "out_proj", "fc2"]
        groups = {group.name: group for group in unit.groups}
        weights = {m: bank_weight(run, m, run_scheme(refined, m)) for m in unit.unit.members}
        for leaf in ("encoder_attn.kv", "fc1", "fc2"):
            group = groups[f"{name}.{leaf}"]
            fit, held = unit.moments(group, group.members, weights, ones(unit, group))
            module = group.members[0].rpartition(".")[0]
            unit.put(weights | {m: unit.originals[m] for m in group.members})
            mine = entering(run, exact, exact, module)
            theirs = entering(run, exact, plan.model, module)
            expected = torch.cat(theirs[:-1])
            assert close(fit.hessian, expected.T @ expected)
            assert close(held.hessian, theirs[-1].T @ theirs[-1])
            matrix = torch.cat([unit.originals[m] for m in group.members])
            lacks = (torch.cat(mine[:-1]) - expected) @ matrix.T
            if leaf == "fc2":  # it is the last that writes: the block's output is the stream
                runs = [(pair.exact, pair.rounded) for pair in unit.pairs[:-1]]
                modules = exact.get_submodule(name), plan.model.get_submodule(name)
                lacks = torch.cat([a.run(modules[0]) - b.run(modules[1]) for a, b in runs])
            assert close(fit.missing, lacks.T @ expected)
            assert float(lacks.norm()) > 0, "nothing before the group was rounded"


def run_scheme(refined: Callable[[str], Result], name: str) -> str:
    return refined("whisper").plan.schemes[name]


def ones(unit: ReplayedUnit, group: LinearGroup) -> list[Tensor]:
    return [torch.ones(count) for count in unit.tokens[group.name]]


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= EXACT * float(expected.abs().max())


def test_a_unit_is_judged_by_what_its_output_lacks(refined: Callable[[str], Result]) -> None:
    """On the calls that judge, relative to losing everything; full-precision weights leave what the
    parts before it lack."""
    with models(refined("whisper")) as (run, exact, plan):
        first = replayed(run, exact, plan, "model.encoder.layers.1")
        metric = CallMetric(
            [torch.ones(len(output)) for output in first.outputs],
            [torch.ones(output.shape[1]) for output in first.outputs],
        )
        loss = first.judge(first.originals, metric)
        module, last = exact.get_submodule("model.encoder.layers.1"), first.pairs[-1]
        goal = last.exact.run(module)
        error = (last.rounded.run(module) - goal).square().sum() / goal.square().sum()
        assert loss == pytest.approx(float(error), rel=1e-4)
        assert loss > 0


@torch.no_grad()
def fitted_losses(
    run: Run, exact: nn.Module, schemes: Mapping[str, str], *keys: Mapping[str, str]
) -> list[float]:
    """What plans lose on the records they were calibrated on, as the objective combines tasks: with
    each of several choices of bank entries."""
    rows = list(samples_of(run.streams, exact))
    tasks = [task for task, records in records_of(run.streams).items() for _ in records]
    said = [objective(s).said(r(exact, **s.inputs)) for r, s in rows]
    plan, found = DensePlan(run), []
    for chosen in keys:
        plan.load(schemes, chosen)
        losses: dict[str, list[float]] = {}
        for task, reference, (r, s) in zip(tasks, said, rows, strict=True):
            lost = objective(s).divergence(reference, objective(s).said(r(plan.model, **s.inputs)))
            losses.setdefault(task, []).append(float(lost.value) / lost.terms)
        found.append(sum(sum(own) / len(own) for own in losses.values()))
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_ships_loses_less_and_says_what_was_measured(
    case: str, refined: Callable[[str], Result], tmp_path: Path
) -> None:
    result = refined(case)
    assert result.refinement is not None
    assert result.refinement.kept
    with models(result) as (run, exact, plan):
        keys = reround_whole(run, result.plan.schemes)
        assert set(keys) == {name for unit in units_of(run.model_map) for name in unit.members}
        bank, better = fitted_losses(run, exact, result.plan.schemes, {}, keys)
        assert better < bank
        plan.load(result.plan.schemes, keys)
        packed = quantlib.load(result.path, engine="plain").model
        with torch.no_grad():
            for runs, sample in samples_of(run.streams, exact):
                expected, found = (
                    objective(sample).said(runs(model, **sample.inputs))
                    for model in (plan.model, packed)
                )
                error = (found - expected).abs().max() / expected.abs().max()
                assert float(error) <= TOLERANCE
    page = report_of(result.work).read_text()
    assert all(f"loss of {task}" in page for task in result.refinement.shipped)
    assert "before re-rounding" in page
    plain = apply_plan(result.work / "plan.json", tmp_path / "plain", result.work)
    tensors = "model.safetensors"
    assert (plain.path / tensors).read_bytes() != (result.path / tensors).read_bytes()


def test_inputs_keys_and_values_are_rounded_while_units_are_replayed(
    requests: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """In another basis, with packed caches: the last block, replayed behind all that was rounded
    again, gives what the model that ships gives there."""
    schemes = ("w3g32z4s4a4zh8/8", "w4g32zs4a4zh8/8", "w6g32zs6")
    asked = {"schemes": schemes, "rotation": "gradients", "kv": "int4", "size": "115kB"}
    result = compress(**requests["whisper"], out=tmp_path / "out", **(SMALL | asked))
    with models(result) as (run, exact, plan):
        keys = reround_whole(run, result.plan.schemes)
        plan.load(result.plan.schemes, keys)
        rounding = sum(run.bank.entry(key).extra["after"] for key in keys.values())
        assert rounding < sum(run.bank.entry(key).extra["before"] for key in keys.values())
        state_free = replayed(run, exact, plan, "model.decoder.layers.1").pairs[-1].rounded
        round_cache(plan.model, run)
        unit = replayed(run, exact, plan, "model.decoder.layers.1")
        call = unit.pairs[-1].rounded
        assert not torch.equal(call.entering, state_free.entering), "the cache is not rounded"
        block = plan.model.get_submodule(unit.unit.name)
        left: list[Tensor] = []
        handle = block.register_forward_hook(lambda _, __, output: left.append(rows_of(output)))
        for runs, sample in samples_of(run.streams, exact):
            runs(plan.model, **sample.inputs)
        handle.remove()
        assert close(call.run(block), left[-1])


class _Interrupted(Exception):
    """Somebody pressed a key."""


class _Impatient(Silent):
    """Progress that breaks off re-rounding behind its second unit; later it tells which units had
    to be rounded."""

    def __init__(self, units: int) -> None:
        self.left, self.stage = units, ""
        self.rounded: list[str] = []

    def start(self, stage: str, total: int) -> None:
        self.stage = stage

    def tick(self, message: str = "") -> None:
        if self.stage == "re-round" and "->" in message:
            self.rounded.append(message.partition(":")[0])
            if len(self.rounded) == self.left:
                raise _Interrupted


def test_an_interrupted_run_rounds_only_what_it_has_not(
    contents: Callable[[Path], dict[str, bytes]],
    requests: dict[str, dict[str, Any]],
    refined: Callable[[str], Result],
    tmp_path: Path,
) -> None:
    call = {**requests["whisper"], **SMALL, "out": tmp_path / "out"}
    first, second = _Impatient(2), _Impatient(-1)
    with pytest.raises(_Interrupted):
        compress(**call, progress=first)
    result = compress(**call, progress=second)
    with reopen_run(result.work) as run:
        units = {unit.name for unit in units_of(run.model_map)}
    assert len(first.rounded) == 2
    assert len(second.rounded) == len(units) - 2
    assert {*first.rounded, *second.rounded} == units
    assert contents(result.path) == contents(refined("whisper").path)


@pytest.mark.slow
def test_killed_runs_go_on_behind_the_last_unit(
    worker: Callable[..., dict[str, Any]],
    contents: Callable[[Path], dict[str, bytes]],
    requests: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    call = {**requests["whisper"], **SMALL}
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    assert worker({**call, "out": undisturbed})["error"] == ""
    for step in (("re-round", 8), ("compare", 1)):
        assert worker({**call, "out": out}, stage=step)["killed"], f"it was over before {step}"
    answer = worker({**call, "out": out})
    assert (answer["killed"], answer["error"]) == (False, "")
    assert contents(out) == contents(undisturbed)


def test_units_are_blocks_and_linears_outside_of_them(refined: Callable[[str], Result]) -> None:
    """And nothing else: convolutions, embeddings and heads keep what the bank has."""
    with models(refined("llava_dinov2")) as (run, _, __):
        units: list[Unit] = units_of(run.model_map)
        kinds = {run.model_map.weight(name).kind for unit in units for name in unit.members}
        alone = [unit for unit in units if unit.groups[0].block is None]
        assert kinds == {"linear"}
        assert {unit.name for unit in alone} == {
            "model.multi_modal_projector.linear_1",
            "model.multi_modal_projector.linear_2",
        }
        assert all(len(unit.members) == 1 for unit in alone)


def test_the_better_of_the_two_ships_by_what_the_objective_says() -> None:
    """Answers are twice as bad as before, pictures ten times as good: better in the sum of relative
    increases, unless answers count more."""
    bank = {"answer": Estimate(0.1, 0.01, 8), "image": Estimate(0.02, 0.001, 8)}
    refined = {"answer": Estimate(0.2, 0.01, 8), "image": Estimate(0.002, 0.001, 8)}
    baseline = {"answer": 1.0, "image": 0.1}
    summed = TaskRefinement.of(bank, refined, Objective(), baseline)
    assert (summed.bank_value, summed.refined_value) == pytest.approx((0.3, 0.22))
    assert summed.kept
    assert summed.shipped == refined
    heavy = TaskRefinement.of(bank, refined, Objective({"answer": 3.0}), baseline)
    assert (heavy.bank_value, heavy.refined_value) == pytest.approx((0.5, 0.62))
    assert heavy.shipped == bank
    assert "before" not in heavy.to_json()
    largest = TaskRefinement.of(bank, bank | refined, Objective(balance="minmax"), baseline)
    assert (largest.bank_value, largest.refined_value) == pytest.approx((0.2, 0.2))
    one = TaskRefinement.of(
        {"answer": bank["answer"]}, {"answer": refined["answer"]}, Objective(), {}
    )
    assert (one.bank_value, one.refined_value) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"learning": 3}, "learned rounding"),
        ({"nonlinear": "sqnr=20"}, "operators in integers"),
        ({"kv_modalities": {"text": "int8"}}, "a KV cache by modality"),
    ],
)
def test_what_is_not_combined_is_refused_before_work_starts(
    fields: dict[str, Any], what: str, requests: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"knows nothing of {what} .* leave out one of the two"):
        compress(**requests["whisper"], out=tmp_path / "out", **(SMALL | fields))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", CASES)
def test_what_leaves_a_block_enters_the_next(case: str, refined: Callable[[str], Result]) -> None:
    """Blocks of a stack follow each other without a pass of the model, and are called as in one."""
    with models(refined(case)) as (run, exact, plan):
        found = seen(run, exact)
        stacks = [stack.blocks for stack in run.model_map.stacks] + [run.model_map.blocks]
        follows = {name: before for blocks in stacks for before, name in pairwise(blocks)}
        if case == "whisper":
            assert found.before == follows
        assert follows.items() <= found.before.items()
        before, name = run.model_map.blocks[:2]
        unit = replayed(run, exact, plan, before)
        carried = unit.carry({})
        for mine, theirs in zip(carried, replayed(run, exact, plan, name).pairs, strict=True):
            assert mine.record == theirs.record
            assert torch.equal(mine.exact.entering, theirs.exact.entering)
            assert torch.equal(mine.rounded.entering, theirs.rounded.entering)
            assert not torch.equal(mine.exact.entering, mine.rounded.entering)


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_has_room_for_what_is_rounded_again(
    case: str, refined: Callable[[str], Result]
) -> None:
    result = refined(case)
    with reopen_run(result.work, with_data=True) as run:
        keys = reround_whole(run, result.plan.schemes)
        files = (run.work.unit(key).files.values() for key in keys.values())
        written = sum(file.nbytes for one in files for file in one)
        plain, again = (
            for_recipe(run.model_map, run.recipe.model_copy(update={"refine": refine}), timed=False)
            for refine in (False, True)
        )
        assert 0 < written <= again.bank_bytes - plain.bank_bytes < 3 * written
        assert again.memory_bytes >= plain.memory_bytes
        assert again.hidden_bytes == 0
        assert _operations(run.model_map, run.recipe) > _operations(
            run.model_map, run.recipe.model_copy(update={"refine": False})
        )


def test_plans_are_compared_on_as_many_numbers_as_are_asked_for(
    refined: Callable[[str], Result],
) -> None:
    """One word of every sample says another loss than all of them, and neither is taken for the
    other later."""
    with models(refined("whisper")) as (run, _, __):
        schemes, words = refined("whisper").plan.schemes, 96
        for _ in range(2):
            one, usual, close = (
                TaskTrials(run, numbers).measure(schemes)["answer"].value
                for numbers in (words, REFERENCE_NUMBERS, CLOSE_NUMBERS)
            )
            assert usual == pytest.approx(close, rel=1e-9)
            assert one != pytest.approx(close, rel=1e-3)
