"""FLIQS: the policy learns what pays, a run resumes without a trace, mistakes are sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlib.errors import SearchError
from quantlib.search.fliqs import Fixed, Fliqs, Policy, Settings, entropy_weight, reward
from quantlib.search.trained import loop as loops
from quantlib.search.trained.costs import bops
from quantlib.search.trained.layers import Layers
from quantlib.search.trained.loop import Loop, Outcome, Training, judge_of
from quantlib.search.trained.outcome import rounded, schemes_of

from .trained_models import PRODUCTS, accuracy, net, quarters, space

TRAINING = Training(steps=40, rate=3e-3, warmup=4)
SEARCH = Settings(target=24.0 * sum(PRODUCTS.values()), delay=8, settle=10)


def searched(file: Path, training: Training = TRAINING, **changed: Any) -> tuple[Loop, Fliqs]:
    model = net()
    layers = Layers(model, space("w4a4", "w6a6", "w8a8"))
    settings = replace(SEARCH, **changed)
    judge = judge_of(model, quarters(), training) if settings.draws else None
    method = Fliqs(
        layers, bops(layers.space, PRODUCTS), settings, training.steps, training.seed, judge
    )
    return Loop(model, quarters(), method, training, file, {"model": "net"}), method


def test_the_reward_is_absolute_unless_it_is_one_sided() -> None:
    assert reward(0.5, 24.0, Settings(24.0, 0)) == 0.5
    assert reward(0.5, 12.0, Settings(24.0, 0)) == reward(0.5, 36.0, Settings(24.0, 0)) == 0.0
    assert reward(0.5, 36.0, Settings(24.0, 0, beta=0.5)) == 0.25
    assert reward(0.5, 12.0, Settings(24.0, 0, one_sided=True)) == 0.5


def test_the_entropys_weight_rises_along_a_cosine() -> None:
    weights = [entropy_weight(share, 0.1) for share in (-1, 0, 0.5, 1, 2)]
    assert weights == pytest.approx([0, 0, 0.05, 0.1, 0.1])


def test_the_policy_begins_undecided_and_draws_everything() -> None:
    policy = Policy((3, 2, 1), Settings(1.0, 0))
    assert policy.entropy == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    drawn = policy.draw(generator, uniform=True, count=200)
    assert set(drawn) == {(a, b, 0) for a in range(3) for b in range(2)}


def test_the_policy_finds_what_pays() -> None:
    """Option 2 of the first decision, 0 of the second; the reward is noisy."""
    policy = Policy((4, 3), Settings(1.0, 0, momentum=0.9))
    generator = torch.Generator().manual_seed(3)
    for step in range(500):
        (choice,) = policy.draw(generator, uniform=False)
        noise = 0.2 * float(torch.randn((), generator=generator))
        value = (choice[0] == 2) + 0.5 * (choice[1] == 0) + noise
        policy.learn(choice, value, entropy_weight(step / 500, 0.1))
    first, second = (row.tolist() for row in policy.probabilities())
    assert first[2] > 0.9
    assert second[0] > 0.9
    assert policy.entropy < 0.3


def test_choices_that_are_judged_together_need_no_average() -> None:
    """What a batch adds to all rewards alike is larger than what choices differ by, and drops out:
    four draws a step find what pays."""
    policy = Policy((4, 3), Settings(1.0, 0, draws=4))
    generator = torch.Generator().manual_seed(3)
    for _ in range(150):
        drawn = policy.draw(generator, uniform=False, count=4)
        batch = 10 * float(torch.randn((), generator=generator))
        policy.learn_together(drawn, [batch + (a == 2) + 0.5 * (b == 0) for a, b in drawn], 0.0)
    first, second = (row.tolist() for row in policy.probabilities())
    assert first[2] > 0.9
    assert second[0] > 0.9


def test_a_judge_goes_by_the_batch_and_leaves_no_trace() -> None:
    model = net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    judge = judge_of(model, quarters(), TRAINING)
    first = judge(3)
    assert judge(3) == first, "all choices of a step see the same pictures"
    assert judge(4) != first
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_entropy_alone_decides_an_indifferent_policy() -> None:
    undecided, decided = (Policy((3, 3), Settings(1.0, 0)) for _ in range(2))
    for policy, weight in ((undecided, 0.0), (decided, 0.1)):
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            noise = 0.01 * float(torch.randn((), generator=generator))
            policy.learn(*policy.draw(generator, uniform=False), noise, weight)
    assert decided.entropy < 0.2 < undecided.entropy


def test_a_search_ends_within_its_target_and_learns_the_task(tmp_path: Path) -> None:
    run, method = searched(tmp_path / "state", replace(TRAINING, steps=120))
    run.run()
    choice = method.final()
    costs = bops(space("w4a4", "w6a6", "w8a8"), PRODUCTS)
    assert costs.of(choice) <= SEARCH.target
    assert method.choice == choice, "the last steps trained in it"
    assert accuracy(run.model) > 0.8  # chance is 0.25
    assert not run.model.training


def test_warm_up_draws_uniformly_and_does_not_learn(tmp_path: Path) -> None:
    run, method = searched(tmp_path / "state", delay=20)
    seen: list[float] = []
    run.report = lambda step, figures: seen.append(figures["entropy"])
    run.run()
    assert seen[19] == pytest.approx(1)
    assert seen[29] < 0.9999
    assert method.policy.baseline is not None


def same(first: nn.Module, second: nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(("stop", "draws"), [(5, 0), (20, 0), (33, 0), (20, 3)])
def test_a_killed_run_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, draws: int
) -> None:
    """Killed in the warm-up, in the search, and after formats were fixed."""
    whole, method = searched(tmp_path / "whole", draws=draws)
    whole.run()
    monkeypatch.setattr(loops, "SECONDS_BETWEEN_FILES", -1.0)
    killed, _ = searched(tmp_path / "killed", draws=draws)

    def kill(step: int, _: Mapping[str, float]) -> None:
        if step == stop:
            raise KeyboardInterrupt

    killed.report = kill
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed, again = searched(tmp_path / "killed", draws=draws)
    steps: list[int] = []
    resumed.report = lambda step, _: steps.append(step)
    resumed.run()
    assert steps[0] == stop + 1
    assert same(whole.model, resumed.model)
    assert again.final() == method.final()


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    first, method = searched(tmp_path / "state")
    first.run()
    second, again = searched(tmp_path / "state")
    second.task = None  # type: ignore[assignment]  # it would be called
    second.run()
    assert same(first.model, second.model)
    assert again.final() == method.final()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"training": replace(TRAINING, rate=1e-3)}, r"rate was 0\.003 and is now 0\.001"),
        ({"training": replace(TRAINING, seed=1)}, "seed was 0 and is now 1"),
        ({"beta": 2.0}, r"search_beta was 1\.0 and is now 2\.0"),
    ],
)
def test_a_run_of_other_settings_is_not_gone_on_with(
    tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    run, _ = searched(tmp_path / "state")
    run.run()
    other, _ = searched(tmp_path / "state", **changed)
    with pytest.raises(SearchError, match=says):
        other.run()


def test_a_damaged_state_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"\x08" * 40)
    run, _ = searched(tmp_path / "state")
    with pytest.raises(SearchError, match="delete it to train anew"):
        run.run()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_and_the_last_good_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(loops, "SECONDS_BETWEEN_FILES", -1.0)
    run, _ = searched(tmp_path / "state")
    good = quarters()

    def task(model: nn.Module, step: int, generator: torch.Generator) -> Outcome:
        outcome = good(model, step, generator)
        if step < 12:
            return outcome
        if what == "loss":
            return Outcome(outcome.loss * math.nan, outcome.quality)
        zero = model.head.bias.sum() * 0  # finite, and its root has no derivative
        return Outcome(outcome.loss + zero.sqrt(), outcome.quality)

    run.task = task
    with pytest.raises(SearchError, match=rf"stops at step 12.*{what}.*keeps the state of step 12"):
        run.run()
    healthy, _ = searched(tmp_path / "state")
    steps: list[int] = []
    healthy.report = lambda step, _: steps.append(step)
    healthy.run()
    assert steps[0] == 13
    assert all(bool(t.isfinite().all()) for t in healthy.model.state_dict().values())


def test_weights_that_outgrow_their_format_stop_as_nan_does(tmp_path: Path) -> None:
    run, _ = searched(tmp_path / "state")
    run.training = replace(run.training, rate=1e30, warmup=0)
    with pytest.raises(SearchError, match=r"stops at step 1, .*beyond float16.*with a lower rate"):
        run.run()


def test_a_choice_judged_nan_stops_before_the_policy_learns_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch that is trained on is fine, the one that choices are judged on is not."""
    monkeypatch.setattr(loops, "SECONDS_BETWEEN_FILES", -1.0)
    run, method = searched(tmp_path / "state", draws=2)
    method._judge = lambda step: -1.0 if step < 12 else math.nan
    with pytest.raises(SearchError, match=r"step 12.*reward.* nan; .*keeps the state of step 12"):
        run.run()
    assert all(bool(row.isfinite().all()) for row in method.policy.logits)
    healthy, _ = searched(tmp_path / "state", draws=2)
    healthy.run()
    assert accuracy(healthy.model) > 0.25  # chance


def test_targets_and_phases_out_of_reach_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="cannot be reached"):
        searched(tmp_path / "state", target=1.0)
    with pytest.raises(SearchError, match="leaves nothing to search"):
        searched(tmp_path / "state", target=1e9)
    with pytest.raises(SearchError, match="leave none of 40"):
        searched(tmp_path / "state", delay=35)
    with pytest.raises(SearchError, match="temperature"):
        searched(tmp_path / "state", temperature=0.0)
    with pytest.raises(SearchError, match="1 draws cannot be compared"):
        searched(tmp_path / "state", draws=1)
    costs = bops(space("w4a4", "w6a6"), PRODUCTS)
    layers = Layers(net(), costs.space)
    with pytest.raises(SearchError, match="nobody judges the 2 draws"):
        Fliqs(layers, costs, replace(SEARCH, draws=2), 40, seed=0)
    with pytest.raises(SearchError, match="at least one step"):
        Training(steps=0, rate=1e-3)
    with pytest.raises(SearchError, match="a positive rate"):
        Training(steps=5, rate=math.inf)


def test_a_fixed_choice_trains_in_it_from_its_start(tmp_path: Path) -> None:
    model = net()
    layers = Layers(model, space("w4a4", "w8a8"))
    method = Fixed(layers, (0, 0, 0), start=3)
    names: list[str | None] = []

    def watch(_: int, __: Mapping[str, float]) -> None:
        candidate = layers.of["up.weight"].candidate
        names.append(candidate.name if candidate else None)

    Loop(model, quarters(), method, Training(6, 1e-3), tmp_path / "state", {}, watch).run()
    assert names == [None] * 3 + ["w4a4"] * 3


def test_training_in_bfloat16_learns_too(tmp_path: Path) -> None:
    run, _ = searched(tmp_path / "state", replace(TRAINING, steps=120, autocast=True))
    run.run()
    assert accuracy(run.model) > 0.8


def test_what_ships_is_what_was_trained() -> None:
    model = net().eval()
    layers = Layers(model, space("w4a4", "w8a8", "e3m1", widths=(0.5, 1.0)))
    schemes = schemes_of(layers, (0, 1, 1, 1))
    assert schemes["gate.weight"] == schemes["up.weight"] == "w8a8"
    assert set(rounded(layers, schemes)) == set(PRODUCTS)
    assert schemes_of(layers, (0, 1, 2, 1))["head.weight"] == "fp5e3m1afp5e3m1"
    with pytest.raises(SearchError, match="50% of its width"):
        schemes_of(layers, (0, 1, 1, 0))
