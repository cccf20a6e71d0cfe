"""The bed `unified-continuous`: it learns, starts from `unified`, and every part can be
calibrated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from quantlib.bench.beds import continuous_gates, continuous_stages, unified_folder, unified_gates
from quantlib.bench.beds import continuous_model as continuous
from quantlib.bench.beds import unified_model as unified
from quantlib.bench.beds.judge import Reader, judge_spec
from quantlib.bench.beds.scenes import SIDE, Handwriting, draw, normalised
from quantlib.bench.beds.training import Schedule, initialise
from quantlib.bench.beds.unified_continuous import BED
from quantlib.calibration.paths import find
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.records import read_records
from quantlib.calibration.streams import Stream
from quantlib.calibration.whole import calibrate
from quantlib.errors import DataError
from quantlib.evaluation.judge import Judge, save_judge
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(continuous_stages, "DRAWING_BATCH", 4)
    monkeypatch.setattr(continuous_stages, "READ", 4)
    monkeypatch.setattr(continuous_stages, "WRITTEN", 4)


@pytest.fixture(scope="module")
def strokes():
    masks = torch.zeros(10, SIDE, SIDE)
    for index in range(10):
        masks[index, 4 : 10 + index, 9 : 12 + index % 4] = 1
    return Handwriting(masks, torch.arange(10))


@pytest.fixture(scope="module")
def model():
    made = continuous.build()
    initialise(made, rng())
    return made


@pytest.fixture(scope="module")
def weights(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("weights")
    save_judge(folder / "judge.safetensors", Reader().eval().state_dict(), judge_spec())
    BED.write_weights(model, folder / "judge.safetensors", folder / "made")
    return folder / "made"


def test_it_starts_with_the_reader_and_the_language_model_of_unified(model):
    janus, ours = unified.build(), continuous.build()
    continuous.start_from(ours, janus)
    pixels = normalised(torch.rand(2, 3, SIDE, SIDE, generator=rng()))
    ids = torch.tensor([unified.question_ids(unified.DESCRIBE)] * 2)
    given = {"input_ids": ids, "pixel_values": pixels}
    assert torch.equal(ours(**given).logits, janus(**given).logits)


def test_encoder_and_decoder_learn_to_draw_two_scenes(tmp_path, strokes):
    """Twenty steps on little: enough to see the loss fall by a fifth, with the rest untouched."""
    made = continuous.build()
    initialise(made, rng())
    pixels = normalised(draw(strokes, 8, rng(), vary=False).pixels)
    before = continuous.drawing_loss(made, pixels, rng()).item()
    words = made.model.language_model.embed_tokens.weight.clone()
    continuous_stages.train_drawing(made, strokes, tmp_path, 0, Schedule(20, 2e-3, warmup=2))
    after = continuous.drawing_loss(made, pixels, rng()).item()
    assert after < 0.8 * before
    assert torch.equal(words, made.model.language_model.embed_tokens.weight)


def test_the_joint_stage_leaves_the_image_encoder_and_the_decoder_alone(tmp_path, strokes):
    made = continuous.build()
    initialise(made, rng())
    frozen = nn.ModuleList([made.model.image_encoder, made.model.image_decoder])
    before = [parameter.clone() for parameter in frozen.parameters()]
    head = made.model.generation_head.vector_head.weight.clone()
    continuous_stages.train_jointly(made, strokes, tmp_path, 0, Schedule(2, 1e-3, warmup=1))
    assert all(torch.equal(*pair) for pair in zip(before, frozen.parameters()))
    assert not torch.equal(head, made.model.generation_head.vector_head.weight)


def test_gates_fail_on_a_model_that_learnt_nothing(model, strokes):
    judge = Judge(Reader().eval().state_dict(), judge_spec())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unified_gates, "REPEATS", 1)
        shares = continuous_gates.measure(model, judge, strokes)
    assert not unified_gates.passed(shares)
    assert set(unified_gates.LIMITS) < set(shares)
    assert shares["generation_digit"].count == 80


def test_records_reach_every_part_through_the_routes_of_its_form(weights, strokes, tmp_path):
    """Text, answers, teacher-forced vectors with guidance rows, encoder and decoder."""
    scenes = draw(strokes, 4, rng(), vary=False)
    unified_folder.write_records(tmp_path, "some", scenes, unified_folder.one_question)
    records = read_records(tmp_path / "some.jsonl")
    config = json.loads((weights / "model" / "config.json").read_text())
    tools, routes = Tools(weights / "model", config, 256), find(config["model_type"])
    assert tools.guidance == continuous.GUIDANCE
    model, streams = BED.load(weights), []
    for route in routes.routes:
        chosen = [record for record in records if record.kind in route.kinds][:2]
        for record in chosen:
            route.check(tools, record)
        samples = [route.sample(tools, model, record) for record in chosen]
        for sample in samples:
            output = route.run(model, **sample.inputs)
            assert sample.loss.truth(output).value.isfinite()
            assert sample.loss.divergence(*[sample.loss.said(output)] * 2).value == 0
        streams.append(Stream(route.stream, samples, route.run, modalities=route.modalities))
    model_map = ModelMap.from_source(Source.open(weights / "model"))
    assert calibrate(model, model_map, streams).total.unseen() == []


def test_weights_are_small_enough_to_be_committed(weights):
    size = (weights / "model" / "model.safetensors").stat().st_size
    assert size < 20e6
    with pytest.raises(DataError, match="exists"):
        BED.write_weights(continuous.build(), weights / "judge.safetensors", weights)


def test_a_folder_without_weights_says_what_to_run(tmp_path: Path):
    with pytest.raises(DataError, match="train and release"):
        BED.load(tmp_path)
