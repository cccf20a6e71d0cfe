"""A language model trained while its formats are searched: what ships computes what was trained."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlib.calibration.data import load_windows
from quantlib.checkpoint.contents import MAP_FILE
from quantlib.checkpoint.writer import PLAN_FILE
from quantlib.errors import CheckpointError, SearchError, UsageError
from quantlib.models.source import Source
from quantlib.pipeline import train_search as module
from quantlib.pipeline.narrowed import hidden_width, narrowed, order_channels
from quantlib.pipeline.opening import load_tokenizer
from quantlib.pipeline.train_search import (
    LOSSES_FILE,
    STATE_FILE,
    Request,
    distillation,
    train_search,
)
from quantlib.pipeline.trained import Trainable
from quantlib.runtime.load import load
from quantlib.search.plan import Plan
from quantlib.search.trained.layers import Layers, Space, decisions
from quantlib.search.trained.numbers import space_of


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture(scope="module")
def text(sample_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("trained") / "text.txt"
    file.write_text(sample_text, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def request_(text: Path) -> Request:
    return Request(
        str(text), cost="5x5", space="w4a4,w6a6,w8a8", steps=10, seqlen=16, windows=6, rest="w8g32"
    )


def test_what_ships_computes_what_was_trained(
    model: Path, request_: Request, tmp_path: Path
) -> None:
    result = train_search(model, tmp_path / "out", request_)
    assert result.cost <= result.target
    plan = Plan.load(result.path / PLAN_FILE)
    assert plan.schemes == result.plan.schemes
    assert set(plan.schemes.values()) <= {"w4a4", "w6a6", "w8a8", "w8g32"}
    assert (result.path / MAP_FILE).exists()
    size = sum(file.stat().st_size for file in result.path.glob("*.safetensors"))
    assert 0.97 * plan.bytes < size <= plan.bytes  # headers are counted with longest offsets
    again = train_search(model, tmp_path / "out", request_)  # nothing left to do
    assert again.plan == result.plan
    loaded = load(result.path).model
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
    assert bool(logits.isfinite().all())


def test_training_brings_the_model_nearer_to_its_teacher(
    model: Path, request_: Request, tmp_path: Path
) -> None:
    """Everything in 4 bits, hardly trained and trained: KL on the windows that it learned from."""
    tokenizer = load_tokenizer(model)
    windows = load_windows(request_.data, tokenizer, request_.seqlen, request_.windows, 0)
    judge = distillation(Trainable.open(model).model, windows, 32)

    def kl(out: Path) -> float:
        with torch.no_grad():
            outcome = judge(load(out).model, 0, torch.Generator().manual_seed(0))
        return -outcome.quality

    kls = []
    for name, steps, rate in (("short", 5, 1e-9), ("long", 60, 1e-3)):
        asked = replace(request_, cost="4x4", steps=steps, rate=rate, settle=0.4)
        result = train_search(model, tmp_path / name, asked)
        assert set(result.plan.schemes.values()) == {"w4a4", request_.rest}
        kls.append(kl(result.path))
    assert kls[1] < 0.8 * kls[0]


def test_columns_of_other_widths_keep_their_order(
    model: Path, request_: Request, tmp_path: Path
) -> None:
    asked = replace(request_, space="columns", cost="5x5")
    result = train_search(model, tmp_path / "out", asked)
    wide = [name for name, scheme in result.plan.schemes.items() if "h8" in scheme]
    assert wide
    order = load(result.path).checkpoint.order(wide[0])
    assert order is not None
    assert sorted(order.tolist()) == list(range(len(order)))


def test_a_narrowed_model_computes_what_was_trained(model: Path, tmp_path: Path) -> None:
    trainable = Trainable.open(model)
    width = hidden_width(trainable, (0.5, 1.0))
    numbers = decisions(trainable.model_map.weights, space_of("w4a4,w8a8"))
    layers = Layers(trainable.model, Space(numbers, (width,)))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = trainable.model(input_ids=ids).logits
        order_channels(layers, width, lambda: trainable.model(input_ids=ids))
        moved = trainable.model(input_ids=ids).logits
        # sums over hidden channels in another order: float32
        torch.testing.assert_close(moved, before, rtol=1e-4, atol=1e-5)
        choice = (*(index % 2 for index in range(len(numbers))), 0)
        layers.choose(choice)
        expected = trainable.model(input_ids=ids).logits
        narrow, _ = narrowed(trainable, layers, choice, tmp_path / "narrow")
        found = narrow.model(input_ids=ids).logits
    assert not torch.allclose(expected, moved, rtol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    whole = trainable.model.config.intermediate_size
    assert narrow.model.config.intermediate_size == whole // 2


def test_channels_that_carry_most_come_first(model: Path) -> None:
    trainable = Trainable.open(model)
    width = hidden_width(trainable, (0.5,))
    layers = Layers(
        trainable.model, Space(decisions(trainable.model_map.weights, space_of("int-s")), (width,))
    )
    reader = layers.of[width.readers[0]]
    with torch.no_grad():
        reader.weight[:, 7] *= 100
        loud = reader.weight[:, 7].clone()
        order_channels(layers, width, lambda: trainable.model(input_ids=torch.arange(5, 25)[None]))
    assert torch.equal(reader.weight[:, 0], loud)


def test_widths_that_were_found_are_in_the_checkpoint(
    model: Path, request_: Request, tmp_path: Path
) -> None:
    result = train_search(model, tmp_path / "out", replace(request_, widths=(0.5, 0.75)))
    assert result.cost <= result.target
    before = json.loads((model / "config.json").read_text())["intermediate_size"]
    after = json.loads((result.path / "config.json").read_text())["intermediate_size"]
    assert after in (before // 2, before * 3 // 4)
    with torch.no_grad():
        logits = load(result.path).model(input_ids=torch.arange(5, 25)[None]).logits
    assert bool(logits.isfinite().all())
    size = sum(file.stat().st_size for file in result.path.glob("*.safetensors"))
    assert 0.97 * result.plan.bytes < size <= result.plan.bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.work"]


@pytest.mark.parametrize("changed", [{"space": "columns"}, {"cost": "5ms"}])
def test_widths_are_searched_beside_whole_layers_in_bit_operations(
    request_: Request, changed: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match="leave out --widths"):
        replace(request_, widths=(0.5, 1.0), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"cost": "fast"}, UsageError, "not a cost"),
        ({"cost": "2x2"}, SearchError, "cannot be reached"),
        ({"cost": "90%"}, SearchError, "leaves nothing to search"),
        ({"space": "w4a4"}, SearchError, "nothing to choose"),
        ({"shared": "layer"}, SearchError, "cannot share"),
    ],
)
def test_a_request_that_cannot_be_is_refused_before_training(
    model: Path,
    request_: Request,
    tmp_path: Path,
    changed: dict[str, str],
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        train_search(model, tmp_path / "out", replace(request_, **changed))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_search_that_begins_with_measured_losses_measures_once(
    model: Path, request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring = replace(request_, measured=1)
    first = train_search(model, tmp_path / "out", measuring)
    assert first.cost <= first.target
    kept = json.loads((tmp_path / "out.work" / LOSSES_FILE).read_text())
    assert all(len(row) == 3 for row in kept["losses"])
    monkeypatch.setattr(module, "losses", lambda *_: pytest.fail("measured again"))
    again = train_search(model, tmp_path / "out", measuring, overwrite=True)
    assert again.plan == first.plan
    with pytest.raises(UsageError, match="leave out --widths or --measured"):
        replace(measuring, widths=(0.5, 1.0))
    with pytest.raises(UsageError, match="-1 batches"):
        replace(request_, measured=-1)


def test_other_settings_do_not_go_on_with_a_run(
    model: Path, request_: Request, tmp_path: Path
) -> None:
    train_search(model, tmp_path / "out", request_)
    assert (tmp_path / "out.work" / STATE_FILE).exists()
    with pytest.raises(CheckpointError, match="already holds another checkpoint"):
        train_search(model, tmp_path / "out", replace(request_, seed=1), overwrite=False)
    with pytest.raises(SearchError, match="seed was 0 and is now 1"):
        train_search(model, tmp_path / "out", replace(request_, seed=1), overwrite=True)


def test_another_model_of_the_same_form_does_not_go_on_with_a_run(
    model: Path, request_: Request, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    [file] = other.glob("*.safetensors")
    weights = load_file(file)
    save_file({name: 2 * weight for name, weight in weights.items()}, file, {"format": "pt"})
    assert Source.open(other).fingerprint == Source.open(model).fingerprint
    train_search(model, tmp_path / "out", request_)
    with pytest.raises(SearchError, match="model was"):
        train_search(other, tmp_path / "out", request_, overwrite=True)


def test_phases_that_leave_no_search_are_refused(text: Path) -> None:
    with pytest.raises(UsageError, match="leave it none"):
        Request(str(text), "4x4", delay=0.6, settle=0.4)
    with pytest.raises(UsageError, match="whole numbers from 1"):
        Request(str(text), "4x4", batch=0)


@pytest.mark.parametrize("rate", [math.nan, math.inf, 0.0, -1e-5])
def test_a_learning_rate_that_is_none_is_refused(text: Path, rate: float) -> None:
    with pytest.raises(UsageError, match="a number above 0, such as 2e-5"):
        Request(str(text), "4x4", rate=rate)
